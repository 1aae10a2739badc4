"""What must hold of a step: finite losses within bounds, finite gradients, finite weights; and what it was taken on.

Losses and gradients are looked at in every step, before the weights are touched. Weights are looked at before they are
written or evaluated (:class:`CheckWeights`), and whenever a step fails, to tell whether the update before spoilt them: a
look at them in every step would say the same one step earlier at best, for weights that are not finite make the next
losses so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from era.checkpoint.finite import largest

MAX_LOSS = 1e6  # SOLVER.MAX_LOSS, where nothing is said
# No detector has a weight anywhere near: those that training throws out of bounds pass this within a few steps.
MAX_WEIGHT = 1e10
NAMED = 3  # how many of a kind a sentence names


class Diverged(FloatingPointError):
    """Training cannot go on with these numbers.

    Args:
        reason: one phrase, with the iteration.
        ranks: processes whose step did it; None where nobody knows, because gradients are averaged.
        gradients: names of the parameters whose gradient is not finite.
        weights: whether the weights themselves are spoilt.
        together: whether all processes raise it in the same step.

    Attributes:
        kept: what became of the step, a phrase; "" before.
        is_told: whether this process is the one of the run that tells the user.
    """

    def __init__(
        self,
        reason: str,
        *,
        ranks: Sequence[int] | None = None,
        gradients: Sequence[str] = (),
        weights: bool = False,
        together: bool = True,
    ):
        super().__init__(reason)
        self.reason = reason
        self.ranks = None if ranks is None else tuple(ranks)
        self.gradients = list(gradients)
        self.weights = weights
        self.together = together
        self.kept, self.is_told = "", True

    def __str__(self) -> str:
        return f"{self.reason}{'; ' * bool(self.kept)}{self.kept}"


@dataclass
class TakenStep:
    """What a step of this process was taken on, by reference, and what came of it.

    Attributes:
        batches: the inputs, batch by batch; the last one may be the one that failed.
        losses: by name, the mean over the batches; empty where no forward came to its end.
        learning_rates: of its update, by parameter group.
    """

    iteration: int
    learning_rates: list[float] = field(default_factory=list)
    batches: list[list[dict]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)


class Buffers:
    """A model's buffers as they were, for a step moves them (statistics, queues) before anybody knows whether it is bad.

    Args:
        model: with DistributedDataParallel around it or without. Buffers that no checkpoint holds are left out.
    """

    def __init__(self, model: nn.Module):
        self._places = [
            (f"{prefix}.{name}".lstrip("."), module, name)
            for prefix, module in bare(model).named_modules()
            for name, _ in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        ]
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def remember(self) -> None:
        """Take them as they are now."""
        pairs: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
        for place, module, name in self._places:
            now, kept = getattr(module, name), self._kept.get(place)
            if kept is None or (kept.shape, kept.dtype, kept.device) != (now.shape, now.dtype, now.device):  # fmt: skip
                self._kept[place] = now.clone()
                continue
            copies, sources = pairs.setdefault((now.dtype, now.device), ([], []))
            copies.append(kept)
            sources.append(now)
        for copies, sources in pairs.values():  # a GPU is asked once for all of a kind
            torch._foreach_copy_(copies, sources)

    def by_name(self) -> dict[str, Tensor]:
        """As they were when they were last remembered, by their name in the model's ``state_dict``."""
        return dict(self._kept)


def bare(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_losses(by_process: Sequence[dict[str, float]], bound: float, iteration: int) -> None:
    """Every process's losses are finite and within the bound; all processes are given the same.

    Raises:
        Diverged: names the terms, their values and, of several processes, whose they are.
    """
    wrong = [
        (name, value, rank)
        for rank, losses in enumerate(by_process)
        for name, value in losses.items()
        if not (math.isfinite(value) and abs(value) <= bound)
    ]
    if not wrong:
        return
    worst = [item for item in wrong if not math.isfinite(item[1])] or wrong
    several = len(by_process) > 1
    words = [
        f"{name} is {_in_words(value)}{f' in process {rank}' * several}"
        for name, value, rank in worst
    ]
    beyond = f", above SOLVER.MAX_LOSS {bound:g}" if math.isfinite(worst[0][1]) else ""
    raise Diverged(
        f"{some_of(words)} at iteration {iteration}{beyond}",
        ranks=sorted({rank for _, _, rank in wrong}),
    )


def _in_words(value: float) -> str:
    if math.isfinite(value):
        return f"{value:.4g}"
    return "NaN" if math.isnan(value) else "infinite"


def some_of(words: Sequence[str]) -> str:
    """The first few, and how many there are beside."""
    more = len(words) - NAMED
    return ", ".join(words[:NAMED]) + (f" and {more} more" if more > 0 else "")


def bad_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite, in the model's order."""
    found = [(n, p.grad) for n, p in bare(model).named_parameters() if p.grad is not None]
    return [name for name, size in _sizes(found) if not math.isfinite(size)]


def gradients_in_words(names: Sequence[str]) -> str:
    """For a sentence about :func:`bad_gradients`."""
    return f"of {some_of(names)}" if names else "finite ones, but their norm is not"


def weights_problem(model: nn.Module) -> str | None:
    """What is wrong with a model's parameters, a phrase; None where all are finite and below :data:`MAX_WEIGHT`."""
    sizes = _sizes(list(bare(model).named_parameters()))
    bad = [f"{name} is {_in_words(size)}" for name, size in sizes if not math.isfinite(size)]
    bad = bad or [f"{name} reaches {size:.1e}" for name, size in sizes if size > MAX_WEIGHT]
    return some_of(bad) if bad else None


def _sizes(named: list[tuple[str, Tensor]]) -> list[tuple[str, float]]:
    return list(zip((name for name, _ in named), largest([t for _, t in named]), strict=True))


class CheckWeights(HookBase):
    """Stops a run whose weights are not finite, or beyond :data:`MAX_WEIGHT`, before they are written or evaluated.

    It stands in every process, before the hooks that do so: weights are equal in all, so all stop alike.

    Args:
        periods: iterations from one look to the next, of whoever is to read the weights; 0 = never. The last
            iteration is always looked at.
    """

    def __init__(self, periods: Iterable[int]):
        self.periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        """Raises Diverged."""
        trainer, done = self.trainer, self.trainer.iter + 1
        if done < trainer.max_iter and all(done % period for period in self.periods):
            return
        if problem := weights_problem(trainer.model):
            raise Diverged(
                f"the weights are out of every bound after iteration {trainer.iter} ({problem})",
                weights=True,
            )
