"""Which layers of an R-CNN's heads have an output for every class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from era.errors import UserError
from era.modeling.detectors.class_layers import NEVER, ClassLayer

if TYPE_CHECKING:
    from era.modeling.detectors.rcnn import RCNN


def rcnn_class_layers(detector: RCNN) -> dict[str, ClassLayer]:
    """``cls_score`` of every box head, its ``bbox_pred`` where boxes are by class, and the last layer of a mask head where
    masks are; by their names in the model."""
    names = {id(module): name for name, module in detector.model.named_modules()}
    found = []
    for _, predictor in detector.box_stages:
        found.append(ClassLayer(predictor.cls_score, background=True, absent=NEVER))
        size = len(predictor.box2box_transform.weights)
        if predictor.bbox_pred.out_features != size:
            found.append(ClassLayer(predictor.bbox_pred, size=size))
    if detector.mask_on:
        layer = detector.model.roi_heads.mask_head.predictor
        if layer.out_channels > 1:
            found.append(ClassLayer(layer))
    return {names[id(layer.module)]: layer for layer in found}


def check_readable(detector: RCNN) -> None:
    """The teacher's heads can be read as those of other classes.

    Raises:
        UserError: heads or masks of another form, or federated losses, whose classes are drawn by weights of their own.
    """
    heads = detector.model.roi_heads
    found, remedy = None, "choose MODEL.DISTILLER.CLASS_MAP feature_only, or name another teacher"
    if not detector.has_plain_heads():
        found = f"{type(heads).__name__} as heads"
    elif any(stage.predictor.use_fed_loss for stage in detector.box_stages):
        found = "MODEL.ROI_BOX_HEAD.USE_FED_LOSS True"
        remedy = "set it False in MODEL.TEACHER.OPTS"
    elif detector.mask_on:
        layer = getattr(heads.mask_head, "predictor", None)
        if not isinstance(layer, nn.Conv2d) or layer.out_channels not in (1, detector.num_classes):
            found = f"a {type(heads.mask_head).__name__} for masks"
    if found:
        raise UserError(
            f"the teacher has {found}, and its classes are not the student's: expected StandardROIHeads (or CascadeROIHeads) "
            f"without federated losses, with masks of a MaskRCNNConvUpsampleHead if any, to be read by class; {remedy}."
        )
