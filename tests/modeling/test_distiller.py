"""The meta-architecture: plain training unchanged, the teacher apart, every kind of batch, alpha."""

import copy

import pytest
import torch
from builders import batch, losses_of, tiny_cfg, tiny_model, train_history
from detectron2.modeling import GeneralizedRCNN
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks

ZERO = [
    "MODEL.ERA.FEATURE_WEIGHT", "0.0", "MODEL.ERA.RESIDUAL_WEIGHT", "0.0",
    "MODEL.ERA.KD_WEIGHT", "0.0", "MODEL.ERA.TWI.RPN_WEIGHT", "0.0", "MODEL.ERA.TWI.ROI_WEIGHT", "0.0",
]  # fmt: skip


NO_METHOD = ["MODEL.DISTILLER.METHODS", "[]", "MODEL.DISTILLER.INIT_STUDENT", "heads"]


@pytest.mark.parametrize("opts", [ZERO, NO_METHOD], ids=["zero", "none"])
def test_without_distillation_the_losses_are_the_plain_students_step_by_step(opts):
    assert train_history("era", *opts) == train_history("plain")


def test_distillation_changes_the_students_course():
    plain, distilled = train_history("plain"), train_history("era")
    assert distilled[0]["loss_cls"] == plain[0]["loss_cls"]  # the first forward is still the same
    assert distilled[-1]["loss_cls"] != plain[-1]["loss_cls"]


def test_the_teacher_stays_apart():
    """In eval, in no optimiser, in no state dict, with no module registered; but it follows to()."""
    model = tiny_model()
    assert model.train() is model and model.training
    assert not any(m.training for m in model.teacher.modules())
    assert model.teacher.train(True) is model.teacher and not model.teacher.training
    ids = {id(p) for p in model.teacher.parameters()}
    optimizer = build_optimizer(tiny_cfg(), model)
    assert not ids & {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not ids & {id(p) for p in model.parameters()}
    assert {key.split(".")[0] for key in model.state_dict()} == {"student", "methods"}
    before = copy.deepcopy(model.teacher.state_dict())
    losses, _ = losses_of(model, batch())
    sum(losses.values()).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    model.double()
    assert next(model.teacher.parameters()).dtype == torch.float64


@pytest.mark.parametrize("objects", [(0, 0), (2, 0), (1, 3)], ids=["empty", "half", "full"])
@pytest.mark.parametrize("kd", ["0.0", "1.0"])
def test_every_kind_of_batch(objects, kd):
    model = tiny_model("era", "MODEL.ERA.KD_WEIGHT", kd)
    losses, _ = losses_of(model, batch(objects))
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    model.eval()
    for alpha in (0.0, 0.5, 1.0):
        model.methods["era"].alpha = alpha
        with torch.no_grad():
            outputs = model(batch(objects))
        assert len(outputs) == 2 and all("instances" in o for o in outputs)


def test_images_of_two_sizes_and_odd_sides():
    inputs = batch((1,), size=(50, 75)) + batch((2,), size=(64, 33), seed=1)
    losses, _ = losses_of(tiny_model(), inputs)
    assert torch.isfinite(sum(losses.values()))


def test_a_mask_rcnn_student_keeps_its_masks():
    """Students are any GeneralizedRCNN with an FPN: the mask loss and the masks are still there."""
    options = ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
               "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"]  # fmt: skip
    model = tiny_model("era", *options)
    inputs = batch((2, 1))
    for item in inputs:
        item["instances"].gt_masks = BitMasks(torch.ones(len(item["instances"]), 64, 64))
    losses, _ = losses_of(model, inputs)
    assert {"loss_mask", "loss_era_twi_roi"} <= set(losses)
    sum(losses.values()).backward()
    model.eval()
    for alpha in (0.0, 1.0):
        model.methods["era"].alpha = alpha
        with torch.no_grad():
            found = model(inputs)[0]["instances"]
        assert len(found) > 0 and found.pred_masks.shape == (len(found), 64, 64)


