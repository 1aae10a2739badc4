"""What an R-CNN gives methods that train further heads: pooled features, fresh heads of its form, keypoints of a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.modeling.roi_heads import (
    BaseKeypointRCNNHead,
    FastRCNNOutputLayers,
    StandardROIHeads,
    build_box_head,
    build_keypoint_head,
)
from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_loss
from detectron2.structures import Instances
from torch import Tensor, nn

from era.losses import at_least_float32
from era.modeling.detectors.further_heads import FurtherHeads, NewBoxHead
from era.modeling.detectors.recording import KeypointSamples, Predictions, Recording


class BoxStage(NamedTuple):
    """A box head, from (R, C, P, P) to vectors (R, D), and the predictor that reads these."""

    head: nn.Module
    predictor: FastRCNNOutputLayers


class BoxHead(NewBoxHead):
    """A box head and its predictor, with weights of their own.

    Args:
        cfg: the config of the detector whose form it has.
        shape: (C, P, P) of the pooled features.
    """

    def __init__(self, cfg: CfgNode, shape: tuple[int, int, int]):
        super().__init__()
        channels, height, width = shape
        self.head = build_box_head(cfg, ShapeSpec(channels=channels, height=height, width=width))
        self.predictor = FastRCNNOutputLayers(cfg, self.head.output_shape)

    def forward(self, pooled: Tensor) -> Predictions:
        """Class logits (R, K + 1) and box deltas (R, 4K or 4) of (R, C, P, P)."""
        return Predictions(*map(at_least_float32, self.predictor(self.head(pooled))))

    def learns(self, *, classes: bool, boxes: bool) -> None:
        """See :meth:`NewBoxHead.learns`."""
        self.head.requires_grad_(classes or boxes)
        self.predictor.cls_score.requires_grad_(classes)
        self.predictor.bbox_pred.requires_grad_(boxes)


class RCNNFurtherHeads(FurtherHeads):
    """Of a ``GeneralizedRCNN`` with ``StandardROIHeads``, as ``model``."""

    model: GeneralizedRCNN

    @property
    def pooled_shape(self) -> tuple[int, int, int] | None:
        """Of the box pooler."""
        heads = self.model.roi_heads
        if not isinstance(heads, StandardROIHeads):
            return None
        channels = self.model.backbone.output_shape()[heads.box_in_features[0]].channels
        return (channels, *heads.box_pooler.output_size)

    def pooled(self, feature_map: Tensor, stride: int, samples: list[Instances]) -> Tensor:
        """With the box pooler's resolution and kind of pooling."""
        pooler = copy.copy(self.model.roi_heads.box_pooler.level_poolers[0])  # without weights
        pooler.spatial_scale = 1.0 / stride
        boxes = convert_boxes_to_pooler_format([own.proposal_boxes for own in samples])
        return pooler(feature_map, boxes)

    def new_box_head(self, cfg: CfgNode) -> BoxHead:
        """Box head and predictor."""
        return BoxHead(cfg, self.pooled_shape)

    @property
    def keypoint_form(self) -> tuple[int, int] | None:
        """Of a keypoint head of pooled features and heatmaps that is switched on."""
        heads = self.model.roi_heads
        if not isinstance(heads, StandardROIHeads) or not heads.keypoint_on:
            return None
        head = heads.keypoint_head
        if heads.keypoint_pooler is None or not isinstance(head, BaseKeypointRCNNHead):
            return None
        shapes = self.model.backbone.output_shape()
        return shapes[heads.keypoint_in_features[0]].channels, head.num_keypoints

    def new_keypoint_head(self, cfg: CfgNode) -> nn.Module:
        """As ``MODEL.ROI_KEYPOINT_HEAD`` describes it."""
        channels, _ = self.keypoint_form
        height, width = self.model.roi_heads.keypoint_pooler.output_size
        return build_keypoint_head(cfg, ShapeSpec(channels=channels, height=height, width=width))

    def keypoint_loss(self, heatmaps: Tensor, recording: Recording) -> Tensor:
        """Detectron2's, with the settings of the own keypoint head; 0, connected to the graph, for no object."""
        heatmaps, head = at_least_float32(heatmaps).contiguous(), self.model.roi_heads.keypoint_head
        if len(heatmaps) == 0:  # there Detectron2 would count a skipped batch of the student
            return heatmaps.sum()
        proposals = recording.keypoints.proposals
        visible_only = head.loss_normalizer == "visible"
        normaliser = None if visible_only else len(proposals) * head.loss_normalizer
        return head.loss_weight * keypoint_rcnn_loss(heatmaps, proposals, normaliser)


@contextmanager
def keypoints_recorded(detector: RCNNFurtherHeads, recording: Recording) -> Iterator[None]:
    """Keep what the keypoint head, if one runs, is given and says: a hook and its public ``layers`` wrapped, both taken off at
    exit."""
    if detector.keypoint_form is None:
        yield
        return
    head = detector.model.roi_heads.keypoint_head
    layers = head.layers

    def on_input(_module, args):
        recording.keypoints = KeypointSamples(*args)

    def layers_kept(features):
        recording.keypoints.heatmaps = layers(features)
        return recording.keypoints.heatmaps

    handle = head.register_forward_pre_hook(on_input)
    head.layers = layers_kept
    try:
        yield
    finally:
        del head.layers
        handle.remove()
