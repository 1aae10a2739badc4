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
    check_same_shape(estimate, target)
    estimate, target = at_least_float32(estimate), at_least_float32(target)
    if estimate.numel() == 0:
        return estimate.sum()
    with torch.autocast(estimate.device.type, enabled=False):
        return F.mse_loss(estimate, target)


def squared_error(estimate: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """``sum weight (estimate - target)^2``, a sum over channels and positions and a mean over images.

    Args:
        estimate, target: maps (B, C, H, W). Gradients flow into both: detach what is a target.
        weight: of the squares, broadcast to the maps.

    Returns:
        Scalar, at least float32; 0, connected to ``estimate``, for no image.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(estimate, target)
    estimate, target = at_least_float32(estimate), at_least_float32(target)
    with torch.autocast(estimate.device.type, enabled=False):
        return (weight * (estimate - target).square()).sum() / max(len(estimate), 1)


def check_same_shape(estimate: Tensor, target: Tensor) -> None:
    """Nothing is broadcast, which would hide a misaligned map.

    Raises:
        ValueError: the shapes differ.
    """
    if estimate.shape != target.shape:
        raise ValueError(
            f"shapes differ: estimate {tuple(estimate.shape)}, target {tuple(target.shape)}"
        )


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
    student_logits, teacher_logits = logits_to_compare(student_logits, teacher_logits)
    if student_logits.shape[0] == 0:
        return student_logits.sum()
    return temperature**2 * F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def group_divergences(
    student_logits: Tensor,
    teacher_logits: Tensor,
    groups: Tensor,
    count: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``tau^2 KL(teacher || student)`` of class distributions, taken apart by the chain rule over groups of classes.

    With ``b^g`` the mass of group g and ``p^g`` the distribution within it::

        KL(p_T || p_S) = KL(b_T || b_S) + sum_g b_T^g KL(p_T^g || p_S^g)

    DKD (arXiv 2203.08679) and GDKD (arXiv 2512.04625) give these parts weights of their own. Their code takes the log
    of summed probabilities, which is -inf for a confident row, and leaves classes out by subtracting 1000 from their
    logits; here log b is a difference of log-sum-exps, and a class that is left out has no part at all.

    Args:
        student_logits, teacher_logits: shape (R, C), rows aligned. The teacher's are treated as constants.
        groups: (R, C), long, the group of each class in each row, from 0; every group has a class in every row.
        count: G, the number of groups.
        temperature: tau > 0.

    Returns:
        By row, ``tau^2 KL(b_T || b_S)``, (R,), and ``tau^2 KL(p_T^g || p_S^g)``, (R, G), not weighted by ``b_T^g``;
        each >= 0, float32 or wider.
    """
    own, other = (x / temperature for x in logits_to_compare(student_logits, teacher_logits))
    masks = [groups == g for g in range(count)]

    def log_masses(logits: Tensor) -> Tensor:
        alone = (logits.masked_fill(~mask, float("-inf")) for mask in masks)
        return torch.stack([x.logsumexp(1) for x in alone], dim=1)

    own_masses, other_masses = log_masses(own), log_masses(other)
    log_b_s, log_b_t = own_masses.log_softmax(1), other_masses.log_softmax(1)
    between = (log_b_t.exp() * (log_b_t - log_b_s)).sum(1)
    log_p_s, log_p_t = own - own_masses.gather(1, groups), other - other_masses.gather(1, groups)
    parts = log_p_t.exp() * (log_p_t - log_p_s)
    within = torch.stack([(parts * mask).sum(1) for mask in masks], dim=1)
    return temperature**2 * between, temperature**2 * within


def class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of class logits (R, C) against the classes of the rows, (R,); the mean over rows, at least float32; 0,
    connected to the graph, for no row."""
    return mean_of_rows(F.cross_entropy(at_least_float32(logits), classes, reduction="none"))


def divergence(logits: Tensor, target_logits: Tensor, temperature: float) -> Tensor:
    """``tau^2 KL(target || own)`` of distributions, summed over a row, mean over rows; gradients flow into BOTH.

    Args:
        logits, target_logits: (R, C), rows aligned.
        temperature: tau > 0.

    Returns:
        Scalar >= 0, at least float32; 0, connected to both, for no row.
    """
    own, target = (
        (at_least_float32(x) / temperature).log_softmax(1) for x in (logits, target_logits)
    )
    return temperature**2 * mean_of_rows((target.exp() * (target - own)).sum(1))


def mean_of_rows(values: Tensor) -> Tensor:
    """Mean over the first dimension; 0, connected to the graph, of no row."""
    return values.sum(0) / max(len(values), 1)


def logits_to_compare(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider, the teacher's without gradient.

    Raises:
        ValueError: their shapes differ.
    """
    check_same_shape(student_logits, teacher_logits)
    return at_least_float32(student_logits), at_least_float32(teacher_logits).detach()


def quality_bce(logits: Tensor, target_logits: Tensor) -> Tensor:
    """``|p_T - p| BCE(p, p_T)`` element by element, ``p = sigma(z)``: the quality focal loss with beta 1 against another
    model's probabilities, as CrossKD's ``KDQualityFocalLoss``. Gradients also flow through the factor.

    Args:
        logits, target_logits: z and z_T, of equal shape. The target's are treated as constants.

    Returns:
        Of that shape, >= 0, at least float32.
    """
    logits, target = at_least_float32(logits), at_least_float32(target_logits).detach().sigmoid()
    with torch.autocast(logits.device.type, enabled=False):
        distance = (target - logits.sigmoid()).abs()
        return distance * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def standardised(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) or vectors (R, C) with mean 0 and variance 1 in every channel, over all else.

    The variance is over n, not n - 1, elements; a channel without variance becomes 0, with a finite gradient. At least
    float32; nothing, connected to ``x``, for no element.
    """
    x = at_least_float32(x)
    if x.numel() == 0:
        return x
    with torch.autocast(x.device.type, enabled=False):
        mean, deviation = channel_moments(x)
        return (x - mean) / deviation


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of maps or vectors, in the form of ``x`` with one element a
    channel; the deviation is over n elements and at least 1e-6."""
    others = [i for i in range(x.dim()) if i != 1]
    variance, mean = torch.var_mean(x, dim=others, correction=0, keepdim=True)
    return mean, (variance + 1e-12).sqrt()


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is of a half type, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
