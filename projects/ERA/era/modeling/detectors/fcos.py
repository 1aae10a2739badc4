"""FCOS: Detectron2's, one anchor point a position, with distances to the sides and centerness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch import fcos
from torch import Tensor
from torch.nn import functional as F

from era.modeling.detectors.box_losses import box_losses
from era.modeling.detectors.dense import Dense
from era.modeling.detectors.dense_losses import (
    bernoulli_divergence,
    centerness,
    focal_losses,
)
from era.modeling.detectors.dense_record import DenseRecording
from era.modeling.detectors.families import DETECTOR_FAMILIES
from era.modeling.detectors.fcos_model import add_fcos_config
from era.modeling.detectors.recording import Predictions, TaskLoss

# Of boxes that are compared, in strides: GIoU of a box without area is 0, also with itself.
LEAST_DISTANCE = 0.01


@DETECTOR_FAMILIES.register()
class FCOS(Dense):
    """``FCOS`` (arXiv 1904.01355 and 2006.09214): predictions are class logits (n, K), and (n, 5): the distances to the sides
    l, t, r, b in strides, which count from 0 on, and the logit of centerness."""

    meta_architecture = "FCOS"
    model_class = fcos.FCOS
    keys = "FCOS"
    class_loss = "loss_fcos_cls"

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """``MODEL.FCOS``."""
        add_fcos_config(cfg)

    def at_anchors(
        self, output: Sequence[list[Tensor]], collect: Callable[[list[Tensor], int], Tensor]
    ) -> Predictions:
        """Class logits, and distances with centerness."""
        logits, deltas, center = output
        located = torch.cat([collect(deltas, 4), collect(center, 1)], dim=1)
        return Predictions(collect(logits, self.num_classes), located)

    def anchor_losses(
        self, predictions: Predictions, recording: DenseRecording
    ) -> dict[str, TaskLoss]:
        """``loss_fcos_cls`` over all anchor points that count, ``loss_fcos_loc`` (GIoU) and ``loss_fcos_ctr`` over
        objects'."""
        model, labels = self.model, torch.cat(recording.labels)
        rows = (labels >= 0).nonzero(as_tuple=True)[0]
        objects = ((labels >= 0) & (labels < recording.num_classes)).nonzero(as_tuple=True)[0]
        classes = focal_losses(
            predictions.class_logits[rows],
            labels[rows],
            model.focal_loss_alpha,
            model.focal_loss_gamma,
        )
        located = predictions.box_deltas[objects]
        anchors = recording.anchor_boxes(objects)
        matched = torch.cat(recording.boxes)[objects]
        coder = model.box2box_transform
        kind = SimpleNamespace(box2box_transform=coder, box_reg_loss_type="giou")
        truth = centerness(coder.get_deltas(anchors, matched)).to(located.dtype)
        center = F.binary_cross_entropy_with_logits(located[:, 4], truth, reduction="none")
        values = {
            "loss_fcos_cls": (classes, rows),
            "loss_fcos_loc": (box_losses(kind, anchors, matched, located[None, :, :4])[0], objects),
            "loss_fcos_ctr": (center, objects),
        }
        return {
            name: TaskLoss(own, recording.normaliser, where)
            for name, (own, where) in values.items()
        }

    def overlap_distances(
        self, predictions: Predictions, targets: Predictions, anchors: Tensor
    ) -> Tensor:
        """``1 - GIoU(b, b_T) + KL(c_T || c)``, c centerness."""
        center = (x.box_deltas[:, 4] for x in (predictions, targets))
        boxes = super().overlap_distances(predictions, targets, anchors)
        return boxes + bernoulli_divergence(*center)

    def box_distances(
        self, predictions: Predictions, targets: Predictions, anchors: Tensor
    ) -> Tensor:
        """:meth:`overlap_distances`: FCOS's own loss of boxes is GIoU."""
        return self.overlap_distances(predictions, targets, anchors)

    def decoded(self, predictions: Predictions, anchors: Tensor) -> Tensor:
        """Boxes (n, 4) as x1, y1, x2, y2, of distances of at least :data:`LEAST_DISTANCE`."""
        distances = predictions.box_deltas[:, :4].clamp(min=LEAST_DISTANCE)
        return self.model.box2box_transform.apply_deltas(distances, anchors)

    def class_scores(self, predictions: Predictions) -> Tensor:
        """``sqrt(class probability * centerness)``, arXiv 2006.09214, eq. 4."""
        center = predictions.box_deltas[:, 4:5]
        return (predictions.class_logits.sigmoid() * center.sigmoid()).sqrt()

    def coder_settings(self) -> dict[str, tuple]:
        """Whether distances are in strides."""
        coder = self.model.box2box_transform
        return {"the box coder": (type(coder).__name__, coder.normalize_by_size)}
