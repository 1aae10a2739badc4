"""ERA's feature and residual losses of one level in one pass over one map; torch alone.

``MSE(d_i, sg(F_T - e_{i-1}))`` needs the wide map ``d_i`` only to add it to ``r_i = e_i - F_T``: the loss
is the mean of ``r_i^2`` and its gradient with respect to ``d_i`` is ``2 r_i / numel``. So one buffer ``r``
runs through the branches, and each branch's gradient is taken while ``r`` stands at ``r_i``. The N wide
residuals and their targets, which plain autograd keeps for the backward pass, are never stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def estimate_distances(
    zeroth: Tensor,
    target: Tensor,
    factors: Sequence[Tensor],
    projections: Sequence[Tensor | None],
) -> Tensor:
    """``MSE(e_i, F_T)`` for i = 0..N at one level, each with gradient into its newest part alone.

    Value 0 sends gradient into ``zeroth``; value i > 0 into ``factors[i - 1]`` and ``projections[i - 1]``:
    exactly the gradients of ``MSE(e_0, sg F_T)`` and of ``MSE(d_i, sg(F_T - e_{i-1}))``.

    Args:
        zeroth: ``e_0``, shape (B, C, H, W).
        target: ``F_T``, same shape; a constant.
        factors: ``g_1..g_N``, (B, h, H, W) each.
        projections: ``P_1..P_N``, (C, h) each, with ``d_i = P_i g_i``; None for ``d_i = g_i``.

    Returns:
        (N + 1,), float32 or wider.

    Raises:
        ValueError: ``zeroth`` and ``target`` differ in shape.
    """
    if zeroth.shape != target.shape:
        raise ValueError(
            f"shapes differ: estimate {tuple(zeroth.shape)}, target {tuple(target.shape)}"
        )
    pairs = [x for pair in zip(factors, projections, strict=True) for x in pair]
    return _Distances.apply(zeroth, target, *pairs)


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx, zeroth: Tensor, target: Tensor, *pairs: Tensor | None) -> Tensor:
        dtype = torch.promote_types(zeroth.dtype, torch.float32)
        remaining = zeroth.to(dtype, copy=True).sub_(target)  # r_0
        # Gradients are kept without their factor 2 / numel, which float16 could not hold.
        ctx.scale = 2.0 / max(remaining.numel(), 1)
        values, gradients = [_mean_square(remaining)], []
        wants = ctx.needs_input_grad
        gradients.append(remaining.to(zeroth.dtype, copy=True) if wants[0] else None)
        flat = remaining.flatten(2)  # (B, C, HW), a view of the running buffer
        with torch.autocast(zeroth.device.type, enabled=False):
            for index in range(0, len(pairs), 2):
                factor, projection = pairs[index], pairs[index + 1]
                g = factor.to(dtype).flatten(2)
                wants_factor, wants_projection = wants[2 + index], wants[3 + index]
                if projection is None:
                    flat += g  # r_i
                    gradients += [
                        flat.to(factor.dtype, copy=True).view_as(factor) if wants_factor else None,
                        None,
                    ]
                else:
                    p = projection.to(dtype)
                    batched = p.expand(flat.shape[0], -1, -1)
                    torch.baddbmm(flat, batched, g, out=flat)  # r_i
                    to_factor = to_projection = None
                    if wants_factor:
                        to_factor = torch.matmul(p.T, flat)
                        to_factor = to_factor.view_as(factor).to(factor.dtype)
                    if wants_projection:
                        to_projection = torch.bmm(flat, g.transpose(1, 2)).sum(0)
                        to_projection = to_projection.to(projection.dtype)
                    gradients += [to_factor, to_projection]
                values.append(_mean_square(remaining))
        ctx.save_for_backward(*gradients)
        return torch.stack(values)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        upstream = upstream * ctx.scale
        # one value for e_0, then one a branch, for its factor and its projection
        values = [upstream[0], *(u for u in upstream[1:] for _ in range(2))]
        scaled = [
            None if gradient is None else gradient * value.to(gradient.dtype)
            for gradient, value in zip(ctx.saved_tensors, values, strict=True)
        ]
        return scaled[0], None, *scaled[1:]


def _mean_square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x).square() / max(x.numel(), 1)
