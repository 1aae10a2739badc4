"""Warnings, each once by the loss's name, of distillation losses that teach the student nothing or drown its task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from era.modeling.distiller import Distiller

logger = logging.getLogger(__name__)

WINDOW = 100  # steps over which losses are looked at together
# The step of a process, counted from 1, in which each loss's gradient is looked at: by then weights that start at
# zero have moved. It costs a backward pass a loss, in this step alone.
GRADIENT_STEP = 20


class LossWatch:
    """Looks at the losses of a run's methods and warns of three things:

    * a loss that was exactly 0 in :data:`WINDOW` steps in a row;
    * a loss without gradient in the student: none at all, or exactly 0 while the loss is not, in step
      :data:`GRADIENT_STEP` on the main process;
    * a loss whose mean size over a window is more than ``ratio`` times that of the student's own losses together.

    The numbers are those that are fetched and logged in every step anyway: the watch asks a GPU for nothing but in
    the one step. Nothing of it reaches weights, random numbers or files.

    Args:
        student: what the losses are to train.
        prefixes: how the methods' losses begin, ``loss_<method>_``.
        own_parts: names of losses that rightly train parts of their method alone.
        ratio: ``MODEL.DISTILLER.MAX_TASK_RATIO``.
    """

    def __init__(
        self, student: nn.Module, prefixes: Sequence[str], own_parts: Sequence[str], ratio: float
    ):
        self.student = student
        self.prefixes, self.own_parts, self.ratio = tuple(prefixes), frozenset(own_parts), ratio
        self._steps = 0
        self._told: set[tuple[str, str]] = set()
        self._zero: dict[str, int] = {}  # by loss, steps in a row in which it was exactly 0
        self._begin()

    def _begin(self) -> None:
        self._count, self._sums, self._task = 0, {}, 0.0

    def look_at_gradients(
        self, losses: dict[str, Tensor], scaled: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> None:
        """To be called once a step between forward and backward, which stays as it would have been.

        Only ``torch.autograd.grad`` is asked, which adds to no ``.grad`` and fires none of DistributedDataParallel's
        hooks, so that the other processes simply wait for this one.

        Args:
            losses: of a batch, with their graph.
            scaled: the loss scaling of float16, without which a small gradient would round to 0.
        """
        self._steps += 1
        if self._steps != GRADIENT_STEP or not comm.is_main_process():
            return
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        for name, loss in losses.items():
            if not name.startswith(self.prefixes) or name in self.own_parts:
                continue
            try:
                size = gradient_size(scaled(loss), parameters)
            except (
                RuntimeError
            ) as e:  # no memory for it, or a compiled backward that can run only once
                logger.info("Not known whether %s has a gradient in the student: %s", name, _short(e))  # fmt: skip
                continue
            if size == 0.0 and loss.item() != 0.0:
                self._warn(
                    "gradient", name,
                    f"{name} is {loss.item():.4g} and has no gradient in the student, so the student learns nothing from it",
                )  # fmt: skip

    def see(self, losses: dict[str, float]) -> None:
        """The mean losses of a step over all processes, whatever of them there is."""
        own = {name: value for name, value in losses.items() if name.startswith(self.prefixes)}
        self._task += sum(abs(value) for name, value in losses.items() if name not in own)
        for name, value in own.items():
            self._sums[name] = self._sums.get(name, 0.0) + abs(value)
            self._zero[name] = self._zero.get(name, 0) + 1 if value == 0.0 else 0
            if self._zero[name] == WINDOW:
                self._warn(
                    "zero", name,
                    f"{name} was exactly 0 in {WINDOW} steps in a row, so the student learns nothing from it",
                )  # fmt: skip
        self._count += 1
        if self._count < WINDOW:
            return
        for name, value in self._sums.items():
            if value > self.ratio * self._task:
                self._warn(
                    "ratio", name,
                    f"{name} was {value / WINDOW:.4g} on average over {WINDOW} steps, beside {self._task / WINDOW:.4g} of "
                    f"the student's own losses together: more than {self.ratio:g} times as much "
                    "(MODEL.DISTILLER.MAX_TASK_RATIO)",
                )  # fmt: skip
        self._begin()

    def _warn(self, kind: str, name: str, found: str) -> None:
        if (kind, name) in self._told or not comm.is_main_process():
            return
        self._told.add((kind, name))
        logger.warning("%s: look at its weight, its levels and the teacher.", found)


def gradient_size(loss: Tensor, parameters: Sequence[Tensor]) -> float:
    """The largest absolute gradient of a scalar in these parameters; 0 where no way leads to them. The graph is kept."""
    if not loss.requires_grad or not parameters:
        return 0.0
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    found = [gradient for gradient in found if gradient is not None and gradient.numel() > 0]
    return float(get_total_norm(found, float("inf"))) if found else 0.0


def watch_of(cfg: CfgNode, model: nn.Module) -> LossWatch | None:
    """The watch over a run's methods; None where there are none, or where they only train a part of their own.

    Args:
        model: without DistributedDataParallel around it.
    """
    if not isinstance(model, Distiller) or model.preparing or len(model.methods) == 0:
        return None
    return LossWatch(
        model.student,
        [f"loss_{name}_" for name in model.methods],
        [name for method in model.methods.values() for name in method.own_part_losses],
        cfg.MODEL.DISTILLER.MAX_TASK_RATIO,
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
