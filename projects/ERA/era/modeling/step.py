"""One training step as the methods see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from era.modeling.detectors.rcnn import Recording
from era.modeling.teacher import Teacher


@dataclass
class DistillationStep:
    """One training step as the methods see it; everything is computed once for all of them.

    Attributes:
        student: what the student's own forward produced, see :class:`era.modeling.detectors.rcnn.Recording`.
        teacher: the frozen teacher.
        teacher_features: its FPN maps of the same images, level name to (B, C_T, H, W), no gradient;
            height and width equal the student's.
    """

    student: Recording
    teacher: Teacher
    teacher_features: dict[str, Tensor]

    @cached_property
    def teacher_predictions(self) -> tuple[Tensor, Tensor]:
        """The teacher's ROI class logits (R, K + 1) and deltas (R, 4K or 4), without gradient, on the
        STUDENT's sampled proposals and the teacher's own features, so that rows align with
        ``student.roi_predictions``. Computed when first asked for."""
        return self.teacher.predict_rois(self.teacher_features, self.student.proposals)
