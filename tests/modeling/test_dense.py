"""RetinaNet and FCOS as families of detectors: what they are, their training steps and their inference."""

import os

import pytest
import torch
from builders import TOY, batch, losses_of, tiny_cfg, tiny_model, train_history
from dense_case import FAMILIES, LOSSES, OBJECTS, loud, recorded
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm

from era.config import load_config, student_config
from era.errors import UserError
from era.modeling.detectors import detector_of, family_of

both = pytest.mark.parametrize("name", FAMILIES)
batches = pytest.mark.parametrize("objects", OBJECTS.values(), ids=OBJECTS)
ZERO = [
    "MODEL.ERA.FEATURE_WEIGHT", "0.0", "MODEL.ERA.RESIDUAL_WEIGHT", "0.0",
    "MODEL.ERA.TWI.DENSE_WEIGHT", "0.0", "MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "0.0",
]  # fmt: skip


# ---- what they are ----------------------------------------------------------------------------------


@both
def test_a_family_by_config_and_by_model(name):
    cfg = student_config(load_config(str(TOY / f"{name}_era.yaml")))
    family = family_of(cfg)
    assert family is FAMILIES[name] and family.num_classes_in(cfg) == 8
    assert family.meta_architecture == cfg.MODEL.META_ARCHITECTURE
    assert family.num_classes_key() == f"MODEL.{name.upper()}.NUM_CLASSES"
    detector = detector_of(tiny_model(f"{name}_plain"))
    assert type(detector) is family and detector.num_classes == 8
    assert detector.head_levels == {"p3", "p4", "p5", "p6", "p7"}
    assert not detector.mask_on and not detector.keypoint_on
    detector.set_score_threshold(0.3)
    assert detector.thresholds["score_threshold"] == detector.model.test_score_thresh == 0.3


def test_the_keys_of_fcos_stay_with_an_fcos_alone():
    """A plain student's config of every other family is one that stock Detectron2 reads."""
    keys = student_config(load_config(str(TOY / "fcos_era.yaml"))).MODEL.FCOS
    assert keys.NUM_CLASSES == 8 and keys.NUM_CONVS == 2
    for config in ("era", "retinanet_era", "plain"):
        assert "FCOS" not in student_config(load_config(str(TOY / f"{config}.yaml"))).MODEL


def test_fcos_by_yaml_is_detectron2s_lazy_config():
    """The same weights by name and shape, the same numbers that are no weights, and the same detections and losses."""
    lazy = model_zoo.get_config("common/models/fcos.py").model
    lazy.backbone.bottom_up.stages.depth = 50
    cfg = load_config("configs/fcos_plain_r50.yaml", ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    expected, found = instantiate(lazy), build_model(student_config(cfg))
    assert type(found) is type(expected)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (expected, found)]
    assert shapes[0] == shapes[1]
    for key in (
        "test_score_thresh", "test_topk_candidates", "test_nms_thresh", "max_detections_per_image", "num_classes",
        "focal_loss_alpha", "focal_loss_gamma", "center_sampling_radius",
    ):  # fmt: skip
        assert getattr(found, key) == getattr(expected, key), key
    assert list(found.head_in_features) == list(expected.head_in_features)
    assert found.anchor_generator.strides == expected.anchor_generator.strides
    for key in ("pixel_mean", "pixel_std"):
        assert torch.equal(getattr(found, key), getattr(expected, key))
    with torch.no_grad():  # a random ResNet-50 without statistics answers in the order of 1e5
        for key, value in expected.state_dict().items():
            if key.startswith("backbone.bottom_up.") and value.dtype.is_floating_point:
                value.mul_(0.8)
    found.load_state_dict(expected.state_dict())
    inputs = batch((2, 0), num_classes=80)
    (own, _), (other, _) = (losses_of(m.train(), inputs) for m in (found, expected))
    assert {k: v.item() for k, v in own.items()} == {k: v.item() for k, v in other.items()}
    frozen = {n for n, p in found.named_parameters() if not p.requires_grad}
    assert frozen and all(".stem." in n or ".res2." in n for n in frozen)


