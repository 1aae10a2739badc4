"""CRLD: class distributions of two views of a picture, within a view and across, where the teacher is sure.

Zhang et al., "Cross-View Consistency Regularisation for Knowledge Distillation", arXiv 2412.16493; form and weights as
in the official ``mdistiller/distillers/CRLD.py``. That code classifies images: this is inspired by it, and mapped so:

* The weak view is the step itself, the strong one has other pixels of the same geometry (the source also crops and
  flips), so that the proposals that the student samples on the weak view stand for the same things in all four passes.
* A sample is a proposal, and most are background, of which every teacher is sure. So the teacher's class on the weak
  view tells objects and background apart; each kind is gated by how sure the teacher is of it, and has a mean of its own.
* The source's cross entropy on both views is the detector's own training on the weak view, which the student's losses
  are anyway, and the box head's class and box losses on the strong one; the RPN is not trained on it.
* tau is 1, the source's on ImageNet and what DKD and GDKD take in detection; it is 4 on CIFAR-100. The weights and
  thresholds are the source's, with its w_ce of CIFAR-100, 1, since the student's own losses keep theirs (2 on ImageNet).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor
from torch.nn import functional as F

from era.errors import UserError
from era.losses import logits_to_compare
from era.methods.base import Method, Needs
from era.methods.checks import check_class_logits, check_temperature, check_weights
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.modeling.views import SAME_GEOMETRY, STRONG, check_view
from era.registry import METHOD_REGISTRY


def crld_terms(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    temperature: float,
    confidence: tuple[float, float],
    background_weight: float,
) -> tuple[Tensor, Tensor]:
    """The within-view and the cross-view term, without their weights.

    With w the weak and s the strong view, ``KD(a, b) = tau^2 KL(p_T(a) || p_S(b))`` of a row, and ``m_w``, ``m_s`` 1
    where the teacher is sure of it on that view::

        L_wv = M[ m_w (KD(w, w) + KD(s, s)) ]        L_cv = M[ m_s (KD(w, s) + KD(s, w)) ]

    As in the source each mask gates both parts of a term, and counts rows that it leaves out. Not as there, M is the
    mean over object rows plus b times that over background rows, divided by 1 + b, by the teacher's likeliest class on
    the WEAK view; and it is sure of an object row if the highest probability of an object class is at least the
    threshold, of a background row if background's is. So a teacher who sees no object any more, where the strong view
    covers one, is not sure of that row and teaches nothing across views there. The source has one mean over all rows and
    the highest probability of any class.

    Args:
        student, teacher: logits on the weak and on the strong view, (R, K + 1) each with the background last, rows
            aligned. The teacher's are treated as constants.
        temperature: tau > 0, of the divergences; the teacher's probabilities in the masks have none.
        confidence: the thresholds tau_w and tau_s.
        background_weight: b >= 0.

    Returns:
        Two scalars >= 0, float32 or wider; 0, connected to the graph, of no row.
    """
    (own_weak, other_weak), (own_strong, other_strong) = map(logits_to_compare, student, teacher)
    is_object = other_weak.argmax(1) < other_weak.shape[1] - 1

    def gate(logits: Tensor, threshold: float) -> Tensor:
        probabilities = logits.softmax(1)
        objects, background = probabilities[:, :-1].amax(1), probabilities[:, -1]
        return torch.where(is_object, objects, background) >= threshold

    def kd(other: Tensor, own: Tensor) -> Tensor:
        own, other = ((x / temperature).log_softmax(1) for x in (own, other))
        return temperature**2 * F.kl_div(own, other, reduction="none", log_target=True).sum(1)

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        objects = (values * (mask & is_object)).sum() / is_object.sum().clamp(min=1)
        others = (values * (mask & ~is_object)).sum() / (~is_object).sum().clamp(min=1)
        return (objects + background_weight * others) / (1 + background_weight)

    within = kd(other_weak, own_weak) + kd(other_strong, own_strong)
    across = kd(other_weak, own_strong) + kd(other_strong, own_weak)
    return mean(within, gate(other_weak, confidence[0])), mean(across, gate(other_strong, confidence[1]))  # fmt: skip


@METHOD_REGISTRY.register()
class CRLD(Method):
    """``loss_crld_within = w_wv L_wv`` and ``loss_crld_cross = w_cv L_cv``, :func:`crld_terms` of all sampled proposals, and
    ``loss_crld_strong = w_ce L_roi``, the student's own class and box losses of the same proposals on the strong view.

    How many rows are objects differs from process to process, and each takes its own mean: with several processes a
    proposal counts by how many of its kind its own process has.

    Args:
        weights: ``within`` (w_wv), ``cross`` (w_cv) and ``strong`` (w_ce).
        temperature: tau.
        confidence: tau_w and tau_s.
        background_weight: b.
        view: the strong view's name.
    """

    idea = "match the teacher's class probabilities within and across two views, where it is sure"
    paper = "inspired by CRLD, arXiv 2412.16493 (on proposals: this project's)"
    loss_labels: ClassVar = {
        "loss_crld_within": "CRLD: classes within a view",
        "loss_crld_cross": "CRLD: classes across views",
        "loss_crld_strong": "CRLD: class and box of the strong view",
    }

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.CRLD``."""
        cfg.MODEL.CRLD = CfgNode()
        # The strong view: strong (colours, blur and cutout), photometric (no cutout) or cutout alone.
        cfg.MODEL.CRLD.VIEW = STRONG
        cfg.MODEL.CRLD.WITHIN_WEIGHT = 2.0  # w_wv; 0 switches the term off, as of the other two
        cfg.MODEL.CRLD.CROSS_WEIGHT = 0.5  # w_cv
        # w_ce, of the box head's own losses on the strong view; 1 as the source, where both views count alike.
        cfg.MODEL.CRLD.STRONG_WEIGHT = 1.0
        # tau_w and tau_s, probabilities from 0 to 1: how sure the teacher must be of a proposal on the weak view for the
        # within-view term, and on the strong one for the cross-view term.
        cfg.MODEL.CRLD.CONFIDENCE_WEAK = 0.9
        cfg.MODEL.CRLD.CONFIDENCE_STRONG = 0.2
        # b: what the mean over background counts beside 1 for the mean over objects; 0 leaves background out.
        cfg.MODEL.CRLD.BACKGROUND_WEIGHT = 1.0
        cfg.MODEL.CRLD.TEMPERATURE = 1.0  # tau: above 1 unlikely classes count more

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """A view of the step's geometry, weights of at least 0, a temperature above 0, confidences from 0 to 1."""
        keys = cfg.MODEL.CRLD
        check_view(keys.VIEW, "MODEL.CRLD.VIEW", SAME_GEOMETRY)
        check_weights({f"MODEL.CRLD.{key}": keys[key] for key in keys if key.endswith("_WEIGHT")})
        check_temperature("MODEL.CRLD.TEMPERATURE", keys.TEMPERATURE)
        for key in ("CONFIDENCE_WEAK", "CONFIDENCE_STRONG"):
            if not 0.0 <= keys[key] <= 1.0:
                raise UserError(
                    f"MODEL.CRLD.{key} is {keys[key]}: expected a probability from 0 to 1; set it so."
                )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher and a second view; labels if the strong view's own losses alone are on."""
        keys = cfg.MODEL.CRLD
        return Needs(labels=not (keys.WITHIN_WEIGHT or keys.CROSS_WEIGHT), more=("a second view",))

    @configurable
    def __init__(
        self,
        *,
        weights: dict[str, float],
        temperature: float,
        confidence: tuple[float, float],
        background_weight: float,
        view: str,
    ):
        super().__init__()
        self.weights = dict(weights)
        self.temperature = temperature
        self.confidence = confidence
        self.background_weight = background_weight
        self.view = view

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.CRLD``.

        Raises:
            UserError: the models' class distributions cannot be compared.
        """
        check_class_logits(student, teacher.detector, "CRLD")
        keys = cfg.MODEL.CRLD
        return {
            "weights": {
                "within": keys.WITHIN_WEIGHT,
                "cross": keys.CROSS_WEIGHT,
                "strong": keys.STRONG_WEIGHT,
            },
            "temperature": keys.TEMPERATURE,
            "confidence": (keys.CONFIDENCE_WEAK, keys.CONFIDENCE_STRONG),
            "background_weight": keys.BACKGROUND_WEIGHT,
            "view": keys.VIEW,
        }

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``loss_crld_within``, ``loss_crld_cross`` and, with labels, ``loss_crld_strong``, each unless its weight is 0."""
        if not any(self.weights.values()):
            return {}
        strong, terms = step.view(self.view), {}
        if self.weights["within"] > 0 or self.weights["cross"] > 0:
            terms["within"], terms["cross"] = crld_terms(
                *zip(step.class_logits, strong.class_logits, strict=True),
                temperature=self.temperature,
                confidence=self.confidence,
                background_weight=self.background_weight,
            )
        if step.labeled and self.weights["strong"] > 0:
            terms["strong"] = step.detector.prediction_loss(strong.predictions, step.student)
        return {
            f"loss_crld_{name}": self.weights[name] * term
            for name, term in terms.items()
            if self.weights[name] > 0
        }
