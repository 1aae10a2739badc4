"""CWD: where in a picture each channel of the teacher's feature maps is active.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", arXiv 2011.13256; form and weights as in
mmrazor's ``ChannelWiseDivergence`` and its Faster R-CNN recipe.
"""

from __future__ import annotations

from typing import ClassVar

from detectron2.config import CfgNode, configurable
from torch import Tensor

from era.losses import check_same_shape, kd_loss
from era.methods.checks import check_temperature
from era.methods.feature_method import FeatureMethod, align
from era.modeling.detectors import Detector
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``tau^2 / (B C) sum_bc KL(softmax_x(T_bc / tau) || softmax_x(S_bc / tau))``: a distribution over the positions x
    of each channel c of each image b.

    Args:
        student: (B, C, H, W), with gradient.
        teacher: same shape, a constant.
        temperature: tau > 0.

    Returns:
        Scalar >= 0, float32 or wider.
    """
    check_same_shape(student, teacher)
    return kd_loss(student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1), temperature)


@METHOD_REGISTRY.register()
class CWD(FeatureMethod):
    """``loss_cwd_feature = w sum_l cwd_loss(A(F_S^l), F_T^l)``.

    Args:
        levels: FPN levels.
        weight: w.
        temperature: tau.
        channels: of the student's and of the teacher's maps; where they differ, ``A`` is a 1x1 conv shared by the
            levels (the recipe compares models of equal width and has none), else the identity.
    """

    idea = "match where each channel of the teacher's FPN maps is active"
    paper = "CWD, arXiv 2011.13256"
    loss_labels: ClassVar = {"loss_cwd_feature": "CWD: KL over the positions of a channel"}

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.CWD``."""
        cfg.MODEL.CWD = CfgNode()
        # FPN levels that are compared; their losses are summed. p6 is a part of p5: mmrazor's recipe has it too.
        cfg.MODEL.CWD.LEVELS = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.CWD.WEIGHT = 10.0  # w, mmrazor's for Faster R-CNN; 0 switches the loss off
        cfg.MODEL.CWD.TEMPERATURE = 1.0  # tau, above 0

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """And a temperature above 0."""
        super().check_config(cfg)
        check_temperature("MODEL.CWD.TEMPERATURE", cfg.MODEL.CWD.TEMPERATURE)

    @configurable
    def __init__(
        self, *, levels: list[str], weight: float, temperature: float, channels: tuple[int, int]
    ):
        super().__init__(levels=levels, weight=weight)
        self.temperature = temperature
        self.adapter = align(*channels).requires_grad_(weight > 0)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.CWD``."""
        common = super().from_config(cfg, student, teacher)
        return {**common, "temperature": cfg.MODEL.CWD.TEMPERATURE}

    def feature_loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """See :func:`cwd_loss`; summed over levels."""
        return sum(
            cwd_loss(self.adapter(student[level]), teacher[level], self.temperature)
            for level in self.levels
        )
