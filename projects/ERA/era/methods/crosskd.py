"""CrossKD: the teacher's frozen heads read the student's features and are matched to the teacher's predictions.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", arXiv 2306.11369; form as in
``jbwang1997/CrossKD``. That is made for dense heads: RetinaNet's and FCOS's are the paper's own case. On a Faster R-CNN the RPN
is one; the ROI head is inspired by it (this project's mapping, see
:func:`~era.modeling.detectors.rcnn_parts.cross_proposal_losses`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from era.errors import UserError
from era.losses import at_least_float32, channel_moments, standardised
from era.methods.base import Method, Needs
from era.methods.checks import check_levels, check_weights
from era.methods.shared import parts_of_student
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

PARTS = ("rpn", "roi", "dense")
TERMS = ("class", "box")


def restandardised(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's channels with the mean and scale of the teacher's::

        (h_S - mean(h_S)) / std(h_S) * std(h_T) + mean(h_T),   by channel, over images and positions or over samples

    CrossKD's ``align_scale``. Its deviations are over n - 1 elements, ours over n, which cancels out; it adds 1e-6 to
    the student's deviation, here that is a lower bound, so that a channel without variance has a finite gradient.

    Args:
        student: (B, C, H, W) or (R, C), with gradient, which also flows through its mean and deviation.
        teacher: of that shape, a constant.

    Returns:
        Of that shape, at least float32.
    """
    if student.numel() == 0:
        return at_least_float32(student)
    mean, deviation = channel_moments(at_least_float32(teacher.detach()))
    return standardised(student) * deviation + mean


