"""An R-CNN read in another detector's words: the layers with an output for every class, and the levels of its heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from era.errors import UserError
from era.modeling.detectors.reading import NEVER, ClassLayer, Reading

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


class RCNNReading(Reading):
    """Of a ``GeneralizedRCNN`` as ``model``."""

    def class_layers(self) -> dict[str, ClassLayer]:
        """Of classes and, where they are by class, of boxes and masks; see :func:`rcnn_class_layers`."""
        return rcnn_class_layers(self)

    def read_classes(self, index: Sequence[int | None]) -> None:
        """See :meth:`Reading.read_classes` and :func:`check_readable`."""
        check_readable(self)
        super().read_classes(index)

    def set_num_classes(self, count: int) -> None:
        """Of the ROI heads and their predictors."""
        self.model.roi_heads.num_classes = count
        for stage in self.box_stages:
            stage.predictor.num_classes = count

    def rename_levels(self, names: Mapping[str, str]) -> None:
        """Of RPN and ROI heads, with masks and keypoints."""
        for part in (self.model.proposal_generator, self.model.roi_heads):
            for key in (
                "in_features",
                "box_in_features",
                "mask_in_features",
                "keypoint_in_features",
            ):
                if getattr(part, key, None):
                    setattr(part, key, [names[level] for level in getattr(part, key)])

    @property
    def judged_by(self) -> Callable[[Tensor], Tensor] | None:
        """:meth:`knows`, None if every class is known."""
        return None if self.known_classes is None else self.knows
