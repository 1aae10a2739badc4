"""What a distillation method is, what it is given and what it returns."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from era.checkpoint.part import load_part
from era.errors import UserError
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher

NORMS = ("BN", "SyncBN", "GN")  # what norm_layer makes
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Needs:
    """What a method needs, known from the config before anything is built.

    Attributes:
        teacher: whether training needs the teacher; an online method does without.
        teacher_at_inference: whether the trained model detects with parts of the teacher.
        labels: whether every loss needs ground truth. A method with losses that need none says False, and is
            then also given steps whose ``labeled`` is False (``DATASETS.UNLABELED``).
        more: whatever else costs something or must be there, for people: ``a second view``, ``a trained head``.
    """

    teacher: bool = True
    teacher_at_inference: bool = False
    labels: bool = True
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Scalars that a method puts into the event storage, as a report draws them.

    Attributes:
        title, y_label: of the chart; iterations are its x axis. Studies keep its final values by its title.
        pattern: regular expression for a scalar's whole name, with a group ``curve``; a curve is the mean
            of all scalars with the same group.
        curve_name: from the group to the curve's name in the legend.
        log_scale: whether the y axis is logarithmic.
        explanation: how to read it, one or two sentences.
        share: where the curves are steps of one way, what the last one's value over the first one's is: the heading
            of a column in a study's table.
    """

    title: str
    y_label: str
    pattern: str
    curve_name: Callable[[str], str]
    log_scale: bool = False
    explanation: str = ""
    share: str = ""


class Method(nn.Module):
    """Base of the distillation methods: one file or folder each, which owns all that is the method's.

    Register a subclass with ``METHOD_REGISTRY.register()``. It is built by ``cls(cfg, student, teacher)``
    (:class:`~era.modeling.detectors.Detector`, :class:`~era.modeling.teacher.Teacher` or None), usually
    under Detectron2's ``@configurable`` with a ``from_config`` of these three.

    A method owns the modules that only training needs (adapters, projectors); they are saved in training
    checkpoints and are in no student. It must not draw from the global random state, and a loss whose
    weight is 0 is left out and its modules are frozen, so that plain training is reproduced exactly and
    DDP waits for nothing.

    Attributes:
        idea, paper: one line each.
        loss_labels: what a chart calls each loss, by the loss's name.
        charts: further charts of what the method logs.
        neutral: keys that came later, by full name, with the value that computes what was computed without them: at it
            they are no part of what a run's result follows from, so kept results stay good when a key comes or goes.
        part_key: the config key that names the checkpoint of the run that trained a part of the method first, see
            :meth:`prepares`; None if there is no such part, or the method also does without.
        alpha_key: the config key, 0 to 1, that says how far inference leans on the teacher; None if the
            trained student alone detects.
    """

    idea: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    loss_labels: ClassVar[dict[str, str]] = {}
    charts: ClassVar[tuple[Chart, ...]] = ()
    neutral: ClassVar[Mapping[str, Any]] = {}
    part_key: ClassVar[str | None] = None
    alpha_key: ClassVar[str | None] = None

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add the method's keys under ``MODEL.<NAME>``, each with its meaning and paper symbol, in place."""

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Check the method's keys by themselves; called if the run uses the method.

        Raises:
            UserError: one sentence about the first wrong key.
        """

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """What this run's settings need; by default a teacher in training alone."""
        return Needs()

    @classmethod
    def prepares(cls, cfg: CfgNode) -> bool:
        """Whether this run trains a part of the method alone, which a later run names (:func:`~era.checkpoint.part.load_part`).

        The student is then frozen: it says where the samples are, its losses are dropped, and it is neither evaluated nor
        written. What is written is the training checkpoint with the method's modules.
        """
        return False

    @classmethod
    def benchmark_rows(cls, cfg: CfgNode) -> dict[str, Callable[..., Method]]:
        """Further rows of ``tools/benchmark.py``: by name, what builds the method with one setting changed.

        Each is called as the class itself is, ``(cfg, student, teacher)``; the row of the method as
        configured comes from the frame.
        """
        return {}

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Weighted losses by name, ``loss_<method>_<term>``; their sum is added to the student's.

        On a step whose ``labeled`` is False, which only a method without ``Needs.labels`` is given: the terms that
        need no ground truth. The frame takes a term of both parts of a batch as their mean, weighted by images.

        Statistics belong in the event storage, never in this dict: the trainer sums all of it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its losses are")

    def reweight(self, step: Step) -> dict[str, Tensor]:
        """Weights of the student's own losses, sample by sample; by default none is changed.

        Returns:
            By the name of a loss in ``step.task_losses``, one weight for each of its ``values``, (n,).
            Weights of several methods are multiplied.
        """
        return {}

    def detector(self, student: Detector) -> Callable | None:
        """Another detector than the plain student for inference, or None.

        The callable takes ``(batched_inputs, do_postprocess)`` and returns what
        :meth:`~era.modeling.detectors.Detector.detect` returns. One method of a run may have one.
        """
        return None

    def deployable(self, student: Detector) -> nn.Module | None:
        """What :meth:`detector` computes as one ordinary model of the student's family in eval mode, for
        export; None where there is no such model."""
        return None


