"""ResidualKD: the losses by hand and in numpy, whom they teach, the assistant's size, and inference with it."""

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_cfg, tiny_model
from detectron2.modeling import build_model

from era.errors import UserError
from era.methods.residualkd import build_assistant, mimic_loss, residual_loss
from era.modeling.distiller import needs_teacher

LEVELS = ["MODEL.RESIDUALKD.LEVELS", "['p3', 'p4', 'p5', 'p6']", "MODEL.RESIDUALKD.WIDTH", "0.5"]
OPTS = ["MODEL.DISTILLER.METHODS", "('ResidualKD',)", *LEVELS]
WIDER = ["MODEL.FPN.OUT_CHANNELS", "24"]  # of the teacher


def maps(*values):
    return [torch.tensor(v).reshape(1, 1, 1, -1) for v in values]


def test_both_losses_by_hand():
    """Levels of two and of one element: the mean over elements, then over levels."""
    student, assistant, teacher = (
        maps([1.0, 2.0], [0.0]),
        maps([1.0, 0.0], [1.0]),
        maps([2.0, 5.0], [3.0]),
    )
    assert mimic_loss(student, teacher).item() == pytest.approx(((1 + 9) / 2 + 9) / 2)
    # the residuals are 1, 3 and 3; the assistant says 1, 0 and 1
    assert residual_loss(student, assistant, teacher).item() == pytest.approx((9 / 2 + 4) / 2)


def test_against_numpy_on_random_maps():
    draw = np.random.default_rng(0)
    shapes = [(2, 3, 4, 6), (2, 3, 2, 3)]
    student, assistant, teacher = ([draw.normal(size=s) for s in shapes] for _ in range(3))
    tensors = [[torch.from_numpy(x) for x in xs] for xs in (student, assistant, teacher)]
    mimic = np.mean([np.mean((s - t) ** 2) for s, t in zip(student, teacher, strict=True)])
    pairs = zip(student, assistant, teacher, strict=True)
    residual = np.mean([np.mean((t - s - a) ** 2) for s, a, t in pairs])
    assert mimic_loss(tensors[0], tensors[2]).item() == pytest.approx(mimic, rel=1e-12)
    assert residual_loss(*tensors).item() == pytest.approx(residual, rel=1e-12)


def test_each_loss_teaches_its_own_network():
    student, assistant, teacher = ([torch.randn(1, 2, 3, 3, requires_grad=True)] for _ in range(3))
    mimic_loss(student, teacher).backward()
    assert student[0].grad.abs().sum() > 0 and teacher[0].grad is None
    student[0].grad = None
    residual_loss(student, assistant, teacher).backward()
    assert assistant[0].grad.abs().sum() > 0
    assert student[0].grad is None and teacher[0].grad is None


def test_half_precision_does_not_overflow():
    """Squares beyond float16, and a difference of its largest numbers."""
    big = [torch.full((1, 1, 2, 2), 6e4, dtype=torch.float16)]
    low = [-big[0]]
    zero = [torch.zeros_like(big[0])]
    for loss in (mimic_loss(low, big), residual_loss(low, zero, big)):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx((2 * 6e4) ** 2, rel=1e-3)


@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_the_method_compares_maps_of_the_same_pictures(objects):
    weights = ["MODEL.RESIDUALKD.FEATURE_WEIGHT", "3.0", "MODEL.RESIDUALKD.RESIDUAL_WEIGHT", "0.5"]
    model = tiny_model("era", *OPTS, *weights, teacher_opts=WIDER)
    losses, _ = losses_of(model, batch(objects))
    images, method = (
        model.student.preprocess_image(batch(objects)).tensor,
        model.methods["residualkd"],
    )
    with torch.no_grad():
        own = model.student.backbone(images)
        other = model.teacher.features(batch(objects), own, images.shape[-2:])
        residuals = method.assistant(images)
        own = [method.adapter(own[level]) for level in method.levels]
    other, residuals = ([x[level] for level in method.levels] for x in (other, residuals))
    torch.testing.assert_close(losses["loss_residualkd_feature"], 3 * mimic_loss(own, other))
    torch.testing.assert_close(
        losses["loss_residualkd_residual"], 0.5 * residual_loss(own, residuals, other)
    )


