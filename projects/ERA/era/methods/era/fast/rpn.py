"""The teacher's RPN head on factored estimates at the student's sampled anchors alone, with its losses there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from era.losses import at_least_float32
from era.methods.era.fast.factored import FactoredEstimates
from era.methods.era.fast.patches import conv_at, is_plain_conv
from era.modeling.detectors.box_losses import box_losses
from era.modeling.detectors.rcnn_losses import RCNNRecording
from era.modeling.detectors.rcnn_soft import soft_anchor_losses
from era.modeling.detectors.recording import Predictions


@dataclass(frozen=True)
class SampledAnchors:
    """The anchors that the student samples, by level.

    Attributes:
        image, anchor: (A,) each, where they are in the recording's labels.
        slots: (A,), which of the anchors of its position each one is.
        positions: by level, (image, y, x) of its share of the A.
    """

    image: Tensor
    anchor: Tensor
    slots: Tensor
    positions: list[tuple[Tensor, Tensor, Tensor]]


def sampled_anchors(rpn: RPN, maps: dict[str, Tensor], labels: Sequence[Tensor]) -> SampledAnchors:
    """Where the student samples anchors.

    Args:
        maps: level name to (B, C, H, W), for their sizes.
        labels: per image, (sum of H * W * A,) of 1 object, 0 background, -1 not sampled.
    """
    per_position = rpn.rpn_head.objectness_logits.out_channels
    image, anchor = (torch.stack(tuple(labels)) >= 0).nonzero(as_tuple=True)
    sizes = [maps[level].shape[-2:] for level in rpn.in_features]
    starts, end = [], 0
    for height, width in sizes:
        starts.append(end)
        end += height * width * per_position
    bounds = torch.tensor(starts[1:], device=anchor.device)
    level_of = torch.bucketize(anchor, bounds, right=True)
    order = level_of.argsort(stable=True)
    image, anchor = image[order], anchor[order]
    # one wait for a GPU, not one a level
    counts = level_of.bincount(minlength=len(sizes)).tolist()
    positions, slots = [], []
    for (_, width), start, of_image, of_level in zip(
        sizes, starts, image.split(counts), anchor.split(counts), strict=True
    ):
        position = (of_level - start) // per_position
        positions.append((of_image, position // width, position % width))
        slots.append((of_level - start) % per_position)
    return SampledAnchors(image, anchor, torch.cat(slots), positions)


def predict_sampled(
    rpn: RPN, estimates: FactoredEstimates, anchors: SampledAnchors
) -> tuple[Tensor, Tensor]:
    """Objectness logits (N + 1, A) and deltas (N + 1, A, 4) of every estimate, float32."""
    head, rows = rpn.rpn_head, torch.arange(len(anchors.slots), device=anchors.slots.device)
    hidden = torch.relu(conv_at([head.conv], estimates, rpn.in_features, anchors.positions)[0])
    logits = F.linear(hidden, head.objectness_logits.weight.flatten(1), head.objectness_logits.bias)
    logits = at_least_float32(logits[:, rows, anchors.slots])
    deltas = F.linear(hidden, head.anchor_deltas.weight.flatten(1), head.anchor_deltas.bias)
    deltas = at_least_float32(deltas.unflatten(2, (-1, 4))[:, rows, anchors.slots])
    return logits, deltas


def hard_losses(
    rpn: RPN, logits: Tensor, deltas: Tensor, anchors: SampledAnchors, recording: RCNNRecording
) -> Tensor:
    """Detectron2's objectness and anchor-delta losses against the ground truth, one an estimate, (N + 1,)."""
    image, anchor = anchors.image, anchors.anchor
    target = torch.stack(recording.anchor_labels)[image, anchor]
    truth = target.to(logits.dtype).expand_as(logits)
    objectness = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(1)
    objects = (target == 1).nonzero(as_tuple=True)[0]
    image, anchor = image[objects], anchor[objects]
    boxes = Boxes.cat(recording.anchors).tensor[anchor]
    matched = torch.stack(recording.anchor_boxes)[image, anchor]
    location = box_losses(rpn, boxes, matched, deltas[:, objects]).sum(1)
    scale = rpn.loss_weight
    return scale.get("loss_rpn_cls", 1.0) * objectness + scale.get("loss_rpn_loc", 1.0) * location


def soft_losses(
    rpn: RPN, logits: Tensor, deltas: Tensor, anchors: SampledAnchors, target: dict[str, Tensor]
) -> Tensor:
    """As :func:`soft_anchor_losses`, (N + 1,), the head running on ``F_T`` at the same anchors alone.

    Args:
        target: ``F_T``, level name to (B, C_T, H, W).
    """
    with torch.no_grad():
        alone = FactoredEstimates(
            target, {}, None, 0, nn.Identity()
        )  # F_T as an e_0 without branches
        expected = predict_sampled(rpn, alone, anchors)
    return soft_anchor_losses(logits, deltas, Predictions(*(x[0] for x in expected)))


def knows_rpn_head(rpn: RPN) -> bool:
    """Whether the sparse pass can stand for the RPN's head: one 3x3 conv, ReLU, two 1x1 convs."""
    head = rpn.rpn_head
    conv = getattr(head, "conv", None)
    return (
        type(head) is StandardRPNHead
        and is_plain_conv(conv)
        and isinstance(getattr(conv, "activation", None), nn.ReLU)
    )