def test_a_head_of_another_form_is_one_sentence():
    model = tiny_model("retinanet_plain")
    del model.head.bbox_pred
    with pytest.raises(
        UserError, match=r"a RetinaNet, has a RetinaNetHead as head, without \['bbox"
    ):
        detector_of(model).check_student()


# ---- training ---------------------------------------------------------------------------------------


@both
def test_with_every_weight_at_0_it_trains_as_stock_detectron2(name):
    """Step by step, bit for bit, the running normaliser of the losses included."""
    plain = train_history(f"{name}_plain", steps=6)
    assert plain[0].keys() == LOSSES[name] and plain[0] != plain[1]
    assert train_history(f"{name}_era", *ZERO, teacher=f"{name}_teacher", steps=6) == plain


@both
def test_with_losses_of_a_method_the_stock_losses_of_a_step_are_the_same(name):
    """Judges use the student's normaliser and move none."""
    plain, _ = losses_of(tiny_model(f"{name}_plain"), batch())
    model = tiny_model(
        f"{name}_era",
        *("MODEL.ERA.TWI.DENSE_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "1.0"),
        teacher=f"{name}_teacher",
    )
    found, _ = losses_of(model, batch())
    assert {k: found[k].item() for k in plain} == {k: v.item() for k, v in plain.items()}
    assert {"loss_era_twi_dense", "loss_era_soft_dense"} < found.keys()
    assert not hasattr(model.teacher.model, "loss_normalizer")
    sum(found.values()).backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


SETTINGS = {
    "default": [],
    "smooth L1, focal": [
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", "0.1", "MODEL.RETINANET.FOCAL_LOSS_ALPHA", "0.4",
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "1.0", "MODEL.FCOS.FOCAL_LOSS_GAMMA", "3.0",
    ],
    "GIoU": ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"],
    "no focal alpha": ["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "-1.0", "MODEL.FCOS.FOCAL_LOSS_ALPHA", "-1.0"],
}  # fmt: skip


@both
@batches
@pytest.mark.parametrize("opts", SETTINGS.values(), ids=SETTINGS)
def test_task_losses_with_weights_of_one_are_the_stock_losses(name, objects, opts):
    student, detector, recording, stock = recorded(name, objects, *opts)
    task = detector.task_losses(recording)
    assert task.keys() == stock.keys() == LOSSES[name]
    parameters = [p for p in student.parameters() if p.requires_grad]
    for key, loss in task.items():
        assert loss.values.shape == loss.rows.shape
        ones = loss.weighted(torch.ones_like(loss.values))
        torch.testing.assert_close(ones, stock[key], rtol=1e-5, atol=1e-6)
        own, other = (
            torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True)
            for x in (ones, stock[key])
        )
        for a, b in zip(own, other, strict=True):
            if b is not None:
                torch.testing.assert_close(a if a is not None else b * 0, b, rtol=1e-4, atol=1e-6)


@both
@batches
def test_a_recording_has_the_samples_predictions_and_classes_of_one_order(name, objects):
    _, detector, recording, _ = recorded(name, objects)
    rows = recording.samples
    labels = torch.cat(recording.labels)
    assert (labels[rows] >= 0).all() and torch.equal(recording.classes, labels[rows])
    whole = detector.predict(recording.features, rows)
    for own, other in zip(recording.predictions, whole, strict=True):
        assert len(own) == len(rows)
        torch.testing.assert_close(own, other)
    objects_rows = ((labels >= 0) & (labels < 8)).sum()
    assert (recording.classes < 8).sum() == objects_rows  # few: all of them are taken


@both
def test_nothing_is_left_on_the_model_also_when_the_forward_fails(name):
    student = tiny_model(f"{name}_plain")
    before = {
        k: len(m._forward_hooks) + len(m._forward_pre_hooks) for k, m in student.named_modules()
    }
    for inputs in (batch(), [{"image": torch.zeros(3, 64, 64)}]):
        try:
            with detector_of(student).record():
                losses_of(student, inputs)
        except AssertionError as e:
            assert "Instance annotations are missing" in str(e)
    assert "label_anchors" not in vars(student) and "forward_training" not in vars(student)
    after = {
        k: len(m._forward_hooks) + len(m._forward_pre_hooks) for k, m in student.named_modules()
    }
    assert after == before


def _ranks(folder):
    rank = comm.get_rank()
    torch.set_num_threads(1)
    gradients = {name: _gradients(name, [rank], ddp=True) for name in FAMILIES}
    torch.save(gradients, f"{folder}/{rank}.pth")


def _gradients(name, images, *, ddp=False):
    """Of a distiller's step on some of two pictures."""
    opts = ("MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "1.0", "MODEL.RESNETS.NORM", "FrozenBN")
    model = tiny_model(f"{name}_era", *opts, teacher=f"{name}_teacher")
    wrapped = model
    if ddp:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    inputs = batch((2, 1), seed=4)
    losses, _ = losses_of(wrapped, [inputs[i] for i in images])
    sum(losses.values()).backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def test_two_processes_take_the_mean_of_both_gradients(tmp_path):
    """Each with its own normaliser, as stock Detectron2 has it, and a sample of positions that does not depend on the
    process."""
    launch(_ranks, 2, dist_url="auto", args=(str(tmp_path),))
    a, b = (torch.load(os.path.join(tmp_path, f"{r}.pth"), weights_only=True) for r in (0, 1))
    for name in FAMILIES:
        alone = (_gradients(name, [image]) for image in (0, 1))
        for own, other, x, y in zip(a[name], b[name], *alone, strict=True):
            assert torch.equal(own, other)
            torch.testing.assert_close(own, (x + y) / 2, rtol=1e-4, atol=1e-5)


def test_pictures_without_labels_leave_the_normaliser():
    opts = ("MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "1.0")
    alone = tiny_model("retinanet_era", *opts, teacher="retinanet_teacher")
    labelled, _ = losses_of(alone, batch())
    model = tiny_model("retinanet_era", *opts, teacher="retinanet_teacher")
    others = [{"unlabeled": True, "image": item["image"]} for item in batch((1, 1), seed=6)]
    found, _ = losses_of(model, [*batch(), *others])
    assert model.student.loss_normalizer == alone.student.loss_normalizer != 100
    for key in LOSSES["retinanet"]:
        assert found[key].item() == labelled[key].item()
    assert found["loss_era_soft_dense"].item() != labelled["loss_era_soft_dense"].item()


def test_running_numbers_are_kept_and_put_back():
    student, detector, _, _ = recorded("retinanet")
    state = detector.running_state()
    assert state == {"loss_normalizer": student.loss_normalizer}
    with detector.running_kept():
        student.loss_normalizer = 5.0
    assert detector.running_state() == state
    fresh = detector_of(tiny_model("retinanet_plain"))
    assert fresh.running_state() == {}
    with fresh.running_kept():
        losses_of(fresh.model, batch())
    assert fresh.running_state() == {} and not hasattr(fresh.model, "loss_normalizer")
    fresh.load_running_state(state)
    assert fresh.model.loss_normalizer == student.loss_normalizer
    assert detector_of(tiny_model("plain")).running_state() == {}


# ---- what fits together ----------------------------------------------------------------------------------


def test_judges_of_other_anchors_or_families_are_refused():
    student = detector_of(tiny_model("retinanet_plain"))
    sizes = [
        "MODEL.ANCHOR_GENERATOR.SIZES",
        "[[20, 28], [40, 56], [80, 96], [112, 128], [128, 161]]",
    ]
    other = detector_of(tiny_model("retinanet_plain", *sizes))
    with pytest.raises(UserError, match=r"anchors differ.*MODEL\.RETINANET\.IN_FEATURES.*X needs"):
        other.check_judge(student, "X")
    fcos, rcnn = (detector_of(tiny_model(name)) for name in ("fcos_plain", "plain"))
    with pytest.raises(UserError, match="the teacher is a FCOS and the student a RetinaNet: X"):
        fcos.check_judge(student, "X")
    with pytest.raises(UserError, match="the student is a RetinaNet: X needs an RPN"):
        rcnn.check_judge(student, "X")
    with pytest.raises(UserError, match="a RetinaNet, whose classes are independent sigmoids"):
        student.check_class_distributions(student, "X")


@both
def test_a_student_starts_from_the_teachers_head(name):
    same = ["MODEL.DISTILLER.INIT_STUDENT", "heads"]
    model = tiny_model(f"{name}_era", *same, teacher=f"{name}_teacher")
    model.init_student_from_teacher()
    teacher = model.teacher.model.state_dict()
    for key, value in model.student.state_dict().items():
        if key.startswith("head."):
            assert torch.equal(value, teacher[key])
    with pytest.raises(UserError, match="INIT_STUDENT heads needs"):
        tiny_model("era", *same, teacher=f"{name}_teacher")


# ---- inference --------------------------------------------------------------------------------------------


def detections(results):
    return [(r.pred_boxes.tensor, r.scores, r.pred_classes) for r in results]


@both
def test_detecting_with_two_heads(name):
    """At alpha 1 it is the model with the teacher's head; at almost 0 the student; between neither."""
    torch.manual_seed(0)
    student, teacher = (loud(tiny_model(f"{name}_plain", seed=s).eval(), seed=s) for s in (0, 1))
    own, other = detector_of(student), detector_of(teacher)
    own.set_score_threshold(0.5)
    inputs = batch((1, 1))

    def shifted(features, images=None):
        return {k: v + 0.1 for k, v in features.items()}

    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = student.backbone

        def forward(self, images):
            return shifted(self.inner(images))

        size_divisibility = student.backbone.size_divisibility
        padding_constraints = student.backbone.padding_constraints

    with torch.no_grad():
        whole = own.with_heads_of(other, Shifted())
        assert type(whole) is type(student) and not whole.training
        assert whole.head is not teacher.head and student.head is not whole.head
        expected = [r["instances"] for r in whole(inputs)]
        found = [r["instances"] for r in own.blended(other, shifted, 1.0)(inputs)]
        assert sum(map(len, found)) > 0
        for a, b in zip(detections(found), detections(expected), strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y)
        raw = own.detect(inputs, do_postprocess=False)
        nearly = own.blended(other, shifted, 1e-12)(inputs, False)
        for a, b in zip(detections(raw), detections(nearly), strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y)
        middle = own.blended(other, shifted, 0.5)(inputs, False)
        assert len(middle[0]) != len(raw[0]) or not torch.equal(middle[0].scores, raw[0].scores)
        for scaled, unscaled in zip(own.detect(inputs), raw, strict=True):
            kept = set(scaled["instances"].scores.tolist())  # boxes outside the picture are gone
            assert kept and kept <= set(unscaled.scores.tolist())


@both
def test_blended_outputs_by_hand(name, monkeypatch):
    """What is decoded is ``0.7 own + 0.3 teacher's`` of every output."""
    student, teacher = (loud(tiny_model(f"{name}_plain").eval(), seed=s) for s in (0, 1))
    own, other = detector_of(student), detector_of(teacher)
    seen = []
    monkeypatch.setattr(
        type(student),
        "forward_inference",
        lambda self, images, maps, output: seen.append(output) or [],
    )
    with torch.no_grad():
        own.blended(other, lambda features, images: features, 0.3)(batch((1,)), False)
        maps = own.maps(batch((1,)))
        pairs = zip(own.head_output(maps), other.head_output(maps), seen[0], strict=True)
        for mine, theirs, mixed in pairs:
            for a, b, c in zip(mine, theirs, mixed, strict=True):
                torch.testing.assert_close(c, 0.7 * a + 0.3 * b)


@both
def test_alpha_of_a_distiller(name):
    opts = ["MODEL.ERA.ALPHA", "1.0", "MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "1.0"]
    model = tiny_model(f"{name}_era", *opts, teacher=f"{name}_teacher").eval()
    loud(model.teacher.model)
    with torch.no_grad():
        found = model(batch((1,)))[0]["instances"]
        deployed = model.deployable()(batch((1,)))[0]["instances"]
    assert len(found) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, deployed.pred_boxes.tensor)
    torch.testing.assert_close(found.scores, deployed.scores)


def test_group_norm_heads_build_and_train():
    """FCOS as it is by default, with norms in its head."""
    cfg = tiny_cfg("fcos_plain", "MODEL.FCOS.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "64")
    model = build_model(cfg)
    assert any(isinstance(m, torch.nn.GroupNorm) for m in model.head.modules())
    losses, _ = losses_of(model, batch())
    assert losses.keys() == LOSSES["fcos"]
