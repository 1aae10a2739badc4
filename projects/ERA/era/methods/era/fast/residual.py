"""ERA's feature and residual losses of one level without the wide residuals; torch alone.

With ``r_i = e_i - F_T = r_0 + sum_{j<=i} P_j g_j`` branch i's loss is the mean of ``r_i^2``, and its
gradients are ``P_i^T r_i`` and ``r_i g_i^T`` times ``2 / numel``. All of them follow from the narrow maps
and from four products with every branch at once: ``P^T r_0``, ``r_0 G^T``, ``G G^T`` and ``P^T P``, where
``P = [P_1 ... P_N]`` and ``G`` is ``g_1..g_N`` stacked. So neither ``d_i`` nor ``r_i``, i > 0, is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from era.losses import at_least_float32


def estimate_distances(
    zeroth: Tensor,
    target: Tensor,
    factors: Tensor | None,
    projection: Tensor | None,
    count: int,
    deviation: Tensor | None = None,
    by_position: Tensor | None = None,
) -> Tensor:
    """``MSE(e_i, F_T)``, or ``MSE(e_i / sigma_T, F_T / sigma_T)``, or weighted by position, for i = 0..N at one level,
    each with gradient into its newest part alone.

    Value 0 sends gradient into ``zeroth``; value i > 0 into ``g_i`` and ``P_i``: exactly the gradients of
    ``MSE(e_0, sg F_T)`` and of ``MSE(d_i, sg(F_T - e_{i-1}))``.

    Args:
        zeroth: ``e_0``, shape (B, C, H, W).
        target: ``F_T``, same shape; a constant.
        factors: ``g_1..g_N`` side by side, (B, N * h, H, W); not read if ``count`` is 0.
        projection: ``P_1..P_N`` side by side, (C, N * h), with ``d_i = P_i g_i``; None for ``d_i = g_i``.
        count: N.
        deviation: ``sigma_T``, (C,), a constant: rows of ``r_0`` and of ``P`` are divided by it. None for 1.
        by_position: :func:`~era.methods.era.standardise.emphasis`, (B, 1, H, W), a constant: columns of ``r_0`` and of
            ``G`` are multiplied by it. None for 1.

    Returns:
        (N + 1,), float32 or wider.

    Raises:
        ValueError: ``zeroth`` and ``target`` differ in shape.
    """
    if zeroth.shape != target.shape:
        raise ValueError(
            f"shapes differ: estimate {tuple(zeroth.shape)}, target {tuple(target.shape)}"
        )
    if count == 0:
        factors = projection = None
    elif deviation is not None and projection is not None:
        projection = projection / deviation[:, None]
    elif deviation is not None:
        factors = factors / deviation.repeat(count)[:, None, None]
    if by_position is not None and factors is not None:
        factors = factors * by_position
    return _Distances.apply(zeroth, target, factors, projection, count, deviation, by_position)


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx, zeroth, target, factors, projection, count, deviation, by_position):
        ctx.count, size = count, max(zeroth.numel(), 1)
        with torch.autocast(zeroth.device.type, enabled=False):
            remaining = at_least_float32(zeroth) - at_least_float32(target)  # r_0
            if deviation is not None:
                remaining /= deviation[:, None, None]
            if by_position is not None:
                remaining *= by_position
            first = _square_sum(remaining)
            squares, to_projection = first[None], None
            if count > 0 and projection is None:
                steps = _wide_steps(remaining, at_least_float32(factors), count)
                own = torch.stack([_square_sum(r) for r in steps.unbind(1)])
                squares = torch.cat([squares, own])
            elif count > 0:
                changes, to_projection = _changes(
                    remaining.flatten(2),
                    at_least_float32(factors).flatten(2),
                    at_least_float32(projection),
                    count,
                )
                squares = torch.cat([squares, (first + changes).clamp(min=0)])
        # Gradients are scaled in float32, factor 2 / numel included, which float16 could not hold alone.
        ctx.save_for_backward(remaining, factors, projection, to_projection, deviation, by_position)
        ctx.zeroth_dtype = zeroth.dtype
        return squares / size

    @staticmethod
    def backward(ctx, upstream):
        remaining, factors, projection, to_projection, deviation, by_position = ctx.saved_tensors
        scales = upstream * (2.0 / max(remaining.numel(), 1))
        by_row = scales[0] if deviation is None else (scales[0] / deviation)[:, None, None]
        to_zeroth = remaining * by_row
        if by_position is not None:
            to_zeroth *= by_position
        to_zeroth = to_zeroth.to(ctx.zeroth_dtype)
        to_factors = None
        with torch.autocast(remaining.device.type, enabled=False):
            if factors is not None and projection is None:
                steps = _wide_steps(remaining, at_least_float32(factors), ctx.count)
                to_factors = (steps * scales[1:, None, None, None]).flatten(1, 2)
            elif factors is not None:
                by_column = scales[1:].repeat_interleave(projection.shape[1] // ctx.count)
                to_factors = _to_factors(
                    remaining.flatten(2),
                    at_least_float32(factors).flatten(2),
                    at_least_float32(projection),
                    by_column,
                    ctx.count,
                ).view_as(factors)
                to_projection = (to_projection * by_column).to(projection.dtype)
        if to_factors is not None:
            to_factors = to_factors.to(factors.dtype)
        return to_zeroth, None, to_factors, to_projection, None, None, None


def _changes(remaining: Tensor, g: Tensor, p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What ``|r_i|^2`` is beyond ``|r_0|^2``, (N,), and ``r_i g_i^T`` side by side, (C, N * h).

    Args:
        remaining: ``r_0``, (B, C, H * W).
        g: (B, N * h, H * W).
        p: (C, N * h).
    """
    width = g.shape[1] // count
    with_r = torch.bmm(remaining, g.transpose(1, 2)).sum(0)  # r_0 G^T
    with_g = torch.bmm(g, g.transpose(1, 2)).sum(0)  # G G^T
    # |r_i|^2 = |r_0|^2 + 2 sum_{j<=i} <r_0, P_j g_j> + sum_{j,k<=i} <P_j g_j, P_k g_k>
    linear = (with_r * p).sum(0).unflatten(0, (count, width)).sum(1).cumsum(0)
    blocks = (p.T @ p * with_g).unflatten(0, (count, width)).unflatten(2, (count, width))
    quadratic = blocks.sum((1, 3)).cumsum(0).cumsum(1).diagonal()
    # r_i g_i^T = r_0 g_i^T + sum_{j<=i} P_j (g_j g_i^T)
    branch = torch.arange(count, device=g.device).repeat_interleave(width)
    is_read = branch[:, None] <= branch  # row: a channel of branch j; column: of branch i
    return 2 * linear + quadratic, with_r + p @ (with_g * is_read)