def test_gradients_reach_what_they_should_and_no_teacher():
    model = tiny_model("era", *OPTS, teacher_opts=WIDER)
    method = model.methods["residualkd"]
    losses, _ = losses_of(model, batch())
    losses["loss_residualkd_residual"].backward(retain_graph=True)
    assert all(p.grad is not None for p in method.assistant.parameters())
    assert all(p.grad is None for p in [*model.student.parameters(), *method.adapter.parameters()])
    method.zero_grad()
    losses["loss_residualkd_feature"].backward()
    assert all(p.grad is not None for p in method.adapter.parameters())
    assert all(p.grad is not None for p in model.student.backbone.parameters())
    assert all(p.grad is None for p in method.assistant.parameters())
    assert all(
        p.grad is None for p in [*model.student.roi_heads.parameters(), *model.teacher.parameters()]
    )


def test_under_autocast_the_losses_stay_float32():
    model = tiny_model("era", *OPTS, teacher_opts=WIDER)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = losses_of(model, batch())
    found = [x for name, x in losses.items() if name.startswith("loss_residualkd")]
    assert len(found) == 2
    assert all(x.dtype == torch.float32 and torch.isfinite(x) for x in found)


@pytest.mark.parametrize("levels", [["p4"], ["p3", "p5"], ["p4", "p6"], ["p6"]])
def test_every_weight_of_the_assistant_that_trains_has_a_gradient(levels):
    """Several processes wait for each other's gradients of all."""
    model = tiny_model("era", *OPTS, "MODEL.RESIDUALKD.LEVELS", str(levels))
    losses, _ = losses_of(model, batch())
    losses["loss_residualkd_residual"].backward()
    for name, p in model.methods["residualkd"].assistant.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_the_assistant_is_as_slim_as_its_budget():
    def size(model):
        return sum(p.numel() for p in model.parameters())

    whole, half = (
        tiny_model("era", *OPTS, "MODEL.RESIDUALKD.WIDTH", width) for width in ("1.0", "0.5")
    )
    assistants = [model.methods["residualkd"].assistant for model in (whole, half)]
    own = size(whole.student.backbone)
    assert size(assistants[0]) == own + size(assistants[0].projection)
    assert size(assistants[1]) < 0.3 * own
    assert assistants[1].fpn.output_shape()["p3"].channels == 8  # of 16


def test_weights_of_0_are_plain_training():
    zero = ["MODEL.RESIDUALKD.FEATURE_WEIGHT", "0.0", "MODEL.RESIDUALKD.RESIDUAL_WEIGHT", "0.0"]
    plain, _ = losses_of(tiny_model("plain"), batch())
    model = tiny_model("era", *OPTS, *zero, teacher_opts=WIDER)
    assert losses_of(model, batch())[0] == plain
    assert not any(p.requires_grad for p in model.methods.parameters())


def test_without_a_residual_loss_there_is_no_assistant():
    model = tiny_model("era", *OPTS, "MODEL.RESIDUALKD.RESIDUAL_WEIGHT", "0.0")
    losses, _ = losses_of(model, batch())
    assert "loss_residualkd_feature" in losses and "loss_residualkd_residual" not in losses
    assert not list(model.methods.parameters())


def test_with_another_method_the_losses_add_up():
    names, alone = ("ERA", "ResidualKD"), {}
    opts = [*LEVELS, "MODEL.ERA.LEVELS", "['p3', 'p4', 'p5', 'p6']"]
    model = tiny_model("era", "MODEL.DISTILLER.METHODS", str(names), *opts)
    for name in names:
        single = tiny_model("era", "MODEL.DISTILLER.METHODS", f"('{name}',)", *opts)
        alone |= losses_of(single, batch())[0]
        model.methods[name.lower()].load_state_dict(single.methods[name.lower()].state_dict())
    both, _ = losses_of(model, batch())
    assert both.keys() == alone.keys() and "loss_era_feature" in both
    torch.testing.assert_close(both, alone)


def test_the_trained_student_alone_detects_by_default():
    model = tiny_model("era", *OPTS).eval()
    with torch.no_grad():
        found, plain = model(batch()), model.student(batch())
    assert model.deployable() is model.student
    torch.testing.assert_close(
        found[0]["instances"].pred_boxes.tensor,
        plain[0]["instances"].pred_boxes.tensor,
        rtol=0,
        atol=0,
    )
    assert not any("assistant" in name for name in model.student.state_dict())


