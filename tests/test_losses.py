"""The pure losses: numbers worked by hand, identities, empty input, half precision."""

import math

import pytest
import torch

from era.losses import kd_loss, level_mean, mse
from era.methods.era.losses import residual_mse


def test_mse_by_hand():
    estimate = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    target = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert mse(estimate, target).item() == pytest.approx((0 + 4 + 9 + 16) / 4)


def test_mse_refuses_to_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        mse(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 1))


def test_levels_count_alike():
    # 100 positions of error 1 and 1 position of error 3: (1 + 9) / 2, not (100 + 9) / 101
    values = [mse(torch.ones(1, 1, 10, 10), torch.zeros(1, 1, 10, 10))]
    values.append(mse(torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 1, 1, 1)))
    assert level_mean(values).item() == pytest.approx(5.0)
    with pytest.raises(ValueError, match="no level"):
        level_mean([])


def test_residual_identity_and_gradient():
    """MSE(d_i, F_T - e_{i-1}) = MSE(e_i, F_T) in value, with the gradient on d_i alone."""
    residual, previous, target = (torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(3))
    loss = residual_mse(residual, previous, target)
    assert loss.item() == pytest.approx(mse(previous + residual, target).item(), rel=1e-6)
    loss.backward()
    expected = 2 * (residual + previous - target) / residual.numel()
    torch.testing.assert_close(residual.grad, expected.detach())
    assert previous.grad is None and target.grad is None


def test_kd_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    student = torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kd_loss(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    # at tau = 2 the teacher is (sqrt 3, 1) / (sqrt 3 + 1), and the loss is scaled by 4
    p = math.sqrt(3) / (math.sqrt(3) + 1)
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert kd_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_kd_is_zero_for_equal_logits_and_averages_rows():
    logits = torch.randn(6, 9)
    assert kd_loss(logits, logits + 3.0, 1.5).item() == pytest.approx(0, abs=1e-6)
    other = torch.randn(6, 9)
    rows = torch.stack([kd_loss(other[i : i + 1], logits[i : i + 1], 1.5) for i in range(6)])
    torch.testing.assert_close(kd_loss(other, logits, 1.5), rows.mean())


def test_kd_gives_the_teacher_no_gradient():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    kd_loss(student, teacher, 1.0).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: mse(x.reshape(0, 3, 2, 2), torch.zeros(0, 3, 2, 2)),
        lambda x: kd_loss(x.reshape(0, 5), torch.zeros(0, 5), 1.0),
    ],
    ids=["mse", "kd"],
)
def test_nothing_to_compare_is_a_connected_zero(loss):
    x = torch.zeros(0, requires_grad=True)
    value = loss(x)
    assert value.item() == 0
    value.backward()  # a disconnected zero would fail here


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_compared_in_float32(dtype):
    estimate, target = (torch.full((1, 1, 2, 2), v, dtype=dtype) for v in (300.0, 0.0))
    assert mse(estimate, target).item() == 90000.0  # beyond float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mse(estimate, target).dtype == torch.float32
    assert kd_loss(torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3), 1.0).dtype == torch.float32
