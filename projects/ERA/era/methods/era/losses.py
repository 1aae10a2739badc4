"""ERA's losses on feature maps as they are defined; torch alone.

``e_0`` is the student's feature map in the teacher's channels, ``d_i`` the residual of branch i,
``e_i = e_{i-1} + d_i``, ``F_T`` the teacher's map. Maps are dicts, level name to (B, C_T, H, W); levels count
alike. ERA, arXiv 2508.16050; official code, ``imagenet.py``, with linear layers in the place of maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from era.losses import at_least_float32, level_mean, mse

Maps = dict[str, Tensor]


def standardised(maps: Maps, deviation: Maps | None) -> Maps:
    """``maps / sigma_T``: what the losses compare where the target is standardised.

    With ``e_i``, ``d_i`` and ``F_T`` all divided, the losses are those of ``(e_i - F_T) / sigma_T`` and the algebra of
    the residuals stays as it is. No mean is taken off, for it would cancel.

    Args:
        deviation: ``sigma_T``, level name to (C_T,), a constant; None leaves the maps as they are.
    """
    if deviation is None:
        return maps
    return {
        level: at_least_float32(maps[level]) / sigma[:, None, None]
        for level, sigma in deviation.items()
    }


def emphasised(maps: Maps, by_position: Maps | None) -> Maps:
    """``maps`` times :func:`~era.methods.era.standardise.emphasis`: the mean square of a difference is then weighted by
    position; None leaves them as they are.
    """
    if by_position is None:
        return maps
    return {level: at_least_float32(maps[level]) * root for level, root in by_position.items()}


def feature_loss(zeroth: Maps, target: Maps) -> Tensor:
    """``MSE(e_0, sg F_T)``."""
    return level_mean([mse(e, target[level].detach()) for level, e in zeroth.items()])


def residual_mse(residual: Tensor, previous: Tensor, target: Tensor) -> Tensor:
    """``MSE(d_i, sg(F_T - e_{i-1}))``, ERA's loss of branch ``i`` at one level.

    In value this equals ``MSE(e_i, F_T)`` with ``e_i = e_{i-1} + d_i``; the gradient reaches ``d_i``
    alone.

    Args:
        residual: ``d_i``, shape (B, C, H, W).
        previous: ``e_{i-1}``, same shape; treated as a constant.
        target: ``F_T``, same shape; treated as a constant.
    """
    return mse(residual, at_least_float32(target).detach() - previous.detach())


def residual_loss(
    residuals: Sequence[Maps], estimates: Sequence[Maps], target: Maps, scales: Sequence[float]
) -> Tensor:
    """``(1/N) sum_i s_i MSE(d_i, sg(F_T - e_{i-1}))``.

    Args:
        residuals: ``d_1..d_N``.
        estimates: ``e_0..e_N``, or without the last.
        target: ``F_T``.
        scales: ``s_1..s_N``.
    """
    total = 0.0
    for scale, d, previous in zip(scales, residuals, estimates, strict=False):
        by_level = [residual_mse(d[level], previous[level], target[level]) for level in d]
        total = total + scale * level_mean(by_level)
    return total / len(scales)


@torch.no_grad()
def distances(estimates: Sequence[Maps], target: Maps) -> Tensor:
    """``MSE(e_i, F_T)``, (levels, N + 1), for the log: it must fall with training."""
    levels = estimates[0]
    return torch.stack([torch.stack([mse(e[p], target[p]) for e in estimates]) for p in levels])


def feature_terms(
    estimates: Sequence[Maps],
    residuals: Sequence[Maps],
    target: Maps,
    scales: Sequence[float],
    deviation: Maps | None = None,
    by_position: Maps | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Feature and residual losses by term, the latter only if there are branches, and the distances.

    Args:
        estimates: ``e_0..e_N``.
        residuals: ``d_1..d_N``.
        target: ``F_T``.
        scales: ``s_1..s_N``.
        deviation: ``sigma_T``; the distances are then standardised too. None for 1.
        by_position: see :func:`emphasised`; the distances are then weighted too. None for 1.
    """

    def compared(maps: Maps) -> Maps:
        return emphasised(standardised(maps, deviation), by_position)

    estimates, residuals = ([compared(maps) for maps in x] for x in (estimates, residuals))
    target = compared(target)
    terms = {"feature": feature_loss(estimates[0], target)}
    if scales:
        terms["residual"] = residual_loss(residuals, estimates, target, scales)
    return terms, distances(estimates, target)
