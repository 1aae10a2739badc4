"""A backbone whose maps are estimates of a teacher's, for models with the teacher's heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone


class EstimatingBackbone(Backbone):
    """The student's backbone and FPN, and what a method makes of their maps; a subclass has the ``forward``.

    Args:
        student: backbone of the student, size divisibility included; copied.
        levels: FPN levels that are estimated.
        channels: of the estimates, the teacher's.
    """

    def __init__(self, student: Backbone, levels: Sequence[str], channels: int):
        super().__init__()
        self.student = copy.deepcopy(student)
        self.levels = tuple(levels)
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
            for level in self.levels
        }
