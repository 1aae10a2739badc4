"""Methods on dense detectors, and between families: what serves is trained, what does not is one sentence."""

import numpy as np
import pytest
import torch
from builders import TINY, TINY_TEACHER, TOY, batch, losses_of, tiny_model
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage

from era.config import load_config
from era.errors import UserError
from era.modeling.detectors import Predictions, detector_of
from era.modeling.detectors.retinanet import RetinaNet
from era.registry import METHOD_REGISTRY, forget_parts

FAMILIES = {"retinanet": "RetinaNet", "fcos": "FCOS"}
SERVED = ("crosskd", "cwd", "fgd", "mgd", "mimic", "mtpd", "pkd", "residualkd", "reviewkd", "tred")
SOFTMAX = "whose classes are independent sigmoids"
REFUSED = {
    "crld": SOFTMAX, "dist": SOFTMAX, "dkd": SOFTMAX, "gdkd": SOFTMAX, "gdkd3": SOFTMAX, "kd": SOFTMAX, "r2kd": SOFTMAX,
    "sskd": SOFTMAX, "dskd": r"MODEL\.DSKD\.KD_WEIGHT above 0 needs a softmax",
    "okdhp": "OKDHP needs a two-stage detector", "rdd": r"MODEL\.RDD\.REWEIGHT is True",
    "tred_disentangle": r"MODEL\.TRED\.MMD_WEIGHT is above 0.*makes no vector",
}  # fmt: skip
DENSE_NODES = ("BACKBONE", "ANCHOR_GENERATOR", "RETINANET", "FCOS")


def cfg_of(method, student, teacher=None, *opts):
    """The toy config of a method, with a student of another family, and a teacher of a third.

    Args:
        student, teacher: ``retinanet``, ``fcos`` or ``rcnn``; the same where there is no teacher named.
    """
    cfg = load_config(str(TOY / "methods" / f"{method}.yaml"), TINY)
    if student != "rcnn":
        own = load_config(str(TOY / f"{student}_plain.yaml"), TINY)
        for node in DENSE_NODES:
            cfg.MODEL[node] = own.MODEL[node].clone()
        cfg.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE = FAMILIES[student]
    teacher = teacher or student
    name = "teacher.yaml" if teacher == "rcnn" else f"{teacher}_teacher.yaml"
    cfg.MODEL.TEACHER.CONFIG_FILE = str(TOY / name)
    cfg.MODEL.TEACHER.WEIGHTS = ""
    cfg.MODEL.TEACHER.ALLOW_RANDOM = True
    cfg.MODEL.TEACHER.OPTS = TINY_TEACHER
    cfg.merge_from_list(list(opts))
    forget_parts(cfg)
    return cfg


def trained(cfg, steps=2):
    """A distiller after some steps, and the losses of the last."""
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    with EventStorage(0):
        for step in range(steps):
            losses = model(batch((2, 0), seed=step))
            assert all(torch.isfinite(loss) for loss in losses.values())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    assert all(p.grad is None for p in model.teacher.parameters())
    return model, losses


