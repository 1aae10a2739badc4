"""KD: the teacher's class distribution of every proposal (Hinton et al., "Distilling the Knowledge in a Neural
Network", arXiv 1503.02531).

That paper classifies images. On a detector's proposals the distribution is that over classes and background, of the
STUDENT's sampled proposals through both box heads, as mdistiller's detection code compares them for DKD. No source gives
detection a setting of its own: tau = 1 and a weight of 1 are DKD's in detection.
"""

from __future__ import annotations

from typing import ClassVar

from detectron2.config import CfgNode, configurable
from torch import Tensor

from era.losses import kd_loss
from era.methods.base import Method, Needs
from era.methods.checks import check_class_logits, check_temperature, check_weights
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY


@METHOD_REGISTRY.register()
class KD(Method):
    """``loss_kd_classes = w tau^2 KL(p_T || p_S)``, :func:`~era.losses.kd_loss`, mean over the sampled proposals.

    Args:
        weight: w.
        temperature: tau.
    """

    idea = "match the teacher's class distribution of every proposal"
    paper = "KD, arXiv 1503.02531 (on proposals: as DKD's detection code)"
    loss_labels: ClassVar = {"loss_kd_classes": "KD: classes of the proposals"}

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.KD``."""
        cfg.MODEL.KD = CfgNode()
        cfg.MODEL.KD.WEIGHT = 1.0  # w; 0 switches the loss off
        cfg.MODEL.KD.TEMPERATURE = 1.0  # tau: above 1 unlikely classes count more

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """A weight of at least 0, a temperature above 0."""
        check_weights({"MODEL.KD.WEIGHT": cfg.MODEL.KD.WEIGHT})
        check_temperature("MODEL.KD.TEMPERATURE", cfg.MODEL.KD.TEMPERATURE)

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher, and no labels."""
        return Needs(labels=cfg.MODEL.KD.WEIGHT == 0)

    @configurable
    def __init__(self, *, weight: float, temperature: float):
        super().__init__()
        self.weight = weight
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.KD``.

        Raises:
            UserError: the models' class distributions cannot be compared.
        """
        check_class_logits(student, teacher.detector, "KD")
        return {"weight": cfg.MODEL.KD.WEIGHT, "temperature": cfg.MODEL.KD.TEMPERATURE}

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``loss_kd_classes``, unless its weight is 0."""
        if self.weight == 0:
            return {}
        loss = kd_loss(*step.class_logits, self.temperature)
        return {"loss_kd_classes": self.weight * loss}
