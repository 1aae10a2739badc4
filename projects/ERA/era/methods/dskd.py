"""DSKD: the teacher supervises the shallow stages of the student's backbone, each by what it finds hard.

Inspired by Luo et al., "Knowledge Distillation with Deep Supervision", arXiv 2202.07846: the teacher's predictions and feature
maps supervise shallow layers of the student, with weights that follow from their losses. Only its abstract could be read and
its repository holds no code; the form of the loss is from memory, the rule of the weights is this project's choice. The paper
classifies images; what follows is the mapping to a detector, in no source:

- a shallow layer is a stage of the network below the FPN, paired with the teacher's FPN level of the same stride;
- its auxiliary classifier reads what is pooled out of the stage at the student's sampled proposals, through the stage's
  adapter, so that one classifier of fully connected layers serves all stages;
- the teacher's predictions are those of its box head on the same proposals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from era.errors import UserError
from era.losses import at_least_float32, class_loss, kd_loss, mse
from era.methods.base import Chart, Method, Needs
from era.methods.checks import check_class_logits, check_temperature, check_weights
from era.methods.shared import mean_over_processes
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

HARDER, EASIER, EQUAL = RULES = ("harder", "easier", "equal")
LOG_PERIOD = 20  # iterations


def stage_weights(losses: Tensor, rule: str) -> Tensor:
    """``w_k``: how much each stage counts; they add up to 1 and send no gradient.

    With ``s = softmax(sg L)`` over the stages: ``harder`` is s, ``easier`` is (1 - s) / (K - 1), ``equal`` is 1 / K. The first
    two are the readings that the abstract leaves open. That the second is divided by K - 1, so that a loss weight means
    the same under every rule, is this project's choice.

    Args:
        losses: ``L_k``, (K,), K at least 2 for ``easier``.
        rule: one of :data:`RULES`.
    """
    losses = at_least_float32(losses.detach())
    if rule == EQUAL:
        return torch.full_like(losses, 1 / len(losses))
    shares = losses.softmax(0)
    return shares if rule == HARDER else (1 - shares) / (len(losses) - 1)


class StageClassifier(nn.Sequential):
    """Class logits of pooled features (R, C, P, P): two fully connected layers with a ReLU between.

    Args:
        shape: (C, P, P).
        hidden: width of the hidden layer.
        classes: K + 1.
    """

    def __init__(self, shape: tuple[int, int, int], hidden: int, classes: int):
        channels, height, width = shape
        super().__init__(
            nn.Flatten(),
            nn.Linear(channels * height * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )


@METHOD_REGISTRY.register()
class DSKD(Method):
    """``sum_k w_k (beta MSE(A_k F_k, F_T^l(k)) + w_d tau^2 KL(z_T || z_k) + w_c CE(z_k, y))`` over stages k.

    ``A_k`` is a 1x1 conv from the stage's channels to the teacher's, ``z_k`` are the classifier's logits on what is pooled
    out of ``A_k F_k``, ``w_k`` are :func:`stage_weights` of the stage's sum in brackets, mean over the processes of a run.
    Loss by loss, ``loss_dskd_feature``, ``loss_dskd_kd`` and ``loss_dskd_class``.

    Args:
        pairs: the teacher's level and its stride by stage.
        weights: ``feature`` beta, ``kd`` w_d and ``class`` w_c.
        temperature: tau.
        weighting: the rule of ``w_k``.
        channels: of each stage, and C_T.
        classifier: gives ``z_k``; None if neither of its losses is on.
    """

    idea = "the teacher's maps and classes supervise shallow backbone stages, weighted by each stage's own loss"
    paper = "inspired by DSKD, arXiv 2202.07846 (from its abstract)"
    loss_labels: ClassVar = {
        "loss_dskd_feature": "DSKD: MSE of the stages",
        "loss_dskd_kd": "DSKD: teacher's classes at the stages",
        "loss_dskd_class": "DSKD: true classes at the stages",
    }
    charts: ClassVar = (
        Chart(
            title="DSKD: weight of each stage",
            y_label="w",
            pattern=r"dskd/(?P<curve>\w+)/weight",
            curve_name=str,
            explanation="How much a stage's losses count beside those of the others; the weights add up to 1.",
        ),
    )

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.DSKD``."""
        cfg.MODEL.DSKD = CfgNode()
        keys = cfg.MODEL.DSKD
        # Stages of the student's bottom-up network that are supervised, each by the teacher's FPN level of its stride.
        keys.STAGES = ["res3", "res4"]
        keys.FEATURE_WEIGHT = 1.0  # beta: MSE(A_k F_k, F_T); no source's, as the next two
        keys.KD_WEIGHT = 1.0  # w_d: tau^2 KL of the teacher's ROI classes
        keys.CLASS_WEIGHT = 1.0  # w_c: cross entropy of the auxiliary classifier
        keys.TEMPERATURE = 1.0  # tau
        keys.FC_DIM = (
            1024  # hidden width of the auxiliary classifier, which is thrown away after training
        )
        # w_k: the softmax of the stages' losses (harder stages count more), 1 minus it (easier), or equal.
        keys.WEIGHTING = HARDER

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Weights, temperature, the rule and the names of the stages."""
        keys, prefix = cfg.MODEL.DSKD, "MODEL.DSKD"
        check_weights(
            {
                f"{prefix}.{key}": keys[key]
                for key in ("FEATURE_WEIGHT", "KD_WEIGHT", "CLASS_WEIGHT")
            }
        )
        check_temperature(f"{prefix}.TEMPERATURE", keys.TEMPERATURE)
        if keys.WEIGHTING not in RULES:
            raise UserError(
                f"{prefix}.WEIGHTING is {keys.WEIGHTING!r}: expected one of {', '.join(RULES)}."
            )
        if keys.FC_DIM < 1:
            raise UserError(f"{prefix}.FC_DIM is {keys.FC_DIM}: expected at least 1.")
        stages = list(keys.STAGES)
        if not stages or len(set(stages)) < len(stages):
            raise UserError(
                f"{prefix}.STAGES is {stages}: expected stages such as ['res3', 'res4'], each once."
            )
        if keys.WEIGHTING == EASIER and len(stages) == 1:
            raise UserError(
                f"{prefix}.WEIGHTING is {EASIER} and {prefix}.STAGES {stages}, and one stage alone would count 0: name "
                f"another stage, or choose {HARDER} or {EQUAL}."
            )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher; labels if the classification loss alone is on."""
        keys = cfg.MODEL.DSKD
        return Needs(
            labels=keys.FEATURE_WEIGHT == 0 and keys.KD_WEIGHT == 0,
            heads=keys.KD_WEIGHT > 0,
            more=("backbone stages",),
        )

    @configurable
    def __init__(
        self,
        *,
        pairs: Mapping[str, tuple[str, int]],
        weights: dict[str, float],
        temperature: float,
        weighting: str,
        channels: tuple[list[int], int],
        classifier: StageClassifier | None,
    ):
        super().__init__()
        self.pairs = dict(pairs)
        self.weights = dict(weights)
        self.temperature = temperature
        self.weighting = weighting
        own, other = channels
        self.adapters = nn.ModuleDict(
            {stage: nn.Conv2d(count, other, 1) for stage, count in zip(pairs, own, strict=True)}
        )
        self.adapters.requires_grad_(any(w > 0 for w in weights.values()))
        self.classifier = classifier

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.DSKD``, pair stages with levels and build the classifier.

        Raises:
            UserError: a stage is absent, frozen or without a level of its stride; or there is nothing to classify.
        """
        keys, judge = cfg.MODEL.DSKD, teacher.detector
        pairs = pair_stages(student, judge, list(keys.STAGES))
        channels = {judge.feature_shapes[level].channels for level, _ in pairs.values()}
        if len(channels) > 1:
            raise UserError(
                f"MODEL.DSKD.STAGES is {list(pairs)}, at whose strides the teacher has {sorted(channels)} channels: one "
                "number is expected; name a teacher with an FPN."
            )
        (out_channels,) = channels
        if keys.KD_WEIGHT > 0:
            check_class_logits(student, judge, "DSKD with MODEL.DSKD.KD_WEIGHT above 0")
        classifier = None
        if keys.KD_WEIGHT > 0 or keys.CLASS_WEIGHT > 0:
            shape = student.pooled_shape
            if shape is None:
                raise UserError(
                    f"the student is a {type(student).__name__} and pools nothing at proposals: DSKD's auxiliary classifier "
                    "needs a two-stage detector; set MODEL.DSKD.KD_WEIGHT and MODEL.DSKD.CLASS_WEIGHT to 0."
                )
            classifier = StageClassifier(
                (out_channels, *shape[1:]), keys.FC_DIM, student.num_classes + 1
            )
        return {
            "pairs": pairs,
            "weights": {
                "feature": keys.FEATURE_WEIGHT, "kd": keys.KD_WEIGHT, "class": keys.CLASS_WEIGHT,
            },
            "temperature": keys.TEMPERATURE,
            "weighting": keys.WEIGHTING,
            "channels": ([student.stage_shapes[stage].channels for stage in pairs], out_channels),
            "classifier": classifier,
        }  # fmt: skip

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The losses whose weight is above 0; without labels ``loss_dskd_class`` is left out, of ``w_k`` too.

        Every 20 iterations ``dskd/<stage>/weight``, ``w_k``, goes into the event storage.
        """
        by_stage = [self._terms(step, stage) for stage in self.pairs]
        if not by_stage[0]:
            return {}
        totals = torch.stack([sum(terms.values()).detach() for terms in by_stage])
        weights = stage_weights(mean_over_processes(totals), self.weighting)
        self._log(weights)
        return {
            f"loss_dskd_{name}": sum(
                w * terms[name] for w, terms in zip(weights, by_stage, strict=True)
            )
            for name in by_stage[0]
        }

    def _terms(self, step: Step, stage: str) -> dict[str, Tensor]:
        """The weighted losses of one stage, without its ``w_k``."""
        on = {n: w for n, w in self.weights.items() if w > 0 and (step.labeled or n != "class")}
        if not on:
            return {}
        level, stride = self.pairs[stage]
        adapted, terms = self.adapters[stage](step.student.stages[stage]), {}
        if "feature" in on:
            terms["feature"] = mse(adapted, step.teacher_features[level])
        if "kd" in on or "class" in on:
            logits = self.classifier(step.detector.pooled(adapted, stride, step.student.samples))
        if "kd" in on:
            terms["kd"] = kd_loss(step.shared(logits), step.class_logits[1], self.temperature)
        if "class" in on:
            terms["class"] = class_loss(logits, step.student.classes)
        return {name: on[name] * term for name, term in terms.items()}

    def _log(self, weights: Tensor) -> None:
        storage = get_event_storage()
        if storage.iter % LOG_PERIOD not in (0, LOG_PERIOD - 1):
            return  # reading numbers makes a GPU wait
        for stage, value in zip(self.pairs, weights.tolist(), strict=True):
            storage.put_scalar(f"dskd/{stage}/weight", value)


