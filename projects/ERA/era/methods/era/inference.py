"""ERA at alpha 1 as one ordinary model: the student's backbone with MBRNet under the teacher's heads."""

from __future__ import annotations

import copy

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor

from era.methods.era.mbrnet import FeatureEstimator


class EstimatingBackbone(Backbone):
    """The student's backbone and FPN, then adapter and MBRNet: its features are ``e_N``.

    Args:
        student: backbone of the student, size divisibility included; copied.
        estimator: gives ``e_N`` from the student's maps; copied.
        channels: of ``e_N``, the teacher's.
    """

    def __init__(self, student: Backbone, estimator: FeatureEstimator, channels: int):
        super().__init__()
        self.student = copy.deepcopy(student)
        self.estimator = copy.deepcopy(estimator)
        self._channels = channels

    @property
    def size_divisibility(self) -> int:
        """The student's."""
        return self.student.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The student's."""
        return self.student.padding_constraints

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Teacher's channels at the student's strides, for the estimated levels."""
        shapes = self.student.output_shape()
        return {
            level: ShapeSpec(channels=self._channels, stride=shapes[level].stride)
            for level in self.estimator.levels
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``e_N`` by level, each (B, C_T, H, W), of images (B, 3, height, width)."""
        return self.estimator.final(self.student(images))
