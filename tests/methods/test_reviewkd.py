"""ReviewKD: HCL by hand and against numpy in float64, the fusion against numpy, its order and norms."""

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_model
from numpy_maps import batch_norm, conv, pooled
from torch import nn

from era.errors import UserError
from era.methods.reviewkd import ABF, ReviewKD, hcl_loss
from era.methods.shared import norm_layer

OPTS = ["MODEL.DISTILLER.METHODS", "('ReviewKD',)", "MODEL.REVIEWKD.LEVELS", "['p3', 'p4', 'p5']"]


def test_hcl_by_hand():
    """Height 2: the grids of 4 and 2 are left out. MSE (9 + 1) / 4 = 2.5, and of the means 1 with weight 1/2, over
    1 1/2; of height 1 the MSE alone."""
    student = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]]]])
    assert hcl_loss(student, torch.zeros(1, 1, 2, 2)).item() == pytest.approx((2.5 + 0.5) / 1.5)
    assert hcl_loss(student[:, :, :1], torch.zeros(1, 1, 1, 2)).item() == pytest.approx(4.5)


@pytest.mark.parametrize("size, sides", [((8, 12), (4, 2, 1)), ((4, 8), (2, 1))])
def test_hcl_against_numpy_on_random_maps(size, sides):
    draw = np.random.default_rng(0)
    a, b = draw.normal(1, 3, (2, 5, *size)), draw.normal(-2, 2, (2, 5, *size))
    weights = [0.5 ** (i + 1) for i in range(len(sides))]
    expected = np.mean((a - b) ** 2) + sum(
        weight * np.mean((pooled(a, side) - pooled(b, side)) ** 2)
        for weight, side in zip(weights, sides, strict=True)
    )
    found = hcl_loss(torch.from_numpy(a), torch.from_numpy(b))
    assert found.item() == pytest.approx(expected / (1 + sum(weights)), rel=1e-9)


def test_fusion_and_order_against_numpy():
    """From the coarsest level on: norm of a 1x1 conv, gated with the coarser one's before its output conv, enlarged."""
    draw = np.random.default_rng(0)
    torch.manual_seed(0)
    method = ReviewKD(levels=["p3", "p4"], weight=1.0, channels=(3, 5), mid_channels=4, norm="BN")
    method.double()
    student = {"p3": draw.normal(1, 3, (2, 3, 8, 12)), "p4": draw.normal(0, 2, (2, 3, 4, 6))}
    fine, coarse = method.fusions["p3"], method.fusions["p4"]
    assert coarse.gates is None
    y = batch_norm(conv(student["p4"], coarse.enter[0]))
    x = batch_norm(conv(student["p3"], fine.enter[0]))
    enlarged = y.repeat(2, axis=2).repeat(2, axis=3)
    gates = 1 / (1 + np.exp(-conv(np.concatenate([x, enlarged], axis=1), fine.gates)))
    x = gates[:, :1] * x + gates[:, 1:] * enlarged
    maps = {k: torch.from_numpy(v) for k, v in student.items()}
    found_coarse, passed = coarse(maps["p4"])
    found_fine, _ = fine(maps["p3"], passed)
    pairs = ((found_fine, x, fine), (found_coarse, y, coarse))
    teacher = {"p3": torch.randn(2, 5, 8, 12).double(), "p4": torch.randn(2, 5, 4, 6).double()}
    expected = 0.0
    for (found, value, fusion), level in zip(pairs, ("p3", "p4"), strict=True):
        estimate = torch.from_numpy(batch_norm(conv(value, fusion.leave[0])))
        torch.testing.assert_close(found, estimate, rtol=1e-9, atol=1e-9)
        expected = expected + hcl_loss(estimate, teacher[level])
    torch.testing.assert_close(method.feature_loss(maps, teacher), expected)


def test_a_fine_level_hears_of_the_coarse_ones_and_not_the_other_way_round():
    method = ReviewKD(levels=["p3", "p4"], weight=1.0, channels=(3, 3), mid_channels=4, norm="BN")
    maps = {"p3": torch.randn(2, 3, 8, 8), "p4": torch.randn(2, 3, 4, 4, requires_grad=True)}
    maps["p3"].requires_grad_()
    estimate, passed = method.fusions["p4"](maps["p4"])
    estimate.square().sum().backward(retain_graph=True)
    assert maps["p3"].grad is None
    maps["p4"].grad = None
    method.fusions["p3"](maps["p3"], passed)[0].pow(3).sum().backward()
    assert maps["p4"].grad.abs().sum() > 0


def test_levels_in_any_order_are_fused_from_the_coarsest_on():
    first, _ = losses_of(tiny_model("era", *OPTS), batch())
    model = tiny_model("era", *OPTS, "MODEL.REVIEWKD.LEVELS", "['p4', 'p5', 'p3']")
    assert model.methods["reviewkd"].levels == ["p3", "p4", "p5"]
    other, _ = losses_of(model, batch())
    assert other == first


def test_hcl_sends_no_gradient_into_the_teacher_and_is_finite_in_half():
    student = torch.randn(1, 2, 4, 4, requires_grad=True)
    teacher = torch.randn(1, 2, 4, 4, requires_grad=True)
    hcl_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    assert hcl_loss(student, student).item() == 0
    large = hcl_loss(student.half() * 1000, teacher.half())  # squares over 65504
    assert large.dtype == torch.float32 and torch.isfinite(large)


@pytest.mark.parametrize(
    "norm, kind",
    [("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm), ("GN", nn.GroupNorm)],
)
def test_norms(norm, kind):
    fusion = ABF(3, 4, 5, fuses=True, norm=norm)
    assert type(fusion.enter[1]) is type(fusion.leave[1]) is kind


@pytest.mark.parametrize("channels, groups", [(256, 32), (64, 8), (16, 2), (17, 1), (3, 1)])
def test_groups_of_any_width(channels, groups):
    assert norm_layer("GN", channels).num_groups == groups


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_one_position_has_no_statistics_of_its_own(norm):
    """A sentence says so, as the norm's own error does not; GN has some."""
    opts = [*OPTS, "MODEL.REVIEWKD.LEVELS", "['p5', 'p6']"]  # p6 has a stride of 64 pixels
    with pytest.raises(UserError, match=f"NORM is {norm}, and p6 of a batch has a single position"):
        losses_of(tiny_model("era", *opts, "MODEL.REVIEWKD.NORM", norm), batch((2,)))
    losses, _ = losses_of(tiny_model("era", *opts, "MODEL.REVIEWKD.NORM", "GN"), batch((2,)))
    assert torch.isfinite(losses["loss_reviewkd_feature"])


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.REVIEWKD.MID_CHANNELS", 0], r"MID_CHANNELS is 0: expected at least 1 channel"),
        (["MODEL.REVIEWKD.NORM", "none"], r"NORM is 'none': expected one of BN, SyncBN, GN"),
    ],
)
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=rf"MODEL\.REVIEWKD\.{words}"):
        tiny_model("era", *OPTS, *opts)
