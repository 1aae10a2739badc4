"""PKD: the loss against numpy in float64 and by hand, and its gradients."""

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_model

from era.methods.pkd import pkd_loss

PKD = ["MODEL.DISTILLER.METHODS", "('PKD',)", "MODEL.PKD.LEVELS", "['p3', 'p4', 'p5']"]


def test_one_minus_pearson_by_hand():
    """Channels of correlation 1, -1 and 0: the mean of 0, 2 and 1."""
    student = torch.tensor([[[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], [[1.0, 0.0, 1.0]]]])
    teacher = torch.tensor([[[[2.0, 4.0, 6.0]], [[9.0, 5.0, 1.0]], [[0.0, 5.0, 10.0]]]])
    assert pkd_loss(student, teacher).item() == pytest.approx(1.0, abs=1e-6)


def test_against_numpy_on_random_maps():
    """Over images and positions, not over one image: numpy's own correlation, in float64."""
    draw = np.random.default_rng(0)
    student, teacher = draw.normal(1, 3, (2, 5, 4, 6)), draw.normal(-2, 0.5, (2, 5, 4, 6))
    teacher += 0.3 * student
    rows = zip(*(x.transpose(1, 0, 2, 3).reshape(5, -1) for x in (student, teacher)), strict=True)
    expected = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in rows])
    found = pkd_loss(torch.from_numpy(student), torch.from_numpy(teacher))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_mean_and_scale_of_a_channel_do_not_matter():
    a, b = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    scale, shift = torch.rand(1, 3, 1, 1) + 0.5, torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(pkd_loss(a * scale + shift, b), pkd_loss(a, b))
    assert pkd_loss(a * scale + shift, a).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 2, 3, 3)], ids=["one element", "constant"])
def test_a_channel_without_variance_has_a_finite_gradient(shape):
    student = torch.ones(shape, requires_grad=True)
    pkd_loss(student, torch.randn(shape)).backward()
    assert torch.isfinite(student.grad).all()


def test_no_gradient_into_the_teacher_and_float32_from_half():
    student = torch.randn(1, 2, 4, 4, requires_grad=True)
    teacher = torch.randn(1, 2, 4, 4, requires_grad=True)
    pkd_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    assert pkd_loss(student.half() * 300, teacher.half()).dtype == torch.float32


@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_the_method_sums_its_levels(objects):
    model = tiny_model("era", *PKD, "MODEL.PKD.WEIGHT", "3.0")
    losses, _ = losses_of(model, batch(objects))
    images = model.student.preprocess_image(batch(objects)).tensor
    with torch.no_grad():
        own = model.student.backbone(images)
        other = model.teacher.features(batch(objects), own, images.shape[-2:])
    expected = 3 * sum(pkd_loss(own[p], other[p]) for p in ("p3", "p4", "p5"))
    torch.testing.assert_close(losses["loss_pkd_feature"], expected)


def test_gradients_reach_student_and_adapter_and_no_teacher():
    model = tiny_model("era", *PKD, teacher_opts=["MODEL.FPN.OUT_CHANNELS", "24"])
    losses, _ = losses_of(model, batch())
    losses["loss_pkd_feature"].backward()
    assert all(p.grad is not None for p in model.methods["pkd"].adapter.parameters())
    assert any(p.grad is not None for p in model.student.backbone.parameters())
    assert all(p.grad is None for p in model.student.roi_heads.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())
