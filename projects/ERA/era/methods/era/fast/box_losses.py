"""Detectron2's box regression loss of several estimates at once."""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from fvcore.nn import smooth_l1_loss
from torch import Tensor


def box_losses(
    settings: RPN | FastRCNNOutputLayers, boxes: Tensor, matched: Tensor, deltas: Tensor
) -> Tensor:
    """Detectron2's box regression loss of K estimates, each summed over boxes.

    Args:
        settings: has the box coder and the kind of loss.
        boxes, matched: anchors or proposals and their ground truth, (R, 4) or (R, 5) each.
        deltas: (K, R, 4) or (K, R, 5).

    Returns:
        (K,).
    """
    coder, kind = settings.box2box_transform, settings.box_reg_loss_type
    beta = settings.smooth_l1_beta
    if kind == "smooth_l1":  # the targets once: to code them makes a GPU wait
        target = coder.get_deltas(boxes, matched)
        return smooth_l1_loss(deltas, target.expand_as(deltas), beta, reduction="none").sum((1, 2))
    return torch.stack(
        [
            _dense_box_regression_loss(
                [boxes],
                coder,
                [own.unsqueeze(0)],
                [matched],
                ...,
                box_reg_loss_type=kind,
                smooth_l1_beta=beta,
            )
            for own in deltas
        ]
    )


def weighted_sum(losses: Tensor, weights: list[float]) -> Tensor:
    """One loss an estimate, (K,), times its weight, summed."""
    return sum(weight * loss for weight, loss in zip(weights, losses.unbind(), strict=True))
