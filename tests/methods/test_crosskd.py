"""CrossKD: the losses against numpy in float64 and by hand, where gradients go, the cut, and beside ERA."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_model
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import nn

from era.errors import UserError
from era.losses import quality_bce
from era.methods.crosskd import restandardised
from era.modeling.detectors import Predictions, detector_of
from era.modeling.detectors.rcnn_parts import cross_anchor_losses, cross_proposal_losses

CROSS = ["MODEL.DISTILLER.METHODS", "('CrossKD',)"]
PREFIX = "MODEL.CROSSKD."
KEYS = {
    "rpn_class": "RPN_CLASS_WEIGHT",
    "rpn_box": "RPN_BOX_WEIGHT",
    "roi_class": "ROI_CLASS_WEIGHT",
    "roi_box": "ROI_BOX_WEIGHT",
}
OFF = [x for key in KEYS.values() for x in (PREFIX + key, "0.0")]
WIDER = ["MODEL.FPN.OUT_CHANNELS", "24", "MODEL.ROI_BOX_HEAD.FC_DIM", "40"]


# ---- the pure functions -----------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bce(z, p):
    return -(p * np.log(sigmoid(z)) + (1 - p) * np.log(1 - sigmoid(z)))


def giou(a, b):
    """Of two boxes, from areas."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


def test_quality_bce_by_hand():
    """p_T = 3/4 and p = 1/2: 1/4 ln 2, with the gradient of both factors; 0 where they are equal."""
    logits = torch.tensor([0.0, 1.3], requires_grad=True)
    target = torch.tensor([math.log(3.0), 1.3], requires_grad=True)
    value = quality_bce(logits, target)
    assert value.tolist() == pytest.approx([0.25 * math.log(2), 0.0])
    value.sum().backward()
    # d|p_T - p|/dz = -p(1 - p), dBCE/dz = p - p_T
    assert logits.grad.tolist() == pytest.approx([-0.25 * math.log(2) - 0.25 * 0.25, 0.0])
    assert target.grad is None


def test_restandardised_by_hand_and_against_numpy():
    """Deviation 1 and mean 0 become 3 and 7; over images and positions, or over samples, never over channels."""
    student = torch.tensor([[-1.0], [1.0]])
    assert restandardised(student, torch.tensor([[4.0], [10.0]])).tolist() == [[4.0], [10.0]]
    draw = np.random.default_rng(0)
    for shape in ((2, 3, 4, 5), (6, 3)):
        a, b = draw.normal(1, 3, shape), draw.normal(-2, 0.5, shape)
        others = tuple(i for i in range(len(shape)) if i != 1)
        moments = {"axis": others, "keepdims": True}
        scale = b.std(**moments) / a.std(**moments)
        expected = (a - a.mean(**moments)) * scale + b.mean(**moments)
        found = restandardised(torch.from_numpy(a), torch.from_numpy(b))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_restandardised_has_finite_gradients_and_is_float32():
    student = torch.ones(4, 2, requires_grad=True)
    teacher = torch.randn(4, 2, requires_grad=True)
    restandardised(student, teacher).square().sum().backward()
    assert torch.isfinite(student.grad).all() and teacher.grad is None
    halves = (torch.randn(8, 2) * 300).half(), (torch.randn(8, 2) * 300).half()
    found = restandardised(*halves)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, restandardised(*(x.float() for x in halves)))
    none = torch.zeros(0, 3, requires_grad=True)
    assert restandardised(none, torch.zeros(0, 3)).sum().requires_grad


