"""Estimates in factors: ``e_i = e_0 + sum_{j<=i} P_j g_j``, so that the wide maps ``d_j`` are never made.

A branch that ends in a 1x1 conv without norm is hidden layers, whose narrow output is ``g_j``, and a linear
map; with the up-projection that follows it, that map is ``P_j``. Torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from era.methods.era.fast.pointwise import hidden_maps
from era.methods.era.mbrnet import Branch, Estimates, FeatureEstimator, MBRNet


@dataclass
class FactoredEstimates:
    """The student's estimates of the teacher's FPN maps, in factors.

    Attributes:
        zeroth: ``e_0``, level name to (B, C_T, H, W).
        factors: ``g_1..g_N`` side by side, level name to (B, N * h, H, W); empty if N is 0.
        projection: ``P_1..P_N`` side by side, (C_T, N * h), or None where ``g_j`` is ``d_j`` itself.
        num_branches: N.
        adapter: ``A``, pointwise, with ``e_0 = A(F_S)``.
    """

    zeroth: dict[str, Tensor]
    factors: dict[str, Tensor]
    projection: Tensor | None
    num_branches: int
    adapter: nn.Module

    def dense(self) -> Estimates:
        """The same with ``d_j = P_j g_j`` at every position."""
        by_level = {level: g.chunk(self.num_branches, dim=1) for level, g in self.factors.items()}
        projections = [None] * self.num_branches
        if self.projection is not None:
            projections = self.projection[:, :, None, None].chunk(self.num_branches, dim=1)
        residuals = [
            {
                level: g[i] if projection is None else F.conv2d(g[i], projection)
                for level, g in by_level.items()
            }
            for i, projection in enumerate(projections)
        ]
        return Estimates(self.zeroth, residuals)


def of_ends(estimates: FactoredEstimates) -> FactoredEstimates:
    """``e_0`` and ``e_N`` alone, as if one branch led from the one to the other: ``sum_j P_j g_j`` is one product."""
    if estimates.num_branches < 2:
        return estimates
    factors, count, projection = estimates.factors, estimates.num_branches, estimates.projection
    if projection is None:
        total = {level: g.unflatten(1, (count, -1)).sum(1) for level, g in factors.items()}
    else:
        total = {level: F.conv2d(g, projection[:, :, None, None]) for level, g in factors.items()}
    return FactoredEstimates(estimates.zeroth, total, None, 1, estimates.adapter)


def factored_estimates(
    estimator: FeatureEstimator, features: Mapping[str, Tensor], *, fused: bool = True
) -> FactoredEstimates:
    """As calling the estimator, equal to rounding, in factors.

    Args:
        features: the student's FPN maps, level name to (B, C_S, H, W).
        fused: 1x1 branches in one buffer.
    """
    net = estimator.mbrnet
    zeroth = {level: estimator.adapter(features[level]) for level in estimator.levels}
    count, factors = len(net.branches), {}
    if count > 0:
        factors = {
            level: branch_factors(net, features[level], fused=fused) for level in estimator.levels
        }
    return FactoredEstimates(zeroth, factors, projection(net), count, estimator.adapter)


def ends_linear(net: MBRNet) -> bool:
    """Whether every branch is hidden layers and then one 1x1 conv without norm or bias."""

    def is_linear(last: nn.Module) -> bool:
        return isinstance(last, nn.Conv2d) and last.kernel_size == (1, 1) and last.bias is None

    return len(net.branches) > 0 and all(len(b) > 1 and is_linear(b[-1]) for b in net.branches)


def is_pointwise(branch: Branch) -> bool:
    """Whether a branch that ends linear is a 1x1 conv, a ReLU and that last conv."""
    return len(branch) == 3 and branch[0].kernel_size == (1, 1)


def projection(net: MBRNet) -> Tensor | None:
    """``[P_1 ... P_N]`` side by side, (C_T, N * h), the products of each branch's last conv and its
    up-projection; None where a branch ends otherwise."""
    if not ends_linear(net):
        return None
    products = [branch[-1].weight.flatten(1) for branch in net.branches]
    if len(net.up_projections) > 0:
        ups = [up.weight.flatten(1) for up in net.up_projections]
        products = [ups[i % len(ups)] @ product for i, product in enumerate(products)]
    return torch.cat(products, dim=1)


def branch_factors(net: MBRNet, features: Tensor, *, fused: bool = True) -> Tensor:
    """``g_1..g_N`` of one level side by side, which :func:`projection` takes to ``d_1..d_N``.

    Args:
        features: ``F_S``, shape (B, C_S, H, W).
        fused: 1x1 branches in one buffer.

    Returns:
        (B, N * h, H, W), or (B, N * C_T, H, W), ``g_i = d_i``, where there is no projection.
    """
    if not ends_linear(net):
        return torch.cat(net(features), dim=1)
    if fused and all(is_pointwise(branch) for branch in net.branches):
        first = [branch[0] for branch in net.branches]
        weight = torch.cat([conv.weight for conv in first]).flatten(1)
        mixing = None
        if net.accumulated_inputs:
            last = torch.cat([branch[-1].weight for branch in net.branches], dim=1).flatten(1)
            mixing = weight @ last
        bias = torch.cat([conv.bias for conv in first])
        return hidden_maps(features, weight, bias, mixing, len(first))
    factors, branch_input = [], features
    for branch in net.branches:
        hidden = branch_input
        for layer in list(branch)[:-1]:
            hidden = layer(hidden)
        factors.append(hidden)
        if net.accumulated_inputs:
            branch_input = branch_input + branch[-1](hidden)
    return torch.cat(factors, dim=1)
