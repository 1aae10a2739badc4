"""Losses of dense heads anchor by anchor: Detectron2's, of several sets of predictions alike, and soft ones."""

from __future__ import annotations

import torch
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor
from torch.nn import functional as F


def focal_losses(logits: Tensor, classes: Tensor, alpha: float, gamma: float) -> Tensor:
    """The focal loss of every anchor, summed over classes (RetinaNet, arXiv 1708.02002, equation 5).

    Args:
        logits: (n, K).
        classes: (n,), K where it is background.

    Returns:
        (n,).
    """
    truth = F.one_hot(classes, logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    return sigmoid_focal_loss(logits, truth, alpha=alpha, gamma=gamma, reduction="none").sum(1)


def object_probability(logits: Tensor) -> Tensor:
    """The highest class probability of every anchor, (n,), of logits (n, K)."""
    return logits.amax(1).sigmoid()


def soft_class_losses(logits: Tensor, target_logits: Tensor) -> Tensor:
    """``sum_c sg|p_T - p| BCE(p, p_T)`` of every anchor; with ``p_T`` and ``p`` the probabilities of classes that are
    independent sigmoids. 0 where they agree.

    Args:
        logits, target_logits: (n, K); the target's are constants.

    Returns:
        (n,).
    """
    target = target_logits.sigmoid()
    distance = (target - logits.detach().sigmoid()).abs()
    values = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (distance * values).sum(1)


def soft_dense_loss(class_losses: Tensor, box_losses: Tensor, probability: Tensor) -> Tensor:
    """``(sum_a class_a + sum_a w_a box_a) / max(sum_a w_a, 1)``, w how likely the teacher holds an object at an anchor.

    The sums run over the anchors of the whole batch. So boxes count where the teacher sees an object, and the divisor is
    its count of objects' anchors, without a label. That a batch of less than one is divided by 1 is this project's
    choice, as in :func:`~era.modeling.detectors.rcnn_soft.soft_anchor_losses`.

    Args:
        class_losses, box_losses, probability: (n,) each.

    Returns:
        Scalar; 0, connected to the graph, for no anchor.
    """
    total = class_losses.sum() + (probability * box_losses).sum()
    return total / probability.sum().clamp(min=1)


def bernoulli_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:
    """``KL(p_T || p)`` of one probability each, element by element, >= 0; the target's logits are constants."""
    target = target_logits.sigmoid()
    own, least = (
        F.binary_cross_entropy_with_logits(x, target, reduction="none")
        for x in (logits, target_logits)
    )
    return own - least


def centerness(deltas: Tensor) -> Tensor:
    """``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))`` of distances to the sides, (n, 4) as l, t, r, b > 0; (n,).
    FCOS, arXiv 1904.01355, equation 3."""
    sides = deltas.unflatten(1, (2, 2))  # (l, t), (r, b)
    ratio = sides.amin(1) / sides.amax(1)
    return torch.sqrt(ratio.prod(1))
