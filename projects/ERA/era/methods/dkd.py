"""DKD: the teacher's class distributions in two parts, how sure it is of the right class, and the others among themselves.

Zhao et al., "Decoupled Knowledge Distillation", arXiv 2203.08679; form and defaults as in the detection code of
mdistiller, ``detection/model/rcnn.py``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from era.losses import group_divergences, mean_of_rows
from era.methods.base import Method, Needs
from era.methods.checks import check_class_logits, check_temperature, check_weights
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY


def dkd_terms(
    student_logits: Tensor, teacher_logits: Tensor, classes: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """DKD's two terms, without their weights: TCKD and NCKD.

    With ``b = (p(y), 1 - p(y))``, and ``q`` the distribution over the classes other than y::

        TCKD = tau^2 KL(b_T || b_S)        NCKD = tau^2 KL(q_T || q_S)

    alpha = 1 and beta = 1 - p_T(y) of each row make KD of them. Differs from the source in the arithmetic, see
    :func:`~era.losses.group_divergences`; two classes leave one other, and NCKD is 0.

    Args:
        student_logits, teacher_logits: z, (R, C), rows aligned. The teacher's are treated as constants.
        classes: y, (R,), long, the right class of each row; background is a class.
        temperature: tau > 0.

    Returns:
        Two scalars >= 0, float32 or wider, means over rows; 0, connected to the graph, of no row.

    Raises:
        ValueError: there are not as many classes as rows.
    """
    if classes.shape != student_logits.shape[:1]:
        raise ValueError(
            f"shapes differ: {tuple(classes.shape)} classes, logits {tuple(student_logits.shape)}"
        )
    groups = torch.ones_like(student_logits, dtype=torch.long).scatter(1, classes[:, None], 0)
    target, within = group_divergences(student_logits, teacher_logits, groups, 2, temperature)
    return mean_of_rows(target), mean_of_rows(within[:, 1])


@METHOD_REGISTRY.register()
class DKD(Method):
    """``loss_dkd_target = w alpha TCKD`` and ``loss_dkd_others = w beta NCKD``, :func:`dkd_terms` with the ground-truth
    class of every sampled proposal, background included.

    Args:
        weight: w, of both; DKD has none in detection.
        alpha, beta: of the two terms.
        temperature: tau.
    """

    idea = "match how sure the teacher is of the right class, and apart from that its view of the others"
    paper = "DKD, arXiv 2203.08679"
    loss_labels: ClassVar = {
        "loss_dkd_target": "DKD: the right class against the rest",
        "loss_dkd_others": "DKD: the other classes among themselves",
    }

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.DKD``."""
        cfg.MODEL.DKD = CfgNode()
        cfg.MODEL.DKD.WEIGHT = 1.0  # w, of both terms; 0 switches the method off
        cfg.MODEL.DKD.ALPHA = 1.0  # alpha, of TCKD
        cfg.MODEL.DKD.BETA = 0.25  # beta, of NCKD; 8 on CIFAR
        cfg.MODEL.DKD.TEMPERATURE = 1.0  # tau

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Weights of at least 0, a temperature above 0."""
        keys = ("WEIGHT", "ALPHA", "BETA")
        check_weights({f"MODEL.DKD.{key}": cfg.MODEL.DKD[key] for key in keys})
        check_temperature("MODEL.DKD.TEMPERATURE", cfg.MODEL.DKD.TEMPERATURE)

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher, and labels: the right class parts the distribution."""
        return Needs()

    @configurable
    def __init__(self, *, weight: float, alpha: float, beta: float, temperature: float):
        super().__init__()
        self.weights = {"target": weight * alpha, "others": weight * beta}
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.DKD``.

        Raises:
            UserError: the models' class distributions cannot be compared.
        """
        check_class_logits(student, teacher.detector, "DKD")
        keys = cfg.MODEL.DKD
        return {
            "weight": keys.WEIGHT,
            "alpha": keys.ALPHA,
            "beta": keys.BETA,
            "temperature": keys.TEMPERATURE,
        }

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``loss_dkd_target`` and ``loss_dkd_others``, each unless its weight is 0."""
        if not any(self.weights.values()):
            return {}
        terms = dkd_terms(*step.class_logits, step.shared_classes, self.temperature)
        return {
            f"loss_dkd_{name}": weight * term
            for (name, weight), term in zip(self.weights.items(), terms, strict=True)
            if weight > 0
        }