class FeatureMethod(Method):
    """Base of the methods with one loss, on FPN maps, that needs no ground truth:
    ``loss_<name>_feature = w L(F_S, F_T)``.

    A subclass adds ``LEVELS`` and ``WEIGHT`` to its ``MODEL.<NAME>``, and says in :meth:`feature_loss` what L is.
    Whatever it builds it freezes where ``weight`` is 0.

    Args:
        levels: FPN levels that are compared.
        weight: w.
    """

    def __init__(self, *, levels: Sequence[str], weight: float):
        super().__init__()
        self.levels = list(levels)
        self.weight = weight

    @classmethod
    def keys(cls, cfg: CfgNode) -> tuple[str, CfgNode]:
        """The name of the method's config node, ``MODEL.<NAME>``, and the node."""
        name = cls.__name__.upper()
        return f"MODEL.{name}", cfg.MODEL[name]

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """A weight of at least 0, and levels that are named once."""
        name, keys = cls.keys(cfg)
        check_weights({f"{name}.WEIGHT": keys.WEIGHT})
        check_level_names(keys.LEVELS, f"{name}.LEVELS")

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher, and no labels."""
        return Needs(labels=cls.keys(cfg)[1].WEIGHT == 0)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``LEVELS`` and ``WEIGHT``; beside them ``channels``, of the student's and of the teacher's maps.

        Raises:
            UserError: a level is missing, or its stride differs.
        """
        name, keys = cls.keys(cfg)
        levels = list(keys.LEVELS)
        channels = check_levels(student, teacher.detector, levels, f"{name}.LEVELS")
        return {"levels": levels, "weight": keys.WEIGHT, "channels": channels}

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``loss_<name>_feature``, unless its weight is 0."""
        if self.weight == 0:
            return {}
        loss = self.feature_loss(step.student.features, step.teacher_features)
        return {f"loss_{type(self).__name__.lower()}_feature": self.weight * loss}

    def feature_loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """L, a scalar of at least float32.

        Args:
            student: all of the student's maps, level name to (B, C_S, H, W), with gradient.
            teacher: the teacher's, (B, C_T, H, W), without.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its loss is")


def align(own: int, other: int) -> nn.Module:
    """What brings a map of ``own`` channels to ``other``: a 1x1 conv, or nothing where they are equal."""
    return nn.Identity() if own == other else nn.Conv2d(own, other, 1)