@METHOD_REGISTRY.register()
class CrossKD(Method):
    """``loss_crosskd_<part>_<term> = w CrossKD_<term>(h_T(R(A(h_S))), h_T(h_T))`` for the parts ``rpn`` and ``roi`` of a two-stage
    teacher or ``dense`` of a dense one, the terms ``class`` and ``box``.

    A part of the teacher's heads is cut in two. What the student has at the cut, before the activation, is brought to
    the teacher's mean and scale, goes through the rest of the teacher's head, and what that says is compared with what
    it says of the teacher's own. The student's last layers get no gradient of it, so they are not torn between ground
    truth and teacher. The RPN is cut before its one shared conv (its FPN maps), the ROI head after its first fully
    connected layer, on the student's sampled proposals, the towers of a dense head after their last conv but one (CrossKD's third
    of four). No ground truth is used.

    Args:
        teacher: whose heads judge.
        weights: w, by part and term; 0 leaves the term out.
        temperature: tau of the ROI's class distributions.
        adapters: A by part, from the student's channels at the cut to the teacher's (CrossKD itself compares heads of
            equal width); only for parts with a weight.
    """

    idea = "the teacher's frozen heads read the student's features and are matched to its own predictions"
    paper = "CrossKD, arXiv 2306.11369 (ROI head: inspired by it)"
    neutral: ClassVar = {
        "MODEL.CROSSKD.DENSE_CLASS_WEIGHT": 1.0,
        "MODEL.CROSSKD.DENSE_BOX_WEIGHT": 1.0,
    }
    loss_labels: ClassVar = {
        "loss_crosskd_rpn_class": "CrossKD: objectness of the teacher's RPN on the student's maps",
        "loss_crosskd_rpn_box": "CrossKD: boxes of the teacher's RPN on the student's maps",
        "loss_crosskd_roi_class": "CrossKD: classes of the teacher's box head on the student's vectors",
        "loss_crosskd_roi_box": "CrossKD: boxes of the teacher's box head on the student's vectors",
        "loss_crosskd_dense_class": "CrossKD: classes of the teacher's head on the student's towers",
        "loss_crosskd_dense_box": "CrossKD: boxes of the teacher's head on the student's towers",
    }

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.CROSSKD``."""
        cfg.MODEL.CROSSKD = CfgNode()
        # Weights of objectness and boxes of the teacher's RPN, of classes and boxes of its box head, or of those of a dense
        # detector's head; 0 switches a loss off, and those of heads that the teacher lacks do not count. 1 is CrossKD's for
        # RetinaNet, 0.5 and the temperature are those of its two-stage form.
        cfg.MODEL.CROSSKD.RPN_CLASS_WEIGHT = 1.0
        cfg.MODEL.CROSSKD.RPN_BOX_WEIGHT = 1.0
        cfg.MODEL.CROSSKD.ROI_CLASS_WEIGHT = 0.5
        cfg.MODEL.CROSSKD.ROI_BOX_WEIGHT = 1.0
        cfg.MODEL.CROSSKD.DENSE_CLASS_WEIGHT = 1.0
        cfg.MODEL.CROSSKD.DENSE_BOX_WEIGHT = 1.0
        cfg.MODEL.CROSSKD.TEMPERATURE = 3.0  # tau of the box head's class distributions

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Weights of at least 0 and a temperature above 0."""
        own = cfg.MODEL.CROSSKD
        check_weights(
            {f"MODEL.CROSSKD.{_key(p, t)}": own[_key(p, t)] for p in PARTS for t in TERMS}
        )
        if not 0 < own.TEMPERATURE < float("inf"):
            raise UserError(
                f"MODEL.CROSSKD.TEMPERATURE is {own.TEMPERATURE}: expected a finite number above 0; set it so."
            )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher, and no labels."""
        parts = parts_of_student(cfg)
        weights = (w for part, own in _weights(cfg).items() if part in parts for w in own.values())
        return Needs(labels=not any(w > 0 for w in weights))

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        weights: dict[str, dict[str, float]],
        temperature: float,
        adapters: dict[str, nn.Module],
    ):
        super().__init__()
        self._judge = (teacher.detector,)  # in a tuple: no submodule
        self.weights = weights
        self.temperature = temperature
        self.adapters = nn.ModuleDict(adapters)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.CROSSKD``.

        Raises:
            UserError: the student or the teacher has no such part, or anchors or levels differ.
        """
        judge, weights = teacher.detector, _weights(cfg)
        used = [
            part
            for part in PARTS
            if part in judge.parts and any(w > 0 for w in weights[part].values())
        ]
        if used:
            judge.check_judge(student, "CrossKD (MODEL.CROSSKD)")
            check_levels(
                student,
                judge,
                sorted(judge.head_levels),
                "the IN_FEATURES of all heads of the teacher's config",
            )
        adapters = {}
        for part in used:
            for who, detector in (("student", student), ("teacher", judge)):
                found = detector.head_parts.get(part)
                if found is None or found.channels is None:
                    raise UserError(
                        f"MODEL.CROSSKD.{part.upper()}_CLASS_WEIGHT or _BOX_WEIGHT is above 0, and the {who}, a "
                        f"{type(detector).__name__}, has no head {part!r} that can be cut in two: set both to 0, or name "
                        "a detector with axis-aligned boxes and MODEL.ROI_BOX_HEAD.NUM_FC above 0."
                    )
            own, other = (detector.head_parts[part] for detector in (student, judge))
            adapters[part] = _adapter(own.channels, other.channels, dense=own.dense)
        return {
            "teacher": teacher,
            "weights": weights,
            "temperature": cfg.MODEL.CROSSKD.TEMPERATURE,
            "adapters": adapters,
        }

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The terms of the teacher's parts, without those of weight 0."""
        losses = {}
        for name, adapter in self.adapters.items():
            part = self._judge[0].head_parts[name]
            own = part.own_hidden(step.student)
            with torch.no_grad():
                other = part.hidden(step.teacher_features, step.student)
                targets = part.predict_hidden(other)
            crossed = {key: restandardised(adapter(own[key]), other[key]) for key in other}
            predictions = part.predict_hidden(crossed)
            terms = part.cross_losses(predictions, targets, step.student, self.temperature)
            for term, weight in self.weights[name].items():
                if weight > 0:
                    losses[f"loss_crosskd_{name}_{term}"] = weight * terms[term]
        return losses


def _key(part: str, term: str) -> str:
    return f"{part}_{term}_weight".upper()


def _weights(cfg: CfgNode) -> dict[str, dict[str, float]]:
    """Of ``MODEL.CROSSKD``, by part and term."""
    return {part: {term: cfg.MODEL.CROSSKD[_key(part, term)] for term in TERMS} for part in PARTS}


def _adapter(own: int, other: int, *, dense: bool) -> nn.Module:
    """From one number of channels to another; nothing where they are equal."""
    if own == other:
        return nn.Identity()
    return nn.Conv2d(own, other, 1) if dense else nn.Linear(own, other)
