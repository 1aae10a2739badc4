"""A teacher that knows some of the student's classes judges these: hard and soft judges, class distributions, by slow
references on the teacher's own logits."""

import pytest
import torch
from builders import batch, losses_of
from classes_case import BACKGROUND, SHARED, distiller
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from era.losses import kd_loss
from era.methods.dist import dist_terms
from era.methods.dkd import dkd_terms
from era.methods.gdkd import gdkd_terms
from era.modeling.step import Step

SOFT = [
    "MODEL.ERA.TWI.SOFT_RPN_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", "1.0",
    "MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "1.0",
]  # fmt: skip
DENSE = ["MODEL.ERA.TWI.DENSE_WEIGHT", "1.0"]


@pytest.fixture(autouse=True)
def _storage():
    with EventStorage(0):
        yield


def step_of(model, objects=(4, 3), seed=2):
    """A recorded step of the student, with objects of known and of unknown classes."""
    inputs = batch(objects, seed=seed)
    with model.detector.record() as recording:
        losses_of(model.student, inputs)
    return Step(inputs, recording, model.detector, model.teacher)


def comparable(step):
    """Rows of known classes and background, columns of known classes and background, labels as columns."""
    rows = torch.tensor([c in (*SHARED, BACKGROUND) for c in step.student.classes.tolist()])
    columns = [*SHARED, BACKGROUND]
    labels = torch.tensor([columns.index(c) for c in step.student.classes[rows].tolist()])
    pair = (
        x.class_logits[rows][:, columns]
        for x in (step.student.predictions, step.teacher_predictions)
    )
    return *pair, labels


