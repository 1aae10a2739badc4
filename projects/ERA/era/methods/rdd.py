"""RDD: the student's own losses of classes count by how difficult a sample is for the teacher, then for both models.

Liang et al., "Relative Difficulty Distillation for Semantic Segmentation", arXiv 2407.03719; form as in ``sunyueue/RDD``.
That is for the pixels of a segmentation; here it is for anchors and proposals, so it is inspired by it.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn import functional as F

from era.errors import UserError
from era.losses import at_least_float32, kd_loss
from era.methods.base import Chart, Method, Needs
from era.methods.checks import check_class_logits, check_every_class, check_weights
from era.modeling.detectors import Detector
from era.modeling.detectors.parts import HeadPart
from era.modeling.detectors.recording import SAMPLED_POSITIONS
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

# Of the samples that are hard for the student and for the teacher, those that are learnt from in the second stage.
SELECTIONS = {
    "xor": torch.logical_xor,
    "or": torch.logical_or,
    "and": torch.logical_and,
    "ohem": lambda student, teacher: student,
}


def log_probabilities(logits: Tensor) -> Tensor:
    """``log p`` of classes, (n, C), from logits (n, C), or (n, 2) of absent and there from logits (n,) of one class."""
    logits = at_least_float32(logits)
    if logits.dim() == 1:
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1)
    return F.log_softmax(logits, dim=1)


def easiness(logits: Tensor, other: Tensor) -> Tensor:
    """``e^{-d}``, ``d = KL(p_other || p)`` between two predictions of the teacher: 1 where they agree.

    RDD's first stage, where ``p`` is of the main head and ``p_other`` of an auxiliary head.

    Args:
        logits, other: (n, C) or (n,), rows aligned.

    Returns:
        (n,), above 0, at most 1.
    """
    own, other = log_probabilities(logits), log_probabilities(other)
    return (-(other.exp() * (other - own)).sum(1)).exp().clamp(max=1)


def is_hard(logits: Tensor, truth: Tensor, threshold: float, part: float) -> Tensor:
    """Whether ``p(truth) <= max(threshold, k-th smallest p(truth))``, k the given part of the samples.

    RDD's ``max(.7, 100,000-th smallest)`` of 8 crops of 512x1024 pixels a GPU: at least k samples are hard. k is a
    part here, since the number of samples is not that of pixels.

    Args:
        logits: (n, C) or (n,); truth: (n,), long.

    Returns:
        (n,), bool.
    """
    own = log_probabilities(logits).gather(1, truth[:, None])[:, 0].exp()
    count = math.ceil(part * len(own))
    if count == 0:
        return own <= threshold
    return own <= own.kthvalue(count).values.clamp(min=threshold)


def mean_of_selected(selected: Tensor) -> Tensor:
    """Weights (n,) with which the mean over all samples is that over the selected ones, 0 if none is."""
    selected = selected.float()
    return selected * (len(selected) / selected.sum().clamp(min=1))


@METHOD_REGISTRY.register()
class RDD(Method):
    """Weights of the student's losses of classes, sample by sample, and ``loss_rdd_kd = lambda KL(p_T || p_S)``.

    Stage 1, easy samples first: the weight is ``e^{-d}``, d how far apart two predictions of the teacher are. Stage 2,
    from ``switch_iter`` on: the loss is the mean over the samples that are hard for exactly one of teacher and student.
    The KL is of the ROI's classes on the student's sampled proposals, in both stages.

    How it is mapped, which no source says: samples are the RPN's sampled anchors, with the binary distribution of
    objectness, and the sampled proposals, with the distribution of classes; the two losses are weighted each by its own
    samples. A Faster R-CNN has no auxiliary head, so the teacher's second prediction is the one on the mirrored
    pictures, at the mirrored anchors and proposals. Losses of boxes stay: RDD has none, and samples that both
    models classify well would teach no box in stage 2. Thresholds and means are of a process's own batch, as RDD's. RDD's
    first stage is one iteration shorter (it counts from 1), and its losses of pixels have class weights and an auxiliary
    head of the student.

    Args:
        student, teacher: whose anchors and proposals, and whose judgement.
        reweight: whether there are weights at all.
        switch_iter, max_iter: the first iteration of stage 2, and the run's number of iterations.
        select: which samples stage 2 learns from, one of ``SELECTIONS``.
        threshold, min_hard: as :func:`is_hard` has them.
        blend: stage 2 goes over from the first stage's weights to its own, linearly to the end of the run.
        kd_weight, temperature: lambda and tau of the KL.
    """

    idea = "the student's own losses count by how difficult a sample is for the teacher, then for one of both"
    paper = "inspired by RDD, arXiv 2407.03719"
    loss_labels: ClassVar = {"loss_rdd_kd": "RDD: KL of ROI classes"}
    charts: ClassVar = (
        Chart(
            title="RDD: what counts of the student's losses of classes",
            y_label="mean weight, or part selected",
            pattern=r"rdd/(?P<curve>\w+/(easiness|selected))",
            curve_name=lambda curve: curve.replace("/", ", "),
            explanation="Stage 1: the mean of e^-d, 1 where the teacher agrees with itself on the mirrored picture. "
            "Stage 2: the part of the samples that is learnt from.",
        ),
    )

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.RDD``."""
        cfg.MODEL.RDD = CfgNode()
        cfg.MODEL.RDD.REWEIGHT = True  # weight the student's losses; False leaves the KL alone
        # First iteration of stage 2; RDD's of 40,000. 0 = stage 2 alone.
        cfg.MODEL.RDD.SWITCH_ITER = 4000
        # Stage 2 learns from samples that are hard for one of teacher and student (xor), for at least one (or), for
        # both (and), or for the student (ohem).
        cfg.MODEL.RDD.SELECT = "xor"
        cfg.MODEL.RDD.THRESHOLD = 0.7  # a sample is hard up to this p(truth),
        # or up to that of the hardest samples that make this part of all; RDD's 100,000 of 8 * 512 * 1024 pixels.
        cfg.MODEL.RDD.MIN_HARD = 0.024
        # Stage 2 starts with the weights of stage 1 and goes over to its own by SOLVER.MAX_ITER.
        cfg.MODEL.RDD.BLEND = False
        cfg.MODEL.RDD.LAMBDA = 1.0  # lambda, weight of the KL of ROI classes; 0 switches it off
        cfg.MODEL.RDD.TEMPERATURE = 1.0  # tau of the KL

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Weights of at least 0, probabilities from 0 to 1, a known selection."""
        own = cfg.MODEL.RDD
        check_weights({"MODEL.RDD.LAMBDA": own.LAMBDA})
        if not 0 < own.TEMPERATURE < float("inf"):
            raise UserError(
                f"MODEL.RDD.TEMPERATURE is {own.TEMPERATURE}: expected a finite number above 0; set it so."
            )
        for key in ("THRESHOLD", "MIN_HARD"):
            if not 0 <= own[key] <= 1:
                raise UserError(
                    f"MODEL.RDD.{key} is {own[key]}: expected a number from 0 to 1; set it so."
                )
        if own.SWITCH_ITER < 0:
            raise UserError(
                f"MODEL.RDD.SWITCH_ITER is {own.SWITCH_ITER}: expected an iteration of at least 0; set it so."
            )
        if own.SELECT not in SELECTIONS:
            raise UserError(
                f"MODEL.RDD.SELECT is {own.SELECT!r}: expected one of {', '.join(SELECTIONS)}."
            )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher. The weights need labels, the KL does not."""
        return Needs(labels=cfg.MODEL.RDD.LAMBDA == 0)

    @configurable
    def __init__(
        self,
        *,
        student: Detector,
        teacher: Teacher,
        reweight: bool,
        switch_iter: int,
        max_iter: int,
        select: str,
        threshold: float,
        min_hard: float,
        blend: bool,
        kd_weight: float,
        temperature: float,
    ):
        super().__init__()
        self._models = (student, teacher.detector)  # in a tuple: no submodules
        self.reweights = reweight
        self.switch_iter, self.max_iter = switch_iter, max_iter
        self.select = SELECTIONS[select]
        self.threshold, self.min_hard = threshold, min_hard
        self.blend = blend
        self.kd_weight, self.temperature = kd_weight, temperature

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.RDD``.

        Raises:
            UserError: anchors differ, or a head of student or teacher is none whose classes exclude each other.
        """
        own = cfg.MODEL.RDD
        if own.REWEIGHT:
            _check_parts(student, teacher.detector)
            check_every_class(teacher, "RDD (MODEL.RDD.REWEIGHT)")
        if own.LAMBDA > 0:
            check_class_logits(student, teacher.detector, "RDD with MODEL.RDD.LAMBDA above 0")
        return {
            "student": student,
            "teacher": teacher,
            "reweight": own.REWEIGHT,
            "switch_iter": own.SWITCH_ITER,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "select": own.SELECT,
            "threshold": own.THRESHOLD,
            "min_hard": own.MIN_HARD,
            "blend": own.BLEND,
            "kd_weight": own.LAMBDA,
            "temperature": own.TEMPERATURE,
        }

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``loss_rdd_kd``, unless its weight is 0."""
        if self.kd_weight == 0:
            return {}
        return {"loss_rdd_kd": self.kd_weight * kd_loss(*step.class_logits, self.temperature)}

    @torch.no_grad()
    def reweight(self, step: Step) -> dict[str, Tensor]:
        """Of the losses of classes, by this iteration's stage."""
        if not self.reweights:
            return {}
        first = self.first_stage_share(get_event_storage().iter)
        mirrored = None
        if first > 0:
            size = tuple(step.student.images.tensor.shape[-2:])
            mirrored = step.teacher.mirrored_maps(step.batched_inputs, size)
        student, teacher = self._models
        weights = {}
        for name, part in student.head_parts.items():
            logits = _teacher_logits(step, name)
            total = 0.0
            if first > 0:
                other = teacher.head_parts[name].mirrored_logits(
                    mirrored[0], step.student, mirrored[1]
                )
                values = easiness(logits, other)
                _log(f"{name}/easiness", values)
                total = first * values
            if first < 1:
                selected = self.selected(part, step, logits)
                _log(f"{name}/selected", selected.float())
                total = total + (1 - first) * mean_of_selected(selected)
            weights[part.class_loss] = total
        return weights

    def first_stage_share(self, iteration: int) -> float:
        """How much of this iteration's weights is the first stage's."""
        if iteration < self.switch_iter:
            return 1.0
        if not self.blend or iteration >= self.max_iter:
            return 0.0
        return (self.max_iter - iteration) / (self.max_iter - self.switch_iter)

    def selected(self, part: HeadPart, step: Step, teacher_logits: Tensor) -> Tensor:
        """Which rows of the part's loss of classes the second stage learns from, (n,), bool."""
        truth = part.truth(step.student)
        return self.select(
            *(
                is_hard(logits, truth, self.threshold, self.min_hard)
                for logits in (part.own_logits(step.student), teacher_logits)
            )
        )


def _teacher_logits(step: Step, name: str) -> Tensor:
    """What the teacher says of the classes of a part's rows, on its own maps."""
    if name == "roi":  # computed once for all methods
        return step.teacher_predictions.class_logits
    judge = step.teacher.detector
    return judge.soft_targets(
        name, step.teacher_features, step.student, positions=SAMPLED_POSITIONS
    ).class_logits


def _log(name: str, values: Tensor) -> None:
    if len(values) > 0:
        get_event_storage().put_scalar(f"rdd/{name}", values.mean())


def _check_parts(student: Detector, judge: Detector) -> None:
    """Student and teacher can be compared row by row, with one distribution of classes a row.

    Raises:
        UserError: they cannot.
    """
    judge.check_judge(student, "RDD (MODEL.RDD.REWEIGHT)")
    for who, detector in (("student", student), ("teacher", judge)):
        parts = detector.head_parts
        if not parts or not all(part.exclusive for part in parts.values()):
            raise UserError(
                f"MODEL.RDD.REWEIGHT is True, and the {who}, a {type(detector).__name__}, has heads of sigmoids or of "
                "rotated boxes: expected softmax classes (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE False) of axis-aligned "
                "boxes; set it False, or change that."
            )