@pytest.mark.parametrize(
    "method, family",
    [*((m, "retinanet") for m in SERVED), *((m, "fcos") for m in ("crosskd", "pkd", "residualkd"))],
)
def test_what_serves_a_dense_detector_is_trained(method, family):
    model, losses = trained(cfg_of(method, family))
    assert type(model.student).__name__ == FAMILIES[family]
    own = {name: loss for name, loss in losses.items() if name.startswith(f"loss_{method}_")}
    assert own and all(loss > 0 for loss in own.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", REFUSED)
def test_what_does_not_is_one_sentence(method, family):
    cfg = cfg_of(method, family)
    with pytest.raises(UserError, match=REFUSED[method]):
        build_model(cfg)


def test_rdd_refuses_a_divergence_of_sigmoids():
    cfg = cfg_of("rdd", "retinanet", None, "MODEL.RDD.REWEIGHT", False)
    with pytest.raises(UserError, match=r"RDD with MODEL\.RDD\.LAMBDA above 0 needs a softmax"):
        build_model(cfg)


# ---- student and teacher of two families ------------------------------------------------------------------

PAIRS = [("rcnn", "retinanet"), ("retinanet", "rcnn"), ("fcos", "retinanet")]


@pytest.mark.parametrize("student, teacher", PAIRS)
@pytest.mark.parametrize("method", ["cwd", "mgd", "mimic", "pkd", "reviewkd"])
def test_methods_of_the_fpn_teach_another_family(method, student, teacher):
    """The levels of the toy configs are p3 to p5, or to p6: both models have them."""
    model, losses = trained(cfg_of(method, student, teacher), steps=1)
    assert type(model.detector) is not type(model.teacher.detector)
    assert losses[f"loss_{method}_feature"] > 0


TWI_OF = {"rcnn": ("RPN_WEIGHT", "ROI_WEIGHT"), "retinanet": ("DENSE_WEIGHT",)}
LEVELS = ["MODEL.DISTILLER.METHODS", ["ERA"], "MODEL.ERA.LEVELS", ["p3", "p4", "p5", "p6"]]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_eras_feature_losses_teach_another_family(student, teacher):
    """With the weights of the teacher's own heads 0; those of heads that it lacks do not count."""
    off = [x for key in TWI_OF[teacher] for x in (f"MODEL.ERA.TWI.SOFT_{key}", 0.0)]
    model, losses = trained(cfg_of("pkd", student, teacher, *LEVELS, *off))
    assert type(model.detector) is not type(model.teacher.detector)
    assert {k for k in losses if "era" in k} == {"loss_era_feature", "loss_era_residual"}
    if student == "rcnn":
        assert losses.keys() >= {"loss_rpn_cls", "loss_cls"}


@pytest.mark.parametrize("student, teacher", PAIRS)
@pytest.mark.parametrize("kind", ["", "SOFT_"])
def test_its_heads_cannot_judge_another_family(student, teacher, kind):
    """The sentence names the weights to switch off."""
    keys = [f"MODEL.ERA.TWI.{kind}{key}" for key in TWI_OF[teacher]]
    off = [x for key in TWI_OF[teacher] for x in (f"MODEL.ERA.TWI.SOFT_{key}", 0.0)]
    cfg = cfg_of("pkd", student, teacher, *LEVELS, *off, *(x for key in keys for x in (key, 1.0)))
    with pytest.raises(UserError) as error:
        build_model(cfg)
    assert f"ERA with {' and '.join(keys)} above 0" in str(error.value)
    assert "switch that off" in str(error.value)
    cfg = cfg_of("pkd", student, teacher, *LEVELS, *off, "MODEL.ERA.ALPHA", 1.0)
    with pytest.raises(UserError, match=r"ERA with MODEL\.ERA\.ALPHA above 0"):
        build_model(cfg)


def test_levels_that_do_not_pair_are_one_sentence():
    cfg = cfg_of("mimic", "rcnn", "retinanet", "MODEL.MIMIC.LEVELS", ["p3", "p7"])
    with pytest.raises(
        UserError, match=r"MODEL\.MIMIC\.LEVELS.*the student's backbone has no \['p7'\]"
    ):
        build_model(cfg)


# ---- CrossKD's own case -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_crosskd_cuts_the_towers_and_spares_the_students_last_layers(family):
    name = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}[FAMILIES[family]]
    model = build_model(cfg_of("crosskd", family, None, f"MODEL.{name}.NUM_CONVS", 2))
    losses, _ = losses_of(model, batch((2, 1)))
    own = {k: v for k, v in losses.items() if "crosskd" in k}
    assert own.keys() == {"loss_crosskd_dense_class", "loss_crosskd_dense_box"}
    sum(own.values()).backward()
    reached = {n for n, p in model.student.head.named_parameters() if p.grad is not None}
    assert reached == {
        f"{tower}.0.{kind}"
        for tower in ("cls_subnet", "bbox_subnet")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_both_pieces_of_a_cut_head_are_the_head(family):
    student = tiny_model(f"{family}_plain")
    detector = detector_of(student)
    with detector.record() as recording:
        losses_of(student, batch((2, 1)))
    part = detector.head_parts["dense"]
    assert part.dense and part.channels == 16 and len(part.names) == 10
    own = part.own_hidden(recording)
    again = part.hidden(recording.features, recording)
    assert own.keys() == again.keys() == set(part.names)
    for key, value in own.items():
        torch.testing.assert_close(value, again[key])
    whole = detector.joined(recording.output)
    for a, b in zip(part.predict_hidden(own), whole, strict=True):
        torch.testing.assert_close(a, b)
    labels = torch.cat(recording.labels)
    assert torch.equal(part.own_logits(recording), whole.class_logits[labels >= 0])
    assert torch.equal(part.truth(recording), labels[labels >= 0])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def giou_distance(a, b):
    """``1 - GIoU`` of boxes (n, 4)."""
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    inside = np.clip(high - low, 0, None).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (a, b)]
    union = sum(areas) - inside
    hull = (np.maximum(a[:, 2:], b[:, 2:]) - np.minimum(a[:, :2], b[:, :2])).prod(1)
    return 1 - inside / union + (hull - union) / hull


