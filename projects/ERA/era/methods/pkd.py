"""PKD: the teacher's feature maps up to each channel's mean and scale (Pearson correlation).

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
arXiv 2207.02039; form and weight as in mmrazor's ``PKDLoss`` and its Faster R-CNN recipe.
"""

from __future__ import annotations

from typing import ClassVar

from detectron2.config import CfgNode, configurable
from torch import Tensor

from era.losses import mse, standardised
from era.methods.feature_method import FeatureMethod, align
from era.registry import METHOD_REGISTRY


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``1/2 MSE`` of maps standardised by channel, which is ``1 - r``, r Pearson's correlation of a channel's
    elements over images and positions, averaged over channels.

    Differs from mmrazor's code in the variance: over n, not n - 1, elements, so that the identity is exact
    and a map of one element gives 0 instead of nan; and in the guard against a constant channel, whose
    gradient is 0 here.

    Args:
        student: (B, C, H, W), with gradient.
        teacher: same shape, a constant.

    Returns:
        Scalar from 0 to 2, float32 or wider.
    """
    return 0.5 * mse(standardised(student), standardised(teacher.detach()))


@METHOD_REGISTRY.register()
class PKD(FeatureMethod):
    """``loss_pkd_feature = w sum_l pkd_loss(A(F_S^l), F_T^l)``.

    Args:
        levels: FPN levels.
        weight: w.
        channels: of the student's and of the teacher's maps; where they differ, ``A`` is a 1x1 conv shared by
            the levels (PKD itself compares models of equal width), else the identity.
    """

    idea = "match the teacher's FPN maps up to each channel's mean and scale"
    paper = "PKD, arXiv 2207.02039"
    loss_labels: ClassVar = {"loss_pkd_feature": "PKD: 1 − correlation of the FPN maps"}

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.PKD``."""
        cfg.MODEL.PKD = CfgNode()
        # FPN levels that are compared; their losses are summed. p6 is a part of p5.
        cfg.MODEL.PKD.LEVELS = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.PKD.WEIGHT = 6.0  # w, mmrazor's for Faster R-CNN; 0 switches the loss off

    @configurable
    def __init__(self, *, levels: list[str], weight: float, channels: tuple[int, int]):
        super().__init__(levels=levels, weight=weight)
        self.adapter = align(*channels).requires_grad_(weight > 0)

    def feature_loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """See :func:`pkd_loss`; summed over levels."""
        return sum(pkd_loss(self.adapter(student[level]), teacher[level]) for level in self.levels)
