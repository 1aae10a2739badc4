"""A dense detector's inference with the heads of two models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from era import compat

if TYPE_CHECKING:
    from era.modeling.detectors.dense import Dense


class BlendedDense:
    """Student backbone and FPN, then what the heads say, ``(1 - alpha) * student's + alpha * teacher's``: logits of
    classes, boxes in their coding, and whatever else. Test settings are the student's. At alpha 1 its head is not run.

    Args:
        student: provides backbone, its own head, anchors and test settings.
        teacher: of the same family; only its head and box coder are used.
        estimate: from the student's feature maps and preprocessed batch to the maps that the teacher's head sees.
        alpha: above 0, at most 1.
    """

    def __init__(
        self,
        student: Dense,
        teacher: Dense,
        estimate: Callable[[dict, Tensor], dict],
        alpha: float,
    ):
        self.student, self.teacher = student, teacher
        self.estimate = estimate
        self.alpha = alpha

    def __call__(self, batched_inputs: list[dict], do_postprocess: bool = True) -> list:
        """As :meth:`Detector.detect`."""
        student = self.student.model
        images = student.preprocess_image(batched_inputs)
        features = student.backbone(images.tensor)
        output = self.teacher.head_output(self.estimate(features, images.tensor))
        if self.alpha < 1:
            output = self._blend(self.student.head_output(features), output)
        # below alpha 1 both box coders are equal, which is checked when the method is built
        decoder = copy.copy(student)
        decoder.box2box_transform = self.teacher.model.box2box_transform
        maps = [features[level] for level in student.head_in_features]
        results = decoder.forward_inference(images, maps, output)
        if do_postprocess:
            return compat.postprocess(results, batched_inputs, images.image_sizes)
        return results

    def _blend(
        self, own: Sequence[list[Tensor]], other: Sequence[list[Tensor]]
    ) -> list[list[Tensor]]:
        return [
            [(1 - self.alpha) * a + self.alpha * b for a, b in zip(*levels, strict=True)]
            for levels in zip(own, other, strict=True)
        ]
