"""MBRNet: shapes, inputs of the branches, projections, and the estimates."""

import pytest
import torch
from torch import nn

from era.methods.era.mbrnet import FeatureEstimator, MBRNet


def linear_mbrnet(gains, accumulated):
    """Branches that multiply their input by a number, so that outputs can be worked by hand."""
    net = MBRNet(
        in_channels=1,
        out_channels=1,
        num_branches=len(gains),
        num_blocks=1,
        norm="none",
        accumulated_inputs=accumulated,
    )
    for branch, gain in zip(net.branches, gains, strict=True):
        nn.init.constant_(branch[0].weight, gain)
    return net


@pytest.mark.parametrize(
    "accumulated, expected",
    [
        (False, [2.0, 3.0, 5.0]),  # every branch reads F_S = 1
        (True, [2.0, 9.0, 60.0]),  # x = 1, 1 + 2, 1 + 2 + 9
    ],
    ids=["parallel", "accumulated"],
)
def test_what_a_branch_reads(accumulated, expected):
    net = linear_mbrnet([2.0, 3.0, 5.0], accumulated)
    outputs = net(torch.ones(1, 1, 1, 1))
    assert [o.item() for o in outputs] == expected


@pytest.mark.parametrize("norm", ["none", "BN", "SyncBN", "GN"])
@pytest.mark.parametrize("kernel_size, hidden", [(1, 0), (3, 5)])
def test_shapes_and_norms(norm, kernel_size, hidden):
    net = MBRNet(
        in_channels=8,
        out_channels=12,
        num_branches=3,
        num_blocks=3,
        kernel_size=kernel_size,
        hidden_channels=hidden,
        norm=norm,
    )
    outputs = net(torch.randn(2, 8, 6, 7))
    assert [o.shape for o in outputs] == [(2, 12, 6, 7)] * 3
    kinds = {"none": None, "BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "GN": nn.GroupNorm}
    found = [m for m in net.modules() if kinds[norm] and isinstance(m, kinds[norm])]
    assert len(found) == (0 if norm == "none" else 9)
    if norm in ("BN", "SyncBN"):
        assert {m.momentum for m in found} == {0.01}
    convs = [m for m in net.branches[0] if isinstance(m, nn.Conv2d)]
    width = hidden or 8
    assert [(c.in_channels, c.out_channels) for c in convs] == [
        (8, width),
        (width, width),
        (width, 8),
    ]
    assert {c.kernel_size for c in convs} == {(kernel_size, kernel_size)}
    assert not isinstance(net.branches[0][-1], nn.ReLU)  # residuals have both signs


@pytest.mark.parametrize(
    "out_channels, shared, expected", [(8, False, 0), (12, False, 4), (12, True, 1)]
)
def test_up_projections(out_channels, shared, expected):
    net = MBRNet(
        in_channels=8, out_channels=out_channels, num_branches=4, shared_up_projection=shared
    )
    assert len(net.up_projections) == expected


def test_unknown_norm():
    with pytest.raises(ValueError, match="BNN"):
        MBRNet(in_channels=2, out_channels=2, norm="BNN")


def test_estimates_add_up():
    estimator = FeatureEstimator(
        levels=["p2", "p3"], in_channels=1, out_channels=1, mbrnet=linear_mbrnet([2.0, 3.0], True)
    )
    features = {"p2": torch.ones(1, 1, 2, 2), "p3": torch.full((1, 1, 1, 1), 2.0), "p4": None}
    cumulative = estimator(features).cumulative()
    # d = 2, 9 at p2 (F_S = 1) and 4, 18 at p3 (F_S = 2); the adapter is the identity
    assert [e["p2"].unique().item() for e in cumulative] == [1, 3, 12]
    assert [e["p3"].unique().item() for e in cumulative] == [2, 6, 24]
    final = estimator.final(features)
    assert all(torch.equal(final[level], cumulative[-1][level]) for level in ("p2", "p3"))


def test_no_branches_leave_the_adapter():
    estimator = FeatureEstimator(
        levels=["p2"],
        in_channels=3,
        out_channels=5,
        mbrnet=MBRNet(in_channels=3, out_channels=5, num_branches=0),
    )
    features = {"p2": torch.randn(1, 3, 4, 4)}
    (zeroth,) = estimator(features).cumulative()
    torch.testing.assert_close(zeroth["p2"], estimator.adapter(features["p2"]))
    assert zeroth["p2"].shape == (1, 5, 4, 4)
