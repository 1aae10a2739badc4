"""Mimic: the teacher's feature maps themselves (FitNet's hint loss on the FPN).

Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550; form and weight as the mimic term beside DIST in
MasKD's mmrazor recipe of Faster R-CNN (``dist+mimic_cascade_mask_rcnn_x101-fpn_x50_coco.py``).
"""

from __future__ import annotations

from typing import ClassVar

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from era.losses import mse
from era.methods.feature_method import FeatureMethod
from era.registry import METHOD_REGISTRY


@METHOD_REGISTRY.register()
class Mimic(FeatureMethod):
    """``loss_mimic_feature = w sum_l MSE(A_l(F_S^l), F_T^l)``, the mean over a level's elements.

    Args:
        levels: FPN levels.
        weight: w.
        channels: of the student's and of the teacher's maps. ``A_l`` is a 1x1 conv at each level, also where they are
            equal, with torch's own start: as in the source.
    """

    idea = "copy the teacher's FPN maps, through a 1x1 conv at each level"
    paper = "FitNets, arXiv 1412.6550"
    loss_labels: ClassVar = {"loss_mimic_feature": "Mimic: MSE of the FPN maps"}

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.MIMIC``."""
        cfg.MODEL.MIMIC = CfgNode()
        # FPN levels that are compared; their losses are summed. p6 is a part of p5: the source has it too.
        cfg.MODEL.MIMIC.LEVELS = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.MIMIC.WEIGHT = 1.0  # w, the source's beside DIST; 0 switches the loss off

    @configurable
    def __init__(self, *, levels: list[str], weight: float, channels: tuple[int, int]):
        super().__init__(levels=levels, weight=weight)
        self.adapters = nn.ModuleDict({level: nn.Conv2d(*channels, 1) for level in levels})
        self.requires_grad_(weight > 0)

    def feature_loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """See the class."""
        return sum(mse(adapter(student[p]), teacher[p]) for p, adapter in self.adapters.items())