@pytest.mark.parametrize("wider", [[], WIDER], ids=["equal", "wider teacher"])
def test_at_alpha_1_an_ordinary_model_is_what_detects(wider):
    """S + A under the teacher's heads, by hand; then as one stock model."""
    model = tiny_model("era", *OPTS, "MODEL.RESIDUALKD.ALPHA", "1.0", teacher_opts=wider).eval()
    method, student = model.methods["residualkd"], model.student
    for m in (student, model.teacher.model):
        m.roi_heads.box_predictor.test_score_thresh = 0.0
    images = student.preprocess_image(batch()).tensor
    with torch.no_grad():
        own, residuals = student.backbone(images), method.assistant(images)
        expected = {level: method.adapter(own[level]) + residuals[level] for level in method.levels}
        deployed = model.deployable()
        found = deployed.backbone(images)
        torch.testing.assert_close(found, expected)
        a, b = model(batch()), deployed(batch())
    assert type(deployed) is type(student)
    assert deployed.backbone.output_shape()["p3"].channels == (24 if wider else 16)
    for one, other in zip(a, b, strict=True):
        assert len(one["instances"]) > 0
        torch.testing.assert_close(one["instances"].scores, other["instances"].scores)
        torch.testing.assert_close(
            one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor
        )


def test_between_the_heads_are_blended():
    """With an assistant that says 0 and the teacher's heads inherited, every alpha finds what the student finds."""
    inherit = ["MODEL.DISTILLER.INIT_STUDENT", "heads"]
    model = tiny_model("era", *OPTS, *inherit, "MODEL.RESIDUALKD.ALPHA", "0.5").eval()
    model.init_student_from_teacher()
    projection = model.methods["residualkd"].assistant.projection
    with torch.no_grad():
        projection.weight.zero_()
        found, plain = model(batch()), model.student(batch())
        projection.bias.fill_(5.0)
        moved = model(batch())
    scores = [x[0]["instances"].scores for x in (found, plain, moved)]
    torch.testing.assert_close(scores[0], scores[1])
    assert scores[2].shape != scores[1].shape or not torch.allclose(scores[2], scores[1])


def test_what_it_needs():
    method = type(tiny_model("era", *OPTS).methods["residualkd"])
    cfg = tiny_cfg("era", *OPTS)
    assert needs_teacher(cfg)
    assert not method.needs(cfg).teacher_at_inference and not method.needs(cfg).labels
    cfg.MODEL.RESIDUALKD.ALPHA = 1.0
    assert method.needs(cfg).teacher_at_inference
    with pytest.raises(UserError, match="both bring a detector"):
        both = ["MODEL.DISTILLER.METHODS", "('ERA', 'ResidualKD')", *LEVELS]
        build_model(
            tiny_cfg("era", *both, "MODEL.ERA.ALPHA", "1.0", "MODEL.RESIDUALKD.ALPHA", "1.0")
        )


@pytest.mark.parametrize(
    "opts, words",
    [
        (["FEATURE_WEIGHT", "-1.0"], r"FEATURE_WEIGHT is -1\.0"),
        (["RESIDUAL_WEIGHT", "1e400"], "RESIDUAL_WEIGHT is inf"),
        (["LEVELS", "[]"], "LEVELS is empty"),
        (["LEVELS", "['p9']"], r"LEVELS is \['p9'\].*student"),
        (["WIDTH", "0.0"], r"WIDTH is 0\.0"),
        (["WIDTH", "1.5"], r"WIDTH is 1\.5"),
        (["DEPTH", "50"], "DEPTH is 50: expected one of 10, 18, 34"),
        (["NORM", "FrozenBN"], "NORM is 'FrozenBN': expected one of BN, SyncBN"),
        (["ALPHA", "1.5"], r"ALPHA is 1\.5"),
        (["ALPHA", "1.0", "MODEL.RESIDUALKD.RESIDUAL_WEIGHT", "0.0"], "trains no assistant"),
        (["ALPHA", "1.0", "MODEL.RESIDUALKD.LEVELS", "['p3', 'p4', 'p5']"], r"also read \['p6'\]"),
    ],
)
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=words):
        tiny_model("era", *OPTS, f"MODEL.RESIDUALKD.{opts[0]}", *opts[1:])


def test_a_student_that_stands_on_other_stages():
    """A stand-in for a backbone of another kind, by its config."""
    cfg = tiny_cfg("era", *OPTS)
    student = tiny_model("plain")
    cfg.MODEL.FPN.IN_FEATURES = ["stage2", "stage3"]
    with pytest.raises(UserError, match=r"MODEL\.FPN\.IN_FEATURES is \['stage2', 'stage3'\]"):
        build_assistant(cfg, student, 16)