@pytest.mark.parametrize("shift", [2.0, -6.0], ids=["sum above 1", "sum below 1"])
def test_anchor_losses_against_numpy(shift):
    draw = np.random.default_rng(1)
    z, target = draw.normal(0, 2, 7), draw.normal(shift, 1, 7)
    boxes, target_boxes = (draw.uniform(0, 20, (7, 4)) for _ in range(2))
    for own in (boxes, target_boxes):
        own[:, 2:] = own[:, :2] + 1 + own[:, 2:]
    p = sigmoid(target)
    count = max(p.sum(), 1)
    assert (count == 1) == (shift < 0)
    found = cross_anchor_losses(*map(torch.from_numpy, (z, boxes, target, target_boxes)))
    expected = (np.abs(p - sigmoid(z)) * bce(z, p)).sum() / count
    assert found["class"].item() == pytest.approx(expected, rel=1e-9)
    pairs = zip(p, boxes, target_boxes, strict=True)
    expected = sum(w * (1 - giou(a, b)) for w, a, b in pairs) / count
    assert found["box"].item() == pytest.approx(expected, rel=1e-6)


def decoded(deltas, proposal):
    """One box of R-CNN deltas of weights (10, 10, 5, 5)."""
    width, height = proposal[2] - proposal[0], proposal[3] - proposal[1]
    x = (proposal[0] + proposal[2]) / 2 + deltas[0] / 10 * width
    y = (proposal[1] + proposal[3]) / 2 + deltas[1] / 10 * height
    width, height = width * np.exp(deltas[2] / 5), height * np.exp(deltas[3] / 5)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


@pytest.mark.parametrize("slots", [3, 1], ids=["boxes by class", "class agnostic"])
@pytest.mark.parametrize("is_sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_proposal_losses_against_numpy(is_sigmoid, slots):
    draw = np.random.default_rng(2)
    z, target = draw.normal(0, 2, (5, 4)), draw.normal(0, 2, (5, 4))
    deltas, target_deltas = draw.normal(0, 1, (5, 4 * slots)), draw.normal(0, 1, (5, 4 * slots))
    proposals = draw.uniform(0, 20, (5, 4))
    proposals[:, 2:] += 20
    head = SimpleNamespace(
        use_sigmoid_ce=is_sigmoid, box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    )
    found = cross_proposal_losses(
        head,
        Predictions(torch.from_numpy(z), torch.from_numpy(deltas)),
        Predictions(torch.from_numpy(target), torch.from_numpy(target_deltas)),
        torch.from_numpy(proposals),
        3.0,
    )

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(1, keepdims=True)

    p = (sigmoid(target) if is_sigmoid else softmax(target))[:, :3]
    scores, classes = p.max(1), p.argmax(1)
    count = max(scores.sum(), 1)
    if is_sigmoid:
        own = z[:, :3]
        expected = (np.abs(p - sigmoid(own)) * bce(own, p)).sum() / count
    else:
        a, b = softmax(target / 3), softmax(z / 3)
        expected = 9 * (a * np.log(a / b)).sum(1).mean()
    assert found["class"].item() == pytest.approx(expected, rel=1e-9)
    expected = 0
    for r, c in enumerate(classes if slots == 3 else [0] * 5):
        part = slice(4 * c, 4 * c + 4)
        boxes = (decoded(x[r, part], proposals[r]) for x in (deltas, target_deltas))
        expected += scores[r] * (1 - giou(*boxes))
    assert found["box"].item() == pytest.approx(expected / count, rel=1e-5)


def test_nothing_to_compare_is_a_connected_0():
    head = SimpleNamespace(
        use_sigmoid_ce=False, box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    )
    own = Predictions(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 12, requires_grad=True))
    found = cross_proposal_losses(head, own, Predictions(*own), torch.zeros(0, 4), 3.0)
    logits, boxes = torch.zeros(0, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    for terms in (found, cross_anchor_losses(logits, boxes, logits, boxes)):
        for value in terms.values():
            assert value == 0 and value.requires_grad


def test_logits_that_overflow_half_precision_are_finite():
    huge = torch.tensor([60000.0, -60000.0]).half()
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_anchor_losses(huge, boxes, -huge, boxes)
    assert found["class"].dtype == torch.float32
    assert found["class"].item() == pytest.approx(2 * 60000, rel=1e-3) and found["box"] == 0


# ---- the cut ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts", [[], ["MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"]]
)
def test_both_pieces_together_are_the_head(opts):
    """For both parts, on the model's own maps; and the student's own hidden tensors are those of the first piece."""
    model = tiny_model("plain", *opts)
    detector = detector_of(model)
    with detector.record() as recording:
        losses_of(model, batch())
    assert list(detector.head_parts) == ["rpn", "roi"]
    for name, part in detector.head_parts.items():
        hidden = part.hidden(recording.features, recording)
        torch.testing.assert_close(part.own_hidden(recording), hidden)
        assert {x.shape[1] for x in hidden.values()} == {part.channels}
        assert {x.dim() for x in hidden.values()} == {4 if part.dense else 2}
        expected = detector.soft_targets(name, recording.features, recording)
        torch.testing.assert_close(part.predict_hidden(hidden), expected)
    assert hidden["fc1"].min() < 0, "before the ReLU"