def pair_stages(
    student: Detector, teacher: Detector, stages: list[str]
) -> dict[str, tuple[str, int]]:
    """The FPN level of each stage's stride that both models have, and that stride.

    Raises:
        UserError: a stage is absent or frozen, or there is no such level.
    """
    found, pairs = student.stage_shapes, {}
    for stage in stages:
        if stage not in found:
            raise UserError(
                f"MODEL.DSKD.STAGES names {stage!r}, but the student's bottom-up network gives {sorted(found)}: name some of "
                "these (MODEL.RESNETS.OUT_FEATURES says which a ResNet gives)."
            )
        bottom_up = student.model.backbone.bottom_up
        own = [p for n, p in bottom_up.named_parameters() if n.startswith(f"{stage}.")]
        if own and not any(p.requires_grad for p in own):
            raise UserError(
                f"MODEL.DSKD.STAGES names {stage!r}, which is frozen (MODEL.BACKBONE.FREEZE_AT): name stages that train, "
                "or freeze fewer."
            )
        stride = found[stage].stride
        levels = [
            {name for name, shape in detector.feature_shapes.items() if shape.stride == stride}
            for detector in (student, teacher)
        ]
        common = sorted(levels[0] & levels[1])
        if not common:
            raise UserError(
                f"MODEL.DSKD.STAGES names {stage!r}, of stride {stride}, at which student and teacher have no FPN level in "
                f"common (the student's are {levels_in_words(student)}, the teacher's {levels_in_words(teacher)}): "
                "leave it out."
            )
        pairs[stage] = (common[0], stride)
    return pairs


def levels_in_words(detector: Detector) -> str:
    """A detector's FPN levels with their strides, as ``p3 of 8, p4 of 16``."""
    return ", ".join(f"{name} of {shape.stride}" for name, shape in detector.feature_shapes.items())