TERMS = {
    "KD": lambda own, other, labels: {"classes": kd_loss(own, other, 1.0)},
    "DKD": lambda own, other, labels: dict(
        zip(("target", "others"), dkd_terms(own, other, labels, 1.0), strict=True)
    ),
    "DIST": lambda own, other, labels: dict(
        zip(("inter", "intra"), dist_terms(own, other, 1.0), strict=True)
    ),
    "GDKD": lambda own, other, labels: dict(
        zip(("groups", "top", "rest"), gdkd_terms(own, other, (2,), 1.0), strict=True)
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_class_distributions_are_compared_over_shared_classes_and_background(tmp_path, name):
    opts = ["MODEL.DISTILLER.METHODS", f"['{name}']", "MODEL.GDKD.TOPK", "2",
            "MODEL.DKD.BETA", "1.0", "MODEL.GDKD.W1", "1.0", "MODEL.GDKD.W2", "1.0"]  # fmt: skip
    model = distiller(tmp_path, *opts)
    step = step_of(model)
    assert 0 < len(comparable(step)[2]) < len(step.student.classes)  # some rows are left out
    expected = TERMS[name](*comparable(step))
    found = model.methods[name.lower()].losses(step)
    assert found.keys() == {f"loss_{name.lower()}_{term}" for term in expected}
    for term, value in expected.items():
        torch.testing.assert_close(found[f"loss_{name.lower()}_{term}"], value)
    own = model.detector.model.roi_heads.box_predictor.cls_score
    (gradient,) = torch.autograd.grad(sum(found.values()), [own.weight])
    assert gradient[[*SHARED, BACKGROUND]].abs().sum() > 0
    assert gradient[2:7].abs().max() == 0  # what the teacher does not know is not taught by it


def test_too_many_classes_for_gdkd_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"tell 4 classes apart.*set it from 1 to 3"):
        distiller(tmp_path, "MODEL.DISTILLER.METHODS", "['GDKD']")


@pytest.mark.parametrize(
    "method", ["CRLD", "DSKD", "SSKD", "R2KD", "RDD", "CrossKD", "TRED", "ReviewKD"]
)
def test_every_other_method_trains_on_it(tmp_path, method):
    opts = ["MODEL.RDD.REWEIGHT", "False", "MODEL.RDD.LAMBDA", "1.0", "MODEL.TRED.STAGE", "disentangle",
            "MODEL.R2KD.PRUNED_WEIGHTS", "", "MODEL.SSKD.HEAD_WEIGHTS", ""]  # fmt: skip
    model = distiller(tmp_path, *opts, config=f"methods/{method.lower()}")
    losses, _ = losses_of(model, batch((4, 3), seed=2))
    total = sum(losses.values())
    assert torch.isfinite(total) and total < 1e3  # no logit of a class that is not there counts
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("agnostic", ["False", "True"], ids=["boxes by class", "class-agnostic"])
@pytest.mark.parametrize("sigmoid", ["False", "True"], ids=["softmax", "sigmoid"])
def test_the_hard_judge_adds_nothing_where_it_does_not_know_the_class(tmp_path, sigmoid, agnostic):
    """The sum over the other proposals, by the number of all: cross entropy over shared classes and background."""
    keys = [
        "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
        sigmoid,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
        agnostic,
    ]
    model = distiller(tmp_path, *keys, teacher_opts=keys)
    step, judge = step_of(model), model.teacher.detector
    maps = step.teacher_features
    said, classes = judge.predict(maps, step.student.samples), step.student.classes
    knows = torch.tensor([c in (*SHARED, BACKGROUND) for c in classes.tolist()])
    columns = [*SHARED, BACKGROUND]
    labels = torch.tensor([columns.index(c) for c in classes[knows].tolist()])
    logits = said.class_logits[knows][:, columns]
    if sigmoid == "True":
        truth = F.one_hot(labels, 4)[:, :3].float()
        of_classes = F.binary_cross_entropy_with_logits(logits[:, :3], truth, reduction="sum")
    else:
        of_classes = F.cross_entropy(logits, labels, reduction="sum")
    proposals = step.student.proposals
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
    truth = torch.cat(
        [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    )
    objects = (knows & (classes < BACKGROUND)).nonzero()[:, 0]
    assert 0 < len(objects) < (classes < BACKGROUND).sum()
    deltas = said.box_deltas.unflatten(1, (-1, 4))
    slot = classes[objects] if agnostic == "False" else torch.zeros_like(objects)
    coder = judge.box_predictor.box2box_transform
    target = coder.get_deltas(boxes[objects], truth[objects])
    of_boxes = (deltas[objects, slot] - target).abs().sum()
    found = judge.head_loss("roi", maps, step.student)
    torch.testing.assert_close(found, (of_classes + of_boxes) / len(classes))


@pytest.mark.parametrize("objects", [(4, 3), (2, 0), (0, 0)], ids=["full", "half", "empty"])
@pytest.mark.parametrize("sigmoid", ["False", "True"], ids=["softmax", "sigmoid"])
def test_the_fast_path_is_the_definition(tmp_path, objects, sigmoid):
    keys = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", sigmoid]
    kd = ["MODEL.ERA.KD_WEIGHT", "0.0" if sigmoid == "True" else "1.0", *SOFT, *keys]
    losses = [
        losses_of(
            distiller(tmp_path, *kd, "MODEL.ERA.FAST", fast, teacher_opts=keys),
            batch(objects, seed=2),
        )[0]
        for fast in ("True", "False")
    ]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-5)
    assert {"loss_era_twi_roi", "loss_era_soft_roi"} <= losses[0].keys()
    assert losses[0]["loss_era_soft_roi"] < 100 and losses[0]["loss_era_twi_roi"] < 100


def test_every_stage_of_a_cascade_judges_what_it_knows(tmp_path):
    keys = ["MODEL.ERA.TWI.STAGES", "all", *SOFT]
    model = distiller(tmp_path, *keys, config="cascade_era", teacher="cascade_teacher")
    step, judge = step_of(model), model.teacher.detector
    whole = judge.head_loss("roi", step.teacher_features, step.student)
    assert torch.isfinite(whole) and whole < 100
    # with proposals of unknown classes alone nothing is judged, in any stage
    for own in step.student.proposals:
        own.gt_classes = torch.full_like(own.gt_classes, 3)
    step.student._samples.clear()
    for truth in step.student.targets:
        truth.gt_classes.fill_(3)
    for predictor in judge.model.roi_heads.box_predictor:
        torch.nn.init.zeros_(predictor.cls_score.weight)
    first = judge.first_stage()
    assert first.head_loss("roi", step.teacher_features, step.student) == 0
    losses, _ = losses_of(model, batch((4, 3), seed=2))
    assert torch.isfinite(sum(losses.values()))


def test_later_stages_of_a_cascade_leave_out_boxes_on_unknown_objects(tmp_path):
    model = distiller(tmp_path, config="cascade_era", teacher="cascade_teacher")
    judge, seen = model.teacher.detector, []
    step = step_of(model)
    for predictor in judge.model.roi_heads.box_predictor:
        losses = predictor.losses
        predictor.losses = lambda said, own, losses=losses: seen.append(own) or losses(said, own)
    judge.head_loss("roi", step.teacher_features, step.student)
    classes = [torch.cat([p.gt_classes for p in own]).tolist() for own in seen]
    assert len(classes) == 3 and all(set(c) <= {*SHARED, BACKGROUND} for c in classes)
    assert any(set(c) & set(SHARED) for c in classes)


@pytest.mark.parametrize("config", ["retinanet", "fcos"])
def test_a_dense_judge_looks_at_shared_columns_and_known_anchors(tmp_path, config):
    """Its loss is that of a plain model of the shared classes alone, whose unknown anchors do not count."""
    model = distiller(tmp_path, *DENSE, *SOFT, config=f"{config}_era", teacher=f"{config}_teacher")
    step, judge = step_of(model), model.teacher.detector
    labels = torch.cat(step.student.labels)
    unknown = (labels >= 2) & (labels < 7)
    assert unknown.any() and ((labels >= 0) & (labels < 2) | (labels == 7)).any()
    found = judge.head_loss("dense", step.teacher_features, step.student)
    said = judge.joined(judge.head_output(step.teacher_features))
    losses = judge.anchor_losses(said, step.student)
    expected = 0.0
    for own in losses.values():
        kept = ~unknown[own.rows]
        expected = expected + own.values[kept].sum() / own.normaliser
    torch.testing.assert_close(found, expected)
    assert 0 < found < 100
    losses, _ = losses_of(model, batch((4, 3), seed=2))
    assert {"loss_era_twi_dense", "loss_era_soft_dense"} <= losses.keys()
    assert torch.isfinite(sum(losses.values())) and losses["loss_era_soft_dense"] < 1e3


@pytest.mark.parametrize("config", ["retinanet_era", "fcos_era", "era"])
def test_pictures_without_labels_are_looked_at_where_the_teacher_knows_the_class(tmp_path, config):
    teacher = config.replace("era", "teacher")
    model = distiller(
        tmp_path, "MODEL.DISTILLER.PSEUDO_SCORE", "0.0", *SOFT, config=config, teacher=teacher
    )
    model.label_free = ("era",)
    inputs = batch((1, 0))
    inputs[1]["unlabeled"] = True
    losses, _ = losses_of(model, inputs)
    assert torch.isfinite(sum(losses.values()))


def test_era_at_the_roi_feature_is_judged_alike(tmp_path):
    keys = ["MODEL.ERA.ROI.TWI_WEIGHT", "1.0", "MODEL.ERA.ROI.SOFT_WEIGHT", "1.0"]
    model = distiller(tmp_path, *keys)
    step, judge = step_of(model), model.teacher.detector
    said = judge.predict(step.teacher_features, step.student.samples)
    whole = judge.prediction_loss(said, step.student)
    torch.testing.assert_close(whole, judge.head_loss("roi", step.teacher_features, step.student))
    losses, _ = losses_of(model, batch((4, 3), seed=2))
    assert 0 < losses["loss_era_roi_twi"] < 100 and losses["loss_era_roi_soft"] < 100