def detections(model, inputs):
    model.eval()
    with torch.no_grad():
        return [o["instances"] for o in model(inputs)]


def assert_same_detections(found, expected):
    assert sum(map(len, expected)) > 0, "the comparison needs detections"
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


def test_alpha_zero_is_the_stock_student_bit_for_bit():
    model = tiny_model()
    student = tiny_model("plain", seed=5)
    student.load_state_dict(model.student.state_dict(), strict=True)
    assert type(model.student) is GeneralizedRCNN
    inputs = batch((1, 2))
    assert_same_detections(detections(model, inputs), detections(student, inputs))


def test_alpha_one_is_the_teachers_heads_on_the_estimate():
    """Without branches and with an identity adapter, alpha 1 is the student's backbone under the
    teacher's heads: a stock model of those parts finds the same."""
    opts = ["MODEL.ERA.NUM_BRANCHES", "0", "MODEL.ERA.SCALES", "[]"]
    model = tiny_model("era", *opts, "MODEL.ERA.ALPHA", "1.0")
    stock = tiny_model("plain", seed=9)
    stock.backbone.load_state_dict(model.student.backbone.state_dict())
    stock.proposal_generator.load_state_dict(model.teacher.model.proposal_generator.state_dict())
    stock.roi_heads.load_state_dict(model.teacher.model.roi_heads.state_dict())
    inputs = batch((1, 2))
    assert_same_detections(detections(model, inputs), detections(stock, inputs))


def test_blending_equal_heads_changes_nothing():
    """With the teacher's heads inherited and e_N = F_S, every alpha finds what the student finds."""
    opts = ["MODEL.ERA.NUM_BRANCHES", "0", "MODEL.ERA.SCALES", "[]"]
    model = tiny_model("era", *opts, "MODEL.DISTILLER.INIT_STUDENT", "heads")
    model.init_student_from_teacher()
    inputs = batch((1, 2))
    expected = detections(model, inputs)
    for alpha in (0.25, 1.0):
        model.methods["era"].alpha = alpha
        for a, b in zip(detections(model, inputs), expected, strict=True):
            torch.testing.assert_close(a.scores, b.scores)
            torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-3, rtol=0)


def test_blending_lies_between():
    """Half-way predictions are the mean of both ends: checked on the ROI logits themselves."""
    model = tiny_model()
    model.eval()
    era = model.methods["era"]
    seen = {}
    inputs = batch((1, 2))
    for alpha in (0.001, 0.5, 0.999):
        era.alpha = alpha
        detector = era.detector(model.detector)
        blend = detector._blend
        seen[alpha] = []

        def keep(predictions, blend=blend, kept=seen[alpha]):
            kept.append(blend(predictions))
            return kept[-1]

        detector._blend = keep
        with torch.no_grad():
            detector(inputs)
    # calls 0..4 are objectness by level; they do not depend on which proposals were chosen
    for level in range(5):
        ends = (seen[0.001][level] + seen[0.999][level]) / 2
        torch.testing.assert_close(seen[0.5][level], ends, atol=1e-5, rtol=1e-5)


def test_inheritance_copies_the_heads_and_nothing_else():
    model = tiny_model("era_init")
    backbone = copy.deepcopy(model.student.backbone.state_dict())
    model.init_student_from_teacher()
    for part in ("proposal_generator", "roi_heads"):
        own, teacher = (getattr(m, part).state_dict() for m in (model.student, model.teacher.model))
        assert own.keys() == teacher.keys() and len(own) > 0
        assert all(torch.equal(own[key], teacher[key]) for key in own)
    after = model.student.backbone.state_dict()
    assert all(torch.equal(after[key], backbone[key]) for key in backbone)
    own = next(model.student.roi_heads.parameters())
    assert own.requires_grad and own is not next(model.teacher.model.roi_heads.parameters())