def test_crosskd_of_a_dense_head_against_numpy():
    student = tiny_model("retinanet_plain")
    detector = detector_of(student)
    with detector.record() as recording:
        losses_of(student, batch((2,)))
    anchors = recording.anchor_boxes().double().numpy()
    draw = np.random.default_rng(0)
    z, target = draw.normal(-2, 2, (len(anchors), 8)), draw.normal(-2, 2, (len(anchors), 8))
    deltas, goal = draw.normal(0, 0.3, (2, len(anchors), 4))
    found = detector.head_parts["dense"].cross_losses(
        *(Predictions(*map(torch.from_numpy, x)) for x in ((z, deltas), (target, goal))),
        recording,
        1.0,
    )
    p, q = sigmoid(target), sigmoid(z)
    bce = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    weight = p.max(1)
    assert found["class"].item() == pytest.approx((np.abs(p - q) * bce).sum() / weight.sum())
    size = anchors[:, 2:] - anchors[:, :2]
    middle = anchors[:, :2] + size / 2

    def decoded(own):
        centre, extent = middle + own[:, :2] * size, np.exp(own[:, 2:]) * size
        return np.concatenate([centre - extent / 2, centre + extent / 2], 1)

    expected = (weight * giou_distance(decoded(deltas), decoded(goal))).sum() / weight.sum()
    assert found["box"].item() == pytest.approx(expected, rel=1e-5)


def test_a_head_of_other_activations_cannot_be_cut(monkeypatch):
    monkeypatch.setattr(RetinaNet, "cuts", {})
    with pytest.raises(
        UserError, match="the student, a RetinaNet, has no head 'dense' that can be cut"
    ):
        build_model(cfg_of("crosskd", "retinanet"))


@pytest.mark.parametrize("name, node", [("CrossKD", "CROSSKD"), ("ERA", "ERA.TWI")])
def test_weights_of_heads_that_the_student_lacks_are_no_losses_without_labels(name, node):
    """They are 1 by default, and ask for nothing of a Faster R-CNN."""
    keys = {"ERA.TWI": ("SOFT_RPN_WEIGHT", "SOFT_ROI_WEIGHT")}.get(
        node, [f"{part}_{term}_WEIGHT" for part in ("RPN", "ROI") for term in ("CLASS", "BOX")]
    )
    off = [x for key in keys for x in (f"MODEL.{node}.{key}", 0.0)]
    off += ["MODEL.ERA.FEATURE_WEIGHT", 0.0, "MODEL.ERA.RESIDUAL_WEIGHT", 0.0]
    method = METHOD_REGISTRY.get(name)
    assert method.needs(cfg_of("crosskd", "rcnn", None, *off)).labels
    assert not method.needs(cfg_of("crosskd", "retinanet", None, *off)).labels
