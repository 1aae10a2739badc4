"""What a distillation method is, what it is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from detectron2.config import CfgNode
from torch import Tensor, nn

from era.modeling.detectors import Detector
from era.modeling.step import Step


@dataclass(frozen=True)
class Needs:
    """What a method needs, known from the config before anything is built.

    Attributes:
        teacher: whether training needs the teacher; an online method does without.
        teacher_at_inference: whether the trained model detects with parts of the teacher.
        labels: whether every loss needs ground truth. A method with losses that need none says False, and is
            then also given steps whose ``labeled`` is False (``DATASETS.UNLABELED``).
        heads: whether the teacher's heads are asked for anything, in training or inference; a method on feature maps alone says
            False, and then also serves a teacher of other classes (``MODEL.DISTILLER.CLASS_MAP`` ``feature_only``).
        more: whatever else costs something or must be there, for people: ``a second view``, ``a trained head``.
    """

    teacher: bool = True
    teacher_at_inference: bool = False
    labels: bool = True
    heads: bool = True
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
        own_part_losses: names of losses that rightly send no gradient into the student, because they train a part of
            the method's own; every other one without gradient is warned of (:class:`~era.engine.watch.LossWatch`).
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
    own_part_losses: ClassVar[tuple[str, ...]] = ()
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
