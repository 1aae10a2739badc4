"""RetinaNet: Detectron2's, with focal and box losses over all anchors of p3 to p7."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.modeling import meta_arch
from torch import Tensor

from era.modeling.detectors.box_losses import box_losses
from era.modeling.detectors.dense import Dense
from era.modeling.detectors.dense_losses import focal_losses
from era.modeling.detectors.dense_record import DenseRecording
from era.modeling.detectors.families import DETECTOR_FAMILIES
from era.modeling.detectors.recording import Predictions, TaskLoss


@DETECTOR_FAMILIES.register()
class RetinaNet(Dense):
    """``RetinaNet`` (arXiv 1708.02002): predictions are class logits (n, K) and box deltas (n, 4)."""

    meta_architecture = "RetinaNet"
    model_class = meta_arch.RetinaNet
    keys = "RETINANET"
    class_loss = "loss_cls"

    def at_anchors(
        self, output: Sequence[list[Tensor]], collect: Callable[[list[Tensor], int], Tensor]
    ) -> Predictions:
        """Class logits and deltas."""
        logits, deltas = output
        return Predictions(collect(logits, self.num_classes), collect(deltas, 4))

    def anchor_losses(
        self, predictions: Predictions, recording: DenseRecording
    ) -> dict[str, TaskLoss]:
        """``loss_cls`` over anchors that are object or background, ``loss_box_reg`` over objects."""
        model, labels = self.model, torch.cat(recording.labels)
        rows = (labels >= 0).nonzero(as_tuple=True)[0]
        objects = ((labels >= 0) & (labels < recording.num_classes)).nonzero(as_tuple=True)[0]
        classes = focal_losses(
            predictions.class_logits[rows],
            labels[rows],
            model.focal_loss_alpha,
            model.focal_loss_gamma,
        )
        location = box_losses(
            model,
            recording.anchor_boxes(objects),
            torch.cat(recording.boxes)[objects],
            predictions.box_deltas[None, objects],
        )[0]
        return {
            "loss_cls": TaskLoss(classes, recording.normaliser, rows),
            "loss_box_reg": TaskLoss(location, recording.normaliser, objects),
        }

    def box_distances(
        self, predictions: Predictions, targets: Predictions, anchors: Tensor
    ) -> Tensor:
        """``|t - t_T|_1``, summed over the four deltas."""
        return (predictions.box_deltas - targets.box_deltas).abs().sum(1)

    def decoded(self, predictions: Predictions, anchors: Tensor) -> Tensor:
        """Boxes (n, 4) as x1, y1, x2, y2."""
        return self.model.box2box_transform.apply_deltas(predictions.box_deltas, anchors)

    def coder_settings(self) -> dict[str, tuple]:
        """``BBOX_REG_WEIGHTS``."""
        weights = tuple(self.model.box2box_transform.weights)
        return {"MODEL.RETINANET.BBOX_REG_WEIGHTS": weights}
