"""Detectron2's box regression loss box by box, of several sets of deltas at once."""

from __future__ import annotations

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


def box_losses(
    settings: RPN | FastRCNNOutputLayers, boxes: Tensor, matched: Tensor, deltas: Tensor
) -> Tensor:
    """The regression loss of every box, summed over its coordinates.

    Args:
        settings: has the box coder and the kind of loss.
        boxes, matched: anchors or proposals and their ground truth, (R, 4) or (R, 5) each.
        deltas: (K, R, 4) or (K, R, 5), K sets of them.

    Returns:
        (K, R).
    """
    coder, kind = settings.box2box_transform, settings.box_reg_loss_type
    if kind == "smooth_l1":  # the targets once: coding them makes a GPU wait
        target = coder.get_deltas(boxes, matched).expand_as(deltas)
        return smooth_l1_loss(deltas, target, settings.smooth_l1_beta, reduction="none").sum(2)
    loss = IOU_LOSSES[kind]
    return torch.stack(
        [loss(coder.apply_deltas(own, boxes), matched, reduction="none") for own in deltas]
    )
