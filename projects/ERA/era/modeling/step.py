"""One training step as the methods see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from era.modeling.detectors import Detector, Predictions, Recording, TaskLoss
from era.modeling.teacher import Teacher, aligned
from era.modeling.views import View


@dataclass
class Step:
    """One training step: what the student produced is there, the rest is computed when first asked for, once
    for all methods.

    Attributes:
        batched_inputs: the student's inputs.
        student: what the student's own forward produced.
        detector: the student.
        teacher: the frozen teacher; None if no method of the run needs one.
        labeled: whether there is ground truth. If not, what the recording calls ground truth is what the teacher
            detects: it chose the samples as in plain training, and no loss may look at it.
        teacher_maps: the teacher's own maps, not cut, where they are there already.
    """

    batched_inputs: list[dict]
    student: Recording
    detector: Detector
    teacher: Teacher | None = None
    labeled: bool = True
    teacher_maps: dict[str, Tensor] | None = None
    _views: dict[str, View] = field(default_factory=dict, repr=False)

    def view(self, name: str) -> View:
        """The same pictures seen another way, one for all methods that ask for it.

        Args:
            name: one of :data:`era.modeling.views.VIEWS`.
        """
        if name not in self._views:
            self._views[name] = View(self, name)
        return self._views[name]

    @cached_property
    def teacher_features(self) -> dict[str, Tensor]:
        """The teacher's FPN maps of the same images, level name to (B, C_T, H, W), no gradient; height and
        width equal the student's."""
        if self.teacher_maps is not None:
            return aligned(self.teacher_maps, self.student.features)
        size = tuple(self.student.images.tensor.shape[-2:])
        return self.teacher.features(self.batched_inputs, self.student.features, size)

    @cached_property
    def teacher_predictions(self) -> Predictions:
        """The teacher's predictions on the STUDENT's samples and the teacher's own features, no gradient;
        rows align with ``student.predictions``."""
        return self.teacher.predict(self.teacher_features, self.student.samples)

    @cached_property
    def class_logits(self) -> tuple[Tensor, Tensor]:
        """What student and teacher say of the classes of the student's samples, (R, K + 1) each, as far as the teacher
        knows these classes: see :meth:`shared`. The teacher's without gradient."""
        found = self.student.predictions.class_logits, self.teacher_predictions.class_logits
        return self.shared(found[0]), self.shared(found[1])

    def shared(self, logits: Tensor) -> Tensor:
        """Of class logits of the student's samples, (R, K + 1), what can be compared with the teacher's: all of them, or the
        samples and classes of :meth:`Detector.shared_logits` where it lacks a class (``MODEL.DISTILLER.CLASS_MAP``)."""
        teacher = self.teacher.detector
        if teacher.known_classes is None:
            return logits
        return teacher.shared_logits(logits, self.student.classes)

    @cached_property
    def shared_classes(self) -> Tensor:
        """The ground-truth class of each row of :attr:`class_logits` as a column of it, the last where it is background."""
        return self.teacher.detector.shared_labels(self.student.classes)

    @cached_property
    def task_losses(self) -> dict[str, TaskLoss]:
        """The student's own losses sample by sample, see :meth:`Detector.task_losses`.

        Raises:
            ValueError: there is no ground truth.
        """
        if not self.labeled:
            raise ValueError("a step without labels has no task losses")
        return self.detector.task_losses(self.student)
