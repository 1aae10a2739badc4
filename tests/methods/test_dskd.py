"""DSKD: the stages' weights by hand, the losses in numpy on a step's own tensors, and whom they teach."""

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.utils.events import EventStorage

from era.errors import UserError
from era.losses import class_loss
from era.methods.dskd import stage_weights
from era.modeling.step import Step
from era.modeling.unlabeled import UNLABELED

OPTS = ["MODEL.DISTILLER.METHODS", "('DSKD',)", "MODEL.DSKD.FC_DIM", "16"]
WIDER = ["MODEL.FPN.OUT_CHANNELS", "24"]  # of the teacher
NAMES = {"loss_dskd_feature", "loss_dskd_kd", "loss_dskd_class"}


def weights(feature, kd, true):
    return [
        "MODEL.DSKD.FEATURE_WEIGHT", str(feature), "MODEL.DSKD.KD_WEIGHT", str(kd),
        "MODEL.DSKD.CLASS_WEIGHT", str(true),
    ]  # fmt: skip


def test_the_weights_of_stages_by_hand():
    """Losses 0, log 2 and log 5: shares 1/8, 2/8 and 5/8."""
    losses = torch.tensor([1.0, 2.0, 5.0]).log().requires_grad_()
    expected = {"harder": [1, 2, 5], "easier": [3.5, 3, 1.5], "equal": [8 / 3] * 3}
    for rule, eighths in expected.items():
        found = stage_weights(losses, rule)
        torch.testing.assert_close(found, torch.tensor(eighths) / 8)
        assert not found.requires_grad
    assert stage_weights(torch.tensor([3.0]), "harder").item() == 1
    big = stage_weights(torch.tensor([6e4, 100.0], dtype=torch.float16), "harder")
    assert big.dtype == torch.float32 and big.tolist() == [1, 0]


def test_classes_against_numpy_and_of_no_row():
    draw = np.random.default_rng(0)
    logits, classes = draw.normal(0, 4, (7, 5)), draw.integers(0, 5, 7)
    expected = np.mean(
        [np.log(np.exp(z).sum()) - z[c] for z, c in zip(logits, classes, strict=True)]
    )
    found = class_loss(torch.from_numpy(logits), torch.from_numpy(classes))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    none = torch.zeros(0, 5, requires_grad=True)
    empty = class_loss(none, torch.zeros(0, dtype=torch.long))
    empty.backward()
    assert empty.item() == 0 and none.grad is not None
    assert class_loss(torch.full((1, 2), 6e4).half(), torch.tensor([0])).dtype == torch.float32


def recorded(model, objects):
    """The student's step and what the method says of it."""
    torch.manual_seed(7)
    with EventStorage(0) as storage, model.detector.record() as recording:
        model.student(batch(objects))
        step = Step(batch(objects), recording, model.detector, model.teacher)
        return step, model.methods["dskd"].losses(step), storage


@pytest.mark.parametrize("rule", ["harder", "easier", "equal"])
@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_the_losses_are_those_of_the_steps_own_tensors(objects, rule):
    """In numpy and float64: every stage against the level of its stride, by hand."""
    opts = [*weights(2.0, 3.0, 0.5), "MODEL.DSKD.WEIGHTING", rule, "MODEL.DSKD.TEMPERATURE", "2.0"]
    model = tiny_model("era", *OPTS, *opts, teacher_opts=WIDER)
    method = model.methods["dskd"]
    step, losses, _ = recorded(model, objects)
    assert losses.keys() == NAMES
    terms = []
    target = step.teacher_predictions.class_logits.double().numpy() / 2
    p = np.exp(target) / np.exp(target).sum(1, keepdims=True)
    for stage, level, stride in (("res3", "p3", 8), ("res4", "p4", 16)):
        with torch.no_grad():
            adapted = method.adapters[stage](step.student.stages[stage])
            pooler = ROIPooler(7, [1 / stride], 1, "ROIAlignV2")
            boxes = [own.proposal_boxes for own in step.student.proposals]
            logits = method.classifier(pooler([adapted], boxes)).double().numpy()
        feature = np.mean((adapted.numpy() - step.teacher_features[level].numpy()) ** 2)
        q = np.exp(logits / 2) / np.exp(logits / 2).sum(1, keepdims=True)
        kd = 4 * np.mean((p * np.log(p / q)).sum(1))
        rows = np.arange(len(logits)), step.student.classes.numpy()
        true = np.mean(np.log(np.exp(logits).sum(1)) - logits[rows])
        terms.append((2 * feature, 3 * kd, 0.5 * true))
    terms = np.array(terms)
    shares = np.exp(terms.sum(1)) / np.exp(terms.sum(1)).sum()
    w = {"harder": shares, "easier": 1 - shares, "equal": np.full(2, 0.5)}[rule]
    for name, expected in zip(("feature", "kd", "class"), (w[:, None] * terms).sum(0), strict=True):
        assert losses[f"loss_dskd_{name}"].item() == pytest.approx(expected, rel=1e-4), name