def _to_factors(remaining: Tensor, g: Tensor, p: Tensor, scales: Tensor, count: int) -> Tensor:
    """``P_i^T r_i = P_i^T r_0 + sum_{j<=i} (P_i^T P_j) g_j`` side by side, times a scale a channel.

    Args:
        remaining, g, p: as in :func:`_changes`.
        scales: (N * h,).
    """
    batch, width = g.shape[0], g.shape[1] // count
    scaled = p.T * scales[:, None]
    gram = scaled @ p
    found = torch.bmm(scaled.expand(batch, -1, -1), remaining)
    for i in range(count):  # branch i reads those up to itself
        rows, columns = slice(i * width, (i + 1) * width), slice(0, (i + 1) * width)
        found[:, rows].baddbmm_(gram[rows, columns].expand(batch, -1, -1), g[:, columns])
    return found


def _wide_steps(remaining: Tensor, d: Tensor, count: int) -> Tensor:
    """``r_1..r_N``, (B, N, C, H, W), from ``d_1..d_N`` side by side, (B, N * C, H, W)."""
    return d.unflatten(1, (count, -1)).cumsum(1).add_(remaining[:, None])


def _square_sum(x: Tensor) -> Tensor:
    # by rows first: a norm over millions of float32 elements in one go is off by a thousandth on a CPU
    return torch.linalg.vector_norm(x, dim=-1).square().sum()
