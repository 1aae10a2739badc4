"""ERA at alpha 1 as one ordinary model: the student's backbone with MBRNet under the teacher's heads."""

from __future__ import annotations

import copy

from detectron2.modeling import Backbone
from torch import Tensor

from era.methods.era.mbrnet import FeatureEstimator
from era.modeling.backbones.estimating import EstimatingBackbone


class ExpandedBackbone(EstimatingBackbone):
    """The student's backbone and FPN, then adapter and MBRNet: its features are ``e_N``.

    Args:
        student: see :class:`~era.modeling.backbones.estimating.EstimatingBackbone`.
        estimator: gives ``e_N`` from the student's maps; copied.
        channels: of ``e_N``, the teacher's.
    """

    def __init__(self, student: Backbone, estimator: FeatureEstimator, channels: int):
        super().__init__(student, estimator.levels, channels)
        self.estimator = copy.deepcopy(estimator)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``e_N`` by level, each (B, C_T, H, W), of images (B, 3, height, width)."""
        return self.estimator.final(self.student(images))
