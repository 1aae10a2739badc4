"""DIST: the teacher's class probabilities up to their mean and scale, over the classes and over the proposals.

Huang et al., "Knowledge Distillation from A Stronger Teacher", arXiv 2205.10536; form and defaults as in MasKD's
``dist_kd.py`` and its Faster R-CNN recipe.
"""

from __future__ import annotations

from typing import ClassVar

from detectron2.config import CfgNode, configurable
from torch import Tensor

from era.losses import logits_to_compare, mean_of_rows
from era.methods.base import Method, Needs
from era.methods.checks import check_class_logits, check_temperature, check_weights
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row, (n, m) and (n, m) to (n,), from -1 to 1; 0 for rows without variance.

    The source's guard against those, 1e-8 added to the product of the norms, is kept: it also lets rows of very small
    numbers count less. A row that is constant to the last bit, as of a predictor of zeros, gets a gradient in the
    order of 1e8, which float32 holds and float16 does not.
    """
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def dist_terms(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """DIST's two terms, without their weights: ``L_inter`` and ``L_intra``.

    With p the probabilities, softmax(z / tau), a matrix of R proposals by C classes, and r Pearson's correlation::

        L_inter = mean over rows of 1 - r(p_S, p_T)        L_intra = mean over columns of 1 - r(p_S, p_T)

    Differs from the source where there is nothing to compare: ``L_intra`` of one row, which is 1 there, is 0. The
    source has no tau, which is tau = 1. Of two classes a row has two numbers of known sum: r is 1 or -1, and
    ``L_inter`` sends no gradient.

    Args:
        student_logits, teacher_logits: z, (R, C), rows aligned. The teacher's are treated as constants.
        temperature: tau > 0.

    Returns:
        Two scalars from 0 to 2, float32 or wider; 0, connected to the graph, of no row.
    """
    own, other = (
        (x / temperature).softmax(1) for x in logits_to_compare(student_logits, teacher_logits)
    )
    inter = mean_of_rows(1 - correlation(own, other))
    if len(own) < 2:
        return inter, own.sum() * 0
    return inter, (1 - correlation(own.T, other.T)).mean()


@METHOD_REGISTRY.register()
class DIST(Method):
    """``loss_dist_inter = w beta L_inter`` and ``loss_dist_intra = w gamma L_intra``, :func:`dist_terms` of all sampled
    proposals.

    ``L_intra`` compares the proposals of a process' images with each other, so what it is depends on how a batch is
    split among processes; the others of the class methods are means over proposals and do not.

    Args:
        weight: w, of both.
        beta, gamma: of the two terms.
        temperature: tau.
    """

    idea = "match the teacher's class probabilities up to mean and scale, over classes and over proposals"
    paper = "DIST, arXiv 2205.10536"
    loss_labels: ClassVar = {
        "loss_dist_inter": "DIST: 1 − correlation over the classes",
        "loss_dist_intra": "DIST: 1 − correlation over the proposals",
    }

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.DIST``."""
        cfg.MODEL.DIST = CfgNode()
        cfg.MODEL.DIST.WEIGHT = 1.0  # w, of both terms; 0 switches the method off
        cfg.MODEL.DIST.BETA = 1.0  # beta, of L_inter
        cfg.MODEL.DIST.GAMMA = 1.0  # gamma, of L_intra
        cfg.MODEL.DIST.TEMPERATURE = 1.0  # tau

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Weights of at least 0, a temperature above 0."""
        keys = ("WEIGHT", "BETA", "GAMMA")
        check_weights({f"MODEL.DIST.{key}": cfg.MODEL.DIST[key] for key in keys})
        check_temperature("MODEL.DIST.TEMPERATURE", cfg.MODEL.DIST.TEMPERATURE)

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher, and no labels."""
        return Needs(labels=cfg.MODEL.DIST.WEIGHT == 0)

    @configurable
    def __init__(self, *, weight: float, beta: float, gamma: float, temperature: float):
        super().__init__()
        self.weights = {"inter": weight * beta, "intra": weight * gamma}
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.DIST``.

        Raises:
            UserError: the models' class distributions cannot be compared.
        """
        check_class_logits(student, teacher.detector, "DIST")
        keys = cfg.MODEL.DIST
        return {
            "weight": keys.WEIGHT,
            "beta": keys.BETA,
            "gamma": keys.GAMMA,
            "temperature": keys.TEMPERATURE,
        }

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``loss_dist_inter`` and ``loss_dist_intra``, each unless its weight is 0."""
        if not any(self.weights.values()):
            return {}
        terms = dist_terms(*step.class_logits, self.temperature)
        return {
            f"loss_dist_{name}": weight * term
            for (name, weight), term in zip(self.weights.items(), terms, strict=True)
            if weight > 0
        }
