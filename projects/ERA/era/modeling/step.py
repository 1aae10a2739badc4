"""One training step as the methods see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from era.modeling.detectors import Detector, Predictions, Recording, TaskLoss
from era.modeling.teacher import Teacher


@dataclass
class Step:
    """One training step: what the student produced is there, the rest is computed when first asked for, once
    for all methods.

    Attributes:
        batched_inputs: the student's inputs.
        student: what the student's own forward produced.
        detector: the student.
        teacher: the frozen teacher; None if no method of the run needs one.
    """

    batched_inputs: list[dict]
    student: Recording
    detector: Detector
    teacher: Teacher | None = None

    @cached_property
    def teacher_features(self) -> dict[str, Tensor]:
        """The teacher's FPN maps of the same images, level name to (B, C_T, H, W), no gradient; height and
        width equal the student's."""
        size = tuple(self.student.images.tensor.shape[-2:])
        return self.teacher.features(self.batched_inputs, self.student.features, size)

    @cached_property
    def teacher_predictions(self) -> Predictions:
        """The teacher's predictions on the STUDENT's samples and the teacher's own features, no gradient;
        rows align with ``student.predictions``."""
        return self.teacher.predict(self.teacher_features, self.student.samples)

    @cached_property
    def task_losses(self) -> dict[str, TaskLoss]:
        """The student's own losses sample by sample, see :meth:`Detector.task_losses`."""
        return self.detector.task_losses(self.student)