# ---- the method -------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_the_method_by_definition(objects):
    """From public parts: the teacher's RPN and the rest of its box head, written out."""
    model = tiny_model("era", *CROSS, PREFIX + "RPN_BOX_WEIGHT", "2.0")
    inputs = batch(objects)
    with model.detector.record() as recording:
        losses_of(model.student, inputs)
    found, _ = losses_of(model, inputs)
    teacher = model.teacher.model
    with torch.no_grad():
        size = recording.images.tensor.shape[-2:]
        maps = model.teacher.features(inputs, recording.features, size)
        rpn = teacher.proposal_generator
        crossed = [restandardised(recording.features[p], maps[p]) for p in rpn.in_features]
        outputs = [rpn.rpn_head(x) for x in (crossed, [maps[p] for p in rpn.in_features])]
        logits, boxes = [], []
        for one in outputs:
            logits.append(torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in one[0]], 1))
            deltas = [x.permute(0, 2, 3, 1).reshape(len(inputs), -1, 4) for x in one[1]]
            anchors = torch.cat([x.tensor for x in recording.anchors])
            deltas = torch.cat(deltas, 1)
            boxes.append([rpn.box2box_transform.apply_deltas(x, anchors) for x in deltas])
        terms = cross_anchor_losses(
            logits[0].flatten(), torch.cat(boxes[0]), logits[1].flatten(), torch.cat(boxes[1])
        )
        torch.testing.assert_close(found["loss_crosskd_rpn_class"], terms["class"])
        torch.testing.assert_close(found["loss_crosskd_rpn_box"], 2 * terms["box"])
        heads = teacher.roi_heads
        pooled = heads.box_pooler(
            [maps[p] for p in heads.box_in_features],
            [p.proposal_boxes for p in recording.proposals],
        )
        first, second = heads.box_head.fc1, heads.box_head.fc2
        goal = first(pooled.flatten(1))
        own = model.student.roi_heads.box_head.fc1(recording.roi_features.flatten(1))
        predictions = [
            Predictions(*heads.box_predictor(second(x.relu()).relu()))
            for x in (restandardised(own, goal), goal)
        ]
        proposals = torch.cat([p.proposal_boxes.tensor for p in recording.proposals])
        terms = cross_proposal_losses(heads.box_predictor, *predictions, proposals, 3.0)
    torch.testing.assert_close(found["loss_crosskd_roi_class"], 0.5 * terms["class"])
    torch.testing.assert_close(found["loss_crosskd_roi_box"], terms["box"])
    assert all(torch.isfinite(x) for x in found.values())


def test_a_student_that_is_its_teacher_has_no_loss():
    same = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"]
    frozen = ["MODEL.RESNETS.NORM", "FrozenBN"]
    model = tiny_model("era", *CROSS, *same, *frozen, teacher_opts=frozen)
    model.student.load_state_dict(model.teacher.model.state_dict())
    losses, _ = losses_of(model, batch())
    for name in KEYS:
        assert losses[f"loss_crosskd_{name}"].item() == pytest.approx(0, abs=1e-4), name