def test_gradients_reach_the_stages_and_what_is_below_them_and_no_teacher():
    model = tiny_model("era", *OPTS, teacher_opts=WIDER)
    _, losses, storage = recorded(model, (2, 1))
    sum(losses.values()).backward()
    method, bottom_up = model.methods["dskd"], model.student.backbone.bottom_up
    reached = {n.split(".")[0] for n, p in bottom_up.named_parameters() if p.grad is not None}
    assert reached == {"stem", "res2", "res3", "res4"}
    assert all(p.grad is not None for p in method.parameters())
    others = [*model.student.roi_heads.parameters(), *model.teacher.parameters()]
    assert all(p.grad is None for p in [*others, *bottom_up.res5.parameters()])
    logged = [storage.latest()[f"dskd/{stage}/weight"][0] for stage in ("res3", "res4")]
    assert sum(logged) == pytest.approx(1)


@pytest.mark.parametrize(
    "on, names",
    [
        ((1.0, 0.0, 0.0), {"loss_dskd_feature"}),
        ((0.0, 1.0, 0.0), {"loss_dskd_kd"}),
        ((0.0, 0.0, 1.0), {"loss_dskd_class"}),
    ],
)
def test_a_loss_of_weight_0_is_left_out_and_nothing_that_trains_is_without_gradient(on, names):
    model = tiny_model("era", *OPTS, *weights(*on))
    _, losses, _ = recorded(model, (2, 1))
    assert losses.keys() == names
    sum(losses.values()).backward()
    method = model.methods["dskd"]
    assert (method.classifier is None) == (on[1] == on[2] == 0)
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_weights_of_0_are_plain_training():
    plain, _ = losses_of(tiny_model("plain"), batch())
    model = tiny_model("era", *OPTS, *weights(0.0, 0.0, 0.0))
    assert losses_of(model, batch())[0] == plain
    assert not any(p.requires_grad for p in model.methods.parameters())


def test_pictures_without_labels_teach_all_but_the_true_classes():
    """The class loss is that of the labelled part alone, with its full weight."""
    model = tiny_model("era", *OPTS)
    mixed = batch((2, 1, 1))
    mixed[2][UNLABELED] = True
    losses, _ = losses_of(model, mixed)
    labelled, _ = losses_of(tiny_model("era", *OPTS), mixed[:2])
    assert losses.keys() > NAMES
    torch.testing.assert_close(losses["loss_cls"], labelled["loss_cls"])
    torch.testing.assert_close(losses["loss_dskd_class"], labelled["loss_dskd_class"])
    assert losses["loss_dskd_feature"] != labelled["loss_dskd_feature"]


def test_with_another_method_the_losses_add_up():
    names, alone = ("ERA", "DSKD"), {}
    opts = [*OPTS[2:], "MODEL.ERA.LEVELS", "['p3', 'p4', 'p5', 'p6']"]
    model = tiny_model("era", "MODEL.DISTILLER.METHODS", str(names), *opts)
    for name in names:
        single = tiny_model("era", "MODEL.DISTILLER.METHODS", f"('{name}',)", *opts)
        alone |= losses_of(single, batch())[0]
        model.methods[name.lower()].load_state_dict(single.methods[name.lower()].state_dict())
    both, _ = losses_of(model, batch())
    assert both.keys() == alone.keys() and {"loss_era_feature", *NAMES} < both.keys()
    torch.testing.assert_close(both, alone)


def test_in_half_precision_the_losses_stay_float32():
    model = tiny_model("era", *OPTS)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = losses_of(model, batch())
    assert all(losses[name].dtype == torch.float32 for name in NAMES)
    assert all(torch.isfinite(losses[name]) for name in NAMES)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.DSKD.KD_WEIGHT", "-1.0"], r"KD_WEIGHT is -1\.0"),
        (["MODEL.DSKD.TEMPERATURE", "0.0"], r"TEMPERATURE is 0\.0"),
        (["MODEL.DSKD.WEIGHTING", "softmax"], "'softmax': expected one of harder, easier, equal"),
        (["MODEL.DSKD.FC_DIM", "0"], "FC_DIM is 0"),
        (["MODEL.DSKD.STAGES", "[]"], r"STAGES is \[\]"),
        (["MODEL.DSKD.STAGES", "['res3', 'res3']"], "each once"),
        (["MODEL.DSKD.STAGES", "['res3']", "MODEL.DSKD.WEIGHTING", "easier"], "would count 0"),
        (
            ["MODEL.DSKD.STAGES", "['res6']"],
            r"'res6', but the student's bottom-up network gives \['res2'",
        ),
        (
            ["MODEL.DSKD.STAGES", "['res2']"],
            "'res2', of stride 4, at which .* no FPN level in common",
        ),
        (["MODEL.BACKBONE.FREEZE_AT", "3"], "'res3', which is frozen"),
        (["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"], "USE_SIGMOID_CE is True in the student"),
    ],
)
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=words):
        tiny_model("era", *OPTS, *opts)