def norm_layer(name: str, channels: int, momentum: float = 0.1) -> nn.Module:
    """A norm over maps of these channels, with gain and shift.

    Args:
        name: one of :data:`NORMS`; GN has at most 32 groups, of at least 8 channels.
        momentum: of the running statistics of BN and SyncBN.

    Raises:
        ValueError: an unknown name.
    """
    if name == "BN":
        return nn.BatchNorm2d(channels, momentum=momentum)
    if name == "SyncBN":
        return nn.SyncBatchNorm(channels, momentum=momentum)
    if name == "GN":
        return nn.GroupNorm(math.gcd(32, max(channels // 8, 1), channels), channels)
    raise ValueError(f"norm is {name!r}: expected one of {', '.join(NORMS)}")


def check_weights(weights: dict[str, float]) -> None:
    """Loss weights, by config key, are finite and at least 0.

    Raises:
        UserError: names the first key that is not.
    """
    for key, value in weights.items():
        if not 0.0 <= value < float("inf"):
            raise UserError(f"{key} is {value}: expected a finite number of at least 0; set it so.")


def check_temperature(key: str, value: float) -> None:
    """A temperature, ``tau``, is finite and above 0.

    Raises:
        UserError: it is not.
    """
    if not 0.0 < value < float("inf"):
        raise UserError(f"{key} is {value}: expected a finite number above 0; set it so.")


def check_class_logits(student: Detector, teacher: Detector, reason: str) -> None:
    """Class distributions of both models on the student's samples can be compared row by row.

    Args:
        reason: what compares them, for messages.

    Raises:
        UserError: the teacher's heads cannot predict there, or a model has no softmax over its classes.
    """
    teacher.check_class_distributions(student, reason)
    check_head_levels(student, teacher, reason)


def check_head_levels(student: Detector, teacher: Detector, reason: str) -> None:
    """The teacher's heads can read its own maps where the student has its samples.

    Args:
        reason: what needs it, for the message.

    Raises:
        UserError: names the levels that the student lacks or has at another stride.
    """
    own, other = student.feature_shapes, teacher.feature_shapes
    unfit = sorted(
        level
        for level in teacher.head_levels
        if level not in own or own[level].stride != other[level].stride
    )
    if unfit:
        raise UserError(
            f"{reason} needs the teacher's heads on the student's samples, and they read {unfit}, which the student's "
            "backbone lacks or has at another stride: name a teacher with the student's FPN levels, or switch that off."
        )


def check_level_names(levels: Sequence[str], key: str) -> None:
    """There is a level, and none is named twice.

    Args:
        key: the config key that names the levels, for messages.

    Raises:
        UserError: says what is wrong.
    """
    if not levels:
        raise UserError(f"{key} is empty: expected FPN levels such as ['p2', 'p3'].")
    if len(set(levels)) < len(levels):
        raise UserError(f"{key} is {list(levels)}, with a level twice: name each of them once.")


def check_vectors(who: str, detector: Detector, reason: str) -> None:
    """A detector makes a vector of each sample, :attr:`Detector.vector_channels`.

    Args:
        who: ``student`` or ``teacher``, for the message.
        reason: what needs it, for the message.

    Raises:
        UserError: it does not.
    """
    if detector.vector_channels is None:
        raise UserError(
            f"{reason}, and the {who} is a {type(detector).__name__} that makes no vector of a proposal: expected a box "
            "head that ends in fully connected layers (MODEL.ROI_BOX_HEAD.NUM_FC above 0); choose such a model, or "
            "switch that off."
        )


def check_stage(key: str, value: str, stages: Sequence[str]) -> None:
    """The stage of a method that first trains a part of its own is one that there is.

    Raises:
        UserError: it is not.
    """
    if value not in stages:
        raise UserError(
            f"{key} is {value!r}: expected one of {', '.join(stages)}; name one of them."
        )


def load_frozen_part(
    module: nn.Module, path: str, prefix: str, *, what: str, teacher: Teacher
) -> None:
    """Fill a part that an earlier run trained, :func:`~era.checkpoint.part.load_part`, and freeze it.

    Where the teacher has random weights (``MODEL.TEACHER.ALLOW_RANDOM``, as in benchmarks), a part that is not named
    has too, with a warning.

    Raises:
        UserError: see there.
    """
    if path or teacher.source["weights"]:
        load_part(module, path, prefix, what=what, teacher=teacher.sha256)
    else:
        logger.warning("Like the teacher, what %s would name has RANDOM weights.", what)
    module.requires_grad_(False)


def check_levels(
    student: Detector, teacher: Detector, levels: list[str], key: str
) -> tuple[int, int]:
    """Both models have every level, at equal strides and with one channel count each.

    Args:
        key: the config key that names the levels, for messages.

    Returns:
        Channels of the student's and of the teacher's maps.

    Raises:
        UserError: names the level and what differs.
    """
    shapes = {"student": student.feature_shapes, "teacher": teacher.feature_shapes}
    for who, shape in shapes.items():
        missing = [level for level in levels if level not in shape]
        if missing:
            raise UserError(
                f"{key} is {levels}, but the {who}'s backbone has no {missing} (it has {sorted(shape)}): "
                "list levels that both models have."
            )
        channels = {shape[level].channels for level in levels}
        if len(channels) > 1:
            raise UserError(
                f"{key} is {levels}, at which the {who} has {sorted(channels)} channels: one number is "
                "expected at all levels; list levels of an FPN."
            )
    for level in levels:
        strides = {who: shape[level].stride for who, shape in shapes.items()}
        if len(set(strides.values())) > 1:
            raise UserError(
                f"{key} names {level}, which has stride {strides['student']} in the student and "
                f"{strides['teacher']} in the teacher: the FPN levels of both must match; choose a teacher "
                "with the same strides or leave the level out."
            )
    return shapes["student"][levels[0]].channels, shapes["teacher"][levels[0]].channels


def check_heads_on(
    student: Detector, teacher: Detector, levels: list[str], key: str, reason: str
) -> None:
    """The teacher's heads can read estimates of its maps at these levels, by the student's samples.

    Args:
        key, reason: the config key that names the levels and what needs the heads, for messages.

    Raises:
        UserError: says what does not fit.
    """
    teacher.check_judge(student, reason)
    missing = sorted(teacher.head_levels - set(levels))
    if missing:
        raise UserError(
            f"{key} is {levels}: the teacher's heads also read {missing}, and {reason} needs them; add them."
        )


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of what every process has, in place; with one process nothing."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(values)
        values /= comm.get_world_size()
    return values
