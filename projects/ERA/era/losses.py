"""Losses that several methods share, as pure functions; torch alone.

Every function computes in float32 (or wider, if its inputs are wider), also under autocast, and stays
connected to the graph when there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def mse(estimate: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of the squared difference; 0, connected to ``estimate``, for no element.

    Args:
        estimate, target: tensors of equal shape. Gradients flow into both: detach what is a target.

    Returns:
        Scalar, at least float32.

    Raises:
        ValueError: the shapes differ (broadcasting would hide a misaligned feature map).
    """
    if estimate.shape != target.shape:
        raise ValueError(
            f"shapes differ: estimate {tuple(estimate.shape)}, target {tuple(target.shape)}"
        )
    estimate, target = at_least_float32(estimate), at_least_float32(target)
    if estimate.numel() == 0:
        return estimate.sum()
    with torch.autocast(estimate.device.type, enabled=False):
        return F.mse_loss(estimate, target)


def level_mean(values: Sequence[Tensor]) -> Tensor:
    """Mean of per-level scalars: levels count alike, however many positions they have (design: "MSE is
    the mean over elements, then over levels").

    Raises:
        ValueError: no level.
    """
    if len(values) == 0:
        raise ValueError("the mean over no level is undefined")
    return torch.stack(tuple(values)).mean()


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``tau^2 * KL(teacher || student)`` of class distributions, summed over classes, mean over rows.

    Hinton et al. 2015, equation of section 2; ERA's code, ``kd_loss_imagenet.py``, with tau = 1.

    Args:
        student_logits, teacher_logits: shape (R, K + 1), rows aligned; background is the last class.
            The teacher's are treated as constants.
        temperature: tau > 0.

    Returns:
        Scalar >= 0; 0, connected to ``student_logits``, when there are no rows.
    """
    student_logits = at_least_float32(student_logits)
    teacher_logits = at_least_float32(teacher_logits).detach()
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"shapes differ: student {tuple(student_logits.shape)}, "
            f"teacher {tuple(teacher_logits.shape)}"
        )
    if student_logits.shape[0] == 0:
        return student_logits.sum()
    return temperature**2 * F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is of a half type, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
