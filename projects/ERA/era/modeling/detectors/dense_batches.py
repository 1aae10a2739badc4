"""Inference of RetinaNet and FCOS over a batch in one piece, see :mod:`~era.modeling.detectors.batches`."""

from __future__ import annotations

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor

from era.modeling.detectors.batches import BatchDetections, Batches, choose, decode, smaller, take
from era.modeling.detectors.recording import Predictions


class DenseBatches(Batches):
    """``_decode_multi_level_predictions`` and ``inference_single_image`` of Detectron2, with the pictures as an axis."""

    def check_batches(self) -> None:
        """Always."""

    def class_scores(self, predictions: Predictions) -> Tensor:
        """Scores (n, K) that detections are chosen by, out of what the head says of n anchors."""
        return predictions.class_logits.sigmoid()

    def detect_batch(
        self, features: dict[str, Tensor], sizes: Tensor, *, fixed: bool
    ) -> BatchDetections:
        """The best of each level, then the best of all; boxes are not cut to the picture, as in Detectron2."""
        model, count = self.model, self.num_classes
        maps = [features[level] for level in model.head_in_features]
        output = model.head(maps)
        by_level = []
        for level, anchors in enumerate(model.anchor_generator(maps)):
            predictions = self.at_anchors(
                [[part[level]] for part in output],
                lambda own, size: permute_to_N_HWA_K(own[0], size).flatten(0, 1),
            )
            pictures = output[0][level].shape[0]
            scores = self.class_scores(predictions).reshape(pictures, -1)
            most = smaller(scores.shape[1], model.test_topk_candidates, fixed=fixed)
            scores, order = scores.topk(most, dim=1)
            places = torch.div(order, count, rounding_mode="trunc")
            deltas = predictions.box_deltas[:, :4].reshape(pictures, -1, 4)
            boxes = decode(model.box2box_transform, take(deltas, places), anchors.tensor, places)
            by_level.append((scores, boxes, order - places * count))
        scores, boxes, classes = (torch.cat(parts, 1) for parts in zip(*by_level, strict=True))
        return choose(
            scores,
            lambda rows: take(boxes, rows),
            lambda rows: take(classes, rows),
            num_classes=count,
            fixed=fixed,
            **self.thresholds,
        )