def test_weight_0_is_plain_training_and_leaves_a_term_out():
    plain, _ = losses_of(tiny_model("plain"), batch())
    model = tiny_model("era", *CROSS, *OFF)
    assert not list(model.methods["crosskd"].parameters())
    assert losses_of(model, batch())[0] == plain
    for name, key in KEYS.items():
        found, _ = losses_of(tiny_model("era", *CROSS, *OFF, PREFIX + key, "1.0"), batch())
        assert found.keys() - plain.keys() == {f"loss_crosskd_{name}"}


@pytest.mark.parametrize("part", ["rpn", "roi"])
def test_gradients_reach_the_student_up_to_the_cut_and_no_teacher(part):
    model = tiny_model("era", *CROSS, teacher_opts=WIDER)
    losses, _ = losses_of(model, batch())
    (losses[f"loss_crosskd_{part}_class"] + losses[f"loss_crosskd_{part}_box"]).backward()
    adapters = model.methods["crosskd"].adapters
    assert type(adapters["rpn"]) is nn.Conv2d and type(adapters["roi"]) is nn.Linear
    for name, adapter in adapters.items():
        assert all((p.grad is not None) == (name == part) for p in adapter.parameters())
    student = model.student
    assert any(p.grad is not None for p in student.backbone.parameters())
    assert all(p.grad is None for p in student.proposal_generator.parameters())
    reached = {name for name, p in student.roi_heads.named_parameters() if p.grad is not None}
    assert reached == ({"box_head.fc1.weight", "box_head.fc1.bias"} if part == "roi" else set())
    assert all(p.grad is None for p in model.teacher.parameters())


def test_it_needs_no_labels():
    """A picture without labels, which the teacher's detections choose the proposals of, gives all terms."""
    model = tiny_model("era", *CROSS)
    assert model.label_free == ("crosskd",)
    inputs = batch((2, 1))
    inputs[1]["unlabeled"] = True
    losses, _ = losses_of(model, inputs)
    sum(losses[f"loss_crosskd_{name}"] for name in KEYS).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    assert all(p.grad is None for p in model.teacher.parameters())


def test_with_era_the_losses_add_up():
    alone = {}
    for methods in ("('ERA',)", "('CrossKD',)"):
        model = tiny_model("era", "MODEL.DISTILLER.METHODS", methods)
        alone |= losses_of(model, batch())[0]
    both, _ = losses_of(tiny_model("era", "MODEL.DISTILLER.METHODS", "('ERA', 'CrossKD')"), batch())
    assert (
        both.keys() == alone.keys() and {"loss_era_feature", "loss_crosskd_rpn_box"} < both.keys()
    )
    torch.testing.assert_close(both, alone)


def test_half_precision_stays_finite():
    model = tiny_model("era", *CROSS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = losses_of(model, batch())
    for name in KEYS:
        value = losses[f"loss_crosskd_{name}"]
        assert value.dtype == torch.float32 and torch.isfinite(value)


@pytest.mark.parametrize(
    "opts, words",
    [
        ([PREFIX + "RPN_BOX_WEIGHT", "-1.0"], r"MODEL\.CROSSKD\.RPN_BOX_WEIGHT is -1\.0"),
        ([PREFIX + "TEMPERATURE", "0.0"], r"MODEL\.CROSSKD\.TEMPERATURE is 0\.0"),
        (
            ["MODEL.ROI_BOX_HEAD.NUM_FC", "0", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1"],
            r"ROI_CLASS_WEIGHT or _BOX_WEIGHT is above 0, and the student, a RCNN, has no head 'roi'",
        ),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64]]"], "anchors differ"),
    ],
)
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=words):
        tiny_model("era", *CROSS, *opts)
