"""CWD: the loss by hand and against numpy in float64, and what it does not see."""

import math

import numpy as np
import pytest
import torch
from builders import tiny_model
from numpy_maps import softmax
from torch import nn

from era.errors import UserError
from era.methods.cwd import CWD, cwd_loss


def test_by_hand():
    """Over two positions p = (3/4, 1/4) against (1/2, 1/2) in one channel, equal ones in the other:
    (3/4 ln 3/2 + 1/4 ln 1/2) / 2."""
    teacher = torch.tensor([[[[math.log(3.0), 0.0]], [[5.0, 5.0]]]])
    student = torch.tensor([[[[7.0, 7.0]], [[0.0, 0.0]]]])
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert cwd_loss(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_against_numpy_on_random_maps(tau):
    """Over the positions of each channel of each image, a mean over images and channels."""
    draw = np.random.default_rng(0)
    student, teacher = draw.normal(0, 3, (2, 5, 4, 6)), draw.normal(1, 2, (2, 5, 4, 6))
    p, q = (softmax(maps / tau, axis=(2, 3)) for maps in (teacher, student))
    expected = tau**2 * np.mean(np.sum(p * np.log(p / q), axis=(2, 3)))
    found = cwd_loss(torch.from_numpy(student), torch.from_numpy(teacher), tau)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_a_channels_mean_does_not_matter_and_equal_maps_are_at_distance_0():
    a, b = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    shift = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(cwd_loss(a + shift, b, 1.0), cwd_loss(a, b, 1.0))
    assert cwd_loss(a + shift, a, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_no_gradient_into_the_teacher_and_finite_in_half():
    student = torch.randn(1, 2, 4, 4, requires_grad=True)
    teacher = torch.randn(1, 2, 4, 4, requires_grad=True)
    cwd_loss(student, teacher, 1.0).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    large = cwd_loss(student.half() * 30000, teacher.half(), 0.1)  # over 65504 once divided
    assert large.dtype == torch.float32 and torch.isfinite(large)


def test_maps_of_other_shape_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        cwd_loss(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3), 1.0)


def test_levels_are_summed_and_share_a_conv_where_widths_differ():
    maps = {"p3": torch.randn(2, 3, 4, 4), "p4": torch.randn(2, 3, 2, 2)}
    other = {"p3": torch.randn(2, 3, 4, 4), "p4": torch.randn(2, 3, 2, 2)}
    equal = CWD(levels=["p3", "p4"], weight=1.0, temperature=2.0, channels=(3, 3))
    expected = cwd_loss(maps["p3"], other["p3"], 2.0) + cwd_loss(maps["p4"], other["p4"], 2.0)
    torch.testing.assert_close(equal.feature_loss(maps, other), expected)
    assert not list(equal.parameters())
    unequal = CWD(levels=["p3", "p4"], weight=1.0, temperature=2.0, channels=(3, 5))
    assert isinstance(unequal.adapter, nn.Conv2d) and len(list(unequal.parameters())) == 2


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_a_temperature_that_is_none(value):
    with pytest.raises(UserError, match=r"MODEL\.CWD\.TEMPERATURE is .*: expected a finite number"):
        tiny_model("era", "MODEL.DISTILLER.METHODS", "('CWD',)", "MODEL.CWD.TEMPERATURE", value)
