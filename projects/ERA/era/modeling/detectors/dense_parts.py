"""A dense head as one part: where CrossKD cuts its towers, and its losses of the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from era.losses import quality_bce
from era.modeling.detectors.dense_losses import object_probability
from era.modeling.detectors.dense_record import DenseRecording
from era.modeling.detectors.parts import HeadPart
from era.modeling.detectors.rcnn_parts import mirrored_level
from era.modeling.detectors.recording import Predictions

if TYPE_CHECKING:
    from era.modeling.detectors.dense import Dense


class DensePart(HeadPart):
    """Both towers, each cut before the activation of its last conv but one: after the third of four, CrossKD's for
    RetinaNet and FCOS (arXiv 2306.11369, table 1). Hidden tensors are named by tower and level, ``cls_subnet p3``."""

    dense = True
    exclusive = False  # independent sigmoids

    def __init__(self, detector: Dense):
        self.detector = detector
        self.class_loss = detector.class_loss
        self.levels = tuple(detector.model.head_in_features)
        self.names = tuple(f"{tower} {level}" for tower in detector.cuts for level in self.levels)
        self.channels = None
        if len(detector.cuts) == 2:
            self.channels = detector.model.head.cls_score.in_channels

    def own_hidden(self, recording: DenseRecording) -> dict[str, Tensor]:
        """Of both towers at every level, (B, C, H, W)."""
        found = [x for tower in self.detector.cuts for x in recording.hidden[tower]]
        return dict(zip(self.names, found, strict=True))

    def hidden(self, features: dict[str, Tensor], recording: DenseRecording) -> dict[str, Tensor]:
        """Of both towers on the given maps."""
        found = [
            layers[:cut](features[level])
            for layers, cut in self.detector.cuts.values()
            for level in self.levels
        ]
        return dict(zip(self.names, found, strict=True))

    def predict_hidden(self, hidden: dict[str, Tensor]) -> Predictions:
        """Of the rest of the towers and of the last layers, at all anchors, images one after the other."""
        head = self.detector.model.head
        by_tower = {
            tower: [layers[cut:](hidden[f"{tower} {level}"]) for level in self.levels]
            for tower, (layers, cut) in self.detector.cuts.items()
        }
        classes, boxes = by_tower["cls_subnet"], by_tower["bbox_subnet"]
        output = [[head.cls_score(x) for x in classes], [head.bbox_pred(x) for x in boxes]]
        if hasattr(head, "ctrness"):
            output.append([head.ctrness(x) for x in boxes])
        return self.detector.joined(output)

    def cross_losses(
        self,
        predictions: Predictions,
        targets: Predictions,
        recording: DenseRecording,
        temperature: float,
    ) -> dict[str, Tensor]:
        """CrossKD's losses of a dense head, at the same anchors; sigmoids have no temperature::

            class = sum_a sum_c |p_T - p| BCE(p, p_T) / n,   box = sum_a w_a (1 - GIoU(b, b_T)) / n,   n = max(sum_a w_a, 1)

        with ``w_a = max_c p_T`` and ``b`` decoded boxes; FCOS adds the KL of centerness to a box's. As CrossKD's code for
        RetinaNet: gradients also flow through ``|p_T - p|``, and a box counts by the teacher's highest score. Differs as
        :func:`~era.modeling.detectors.rcnn_parts.cross_anchor_losses` does, in ``n``, there the number of anchors matched
        to ground truth, and in that no anchor is left out.
        """
        anchors = recording.anchor_boxes()
        weights = object_probability(targets.class_logits)
        normaliser = weights.sum().clamp(min=1)
        boxes = self.detector.overlap_distances(predictions, targets, anchors)
        classes = quality_bce(predictions.class_logits, targets.class_logits)
        return {"class": classes.sum() / normaliser, "box": (weights * boxes).sum() / normaliser}

    def own_logits(self, recording: DenseRecording) -> Tensor:
        """Of the anchors that the loss of classes looks at, (n, K)."""
        return self._counted(self.detector.joined(recording.output), recording)

    def truth(self, recording: DenseRecording) -> Tensor:
        """The class of an anchor, K where it is background."""
        labels = torch.cat(recording.labels)
        return labels[labels >= 0]

    @torch.no_grad()
    def mirrored_logits(
        self, features: dict[str, Tensor], recording: DenseRecording, width: int
    ) -> Tensor:
        """At the mirror image of every such anchor."""
        generator = self.detector.model.anchor_generator
        output = [
            [
                mirrored_level(value, own.shape[-2:], generator.offset, stride, width)
                for value, own, stride in zip(*levels, generator.strides, strict=True)
            ]
            for levels in zip(self.detector.head_output(features), recording.output, strict=True)
        ]
        return self._counted(self.detector.joined(output), recording)

    def _counted(self, predictions: Predictions, recording: DenseRecording) -> Tensor:
        return predictions.class_logits[torch.cat(recording.labels) >= 0]
