"""A step that a run had to stop, taken again: forward, backward and, where it was the update that did it, the update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from era.checkpoint.finite import largest
from era.data.seeds import STEP, derived_seed, seed_all
from era.engine.bad_step import BadStep
from era.engine.guard import Diverged, bad_gradients, check_losses, weights_problem
from era.engine.schedule import amp_dtype
from era.engine.stepping import numbers
from era.engine.watch import gradient_size
from era.modeling.distiller import Distiller


@dataclass
class Replayed:
    """What came of a step that was taken again.

    Attributes:
        losses: by name, the mean over the batches.
        loss_gradients: by loss, the largest absolute gradient of any parameter; absent where it is not known.
        raised: what ended a forward, "" if none did.
        first_module: the first one, in the order of their ends, of whose output a number is not finite; "" if there is none.
        first_gradient: the first parameter, in the order of the backward pass, whose gradient is not finite; "" if all are.
        parts: by part of the model, the norm of its gradient, and how many of its parameters have one that is not finite, out of
            how many.
        weights: what is wrong with the weights after the update; "" if nothing is, or if none was done.
    """

    losses: dict[str, float] = field(default_factory=dict)
    loss_gradients: dict[str, float] = field(default_factory=dict)
    raised: str = ""
    first_module: str = ""
    first_gradient: str = ""
    parts: dict[str, tuple[float, int, int]] = field(default_factory=dict)
    weights: str = ""

    def problem(self, bound: float, iteration: int) -> str:
        """Why a run would stop here, "" if it would not."""
        if self.raised:
            return self.raised
        try:
            check_losses([self.losses], bound, iteration)
        except Diverged as e:
            return e.reason
        if self.first_gradient:
            terms = [n for n, size in self.loss_gradients.items() if not math.isfinite(size)]
            whose = f", that of {', '.join(terms)}" if terms else ""
            return f"a gradient is infinite or NaN{whose}, first in {self.first_gradient}"
        return self.weights and f"the weights left every bound with the update ({self.weights})"


def retake(
    cfg: CfgNode, model: nn.Module, step: BadStep, optimizer_state: dict | None = None
) -> Replayed:
    """Forward and backward of the step's batches, and the update if that was what spoilt the weights. Whatever a forward
    raises is a part of what was found.

    Args:
        model: in training mode, with the weights before the step; changed.
        optimizer_state: before the step; None for that of a run's beginning.
    """
    found, total = Replayed(), {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    hooks = [
        parameter.register_post_accumulate_grad_hook(_first_gradient(found, name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    hooks += [
        module.register_forward_hook(_first_module(found, name)) for name, module in _modules(model)
    ]
    device, dtype = torch.device(cfg.MODEL.DEVICE).type, amp_dtype(cfg)
    seed_all(derived_seed(STEP, step.seed, step.iteration, step.rank))
    try:
        with EventStorage(step.iteration):
            for batch in step.batches:
                with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                    losses = model(batch)
                losses = {n: loss / cfg.SOLVER.ACCUMULATION_STEPS for n, loss in losses.items()}
                for name, loss in losses.items():
                    total[name] = total.get(name, 0.0) + loss.detach()
                    _note_gradient(found, name, loss * step.loss_scale, parameters, step.loss_scale)
                (sum(losses.values()) * step.loss_scale).backward()
    except Exception as e:
        found.raised = (
            f"the forward raised {type(e).__name__}: {' '.join(str(e).split())[:300].rstrip('.')}"
        )
    finally:
        for hook in hooks:
            hook.remove()
    found.losses = numbers(total)
    found.parts = _parts(model, step.loss_scale)
    if step.updated and not found.raised:
        found.weights = _update(cfg, model, step, optimizer_state)
    return found


def _update(cfg: CfgNode, model: nn.Module, step: BadStep, state: dict | None) -> str:
    """The step's update with its learning rates; what is wrong with the weights then, "" if nothing is."""
    optimizer = build_optimizer(cfg, model)
    if state is not None:
        optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, step.learning_rates, strict=False):
        group["lr"] = rate
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= step.loss_scale
    optimizer.step()
    return weights_problem(model) or ""


def _note_gradient(found: Replayed, name: str, loss: Tensor, parameters, scale: float) -> None:
    try:
        size = gradient_size(loss, parameters) / scale
    except RuntimeError:  # no memory for it, or a compiled backward that can run only once
        return
    before = found.loss_gradients.get(name, 0.0)
    found.loss_gradients[name] = size if not size <= before else before  # NaN stays


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, module) for name, module in model.named_modules() if name)
    if isinstance(model, Distiller) and model.teacher is not None:
        for name, module in model.teacher.model.named_modules():
            yield f"teacher.{name}".rstrip("."), module


def _first_module(found: Replayed, name: str):
    def hook(module, args, output) -> None:
        if not found.first_module and not _finite(output):
            found.first_module = f"{name} ({type(module).__name__}, its input {'is' if _finite(args) else 'is not'} finite)"  # fmt: skip

    return hook


def _first_gradient(found: Replayed, name: str):
    def hook(parameter: Tensor) -> None:
        if not found.first_gradient and not math.isfinite(largest([parameter.grad])[0]):
            found.first_gradient = name

    return hook


def _finite(value: Any) -> bool:
    return all(map(math.isfinite, largest([t for t in _tensors(value) if t.is_floating_point()])))


def _tensors(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case dict():
            yield from _tensors(list(value.values()))
        case list() | tuple():
            for item in value:
                yield from _tensors(item)
        case Boxes() | ImageList():
            yield value.tensor
        case Instances():
            yield from _tensors(value.get_fields())


def _parts(model: nn.Module, scale: float) -> dict[str, tuple[float, int, int]]:
    bad, parts = set(bad_gradients(model)), {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            words = name.split(".")
            part = ".".join(words[: 2 if words[0] in ("student", "methods") else 1])
            parts.setdefault(part, []).append((name, parameter.grad))
    return {
        part: (
            float(get_total_norm([gradient for _, gradient in named])) / scale,
            sum(name in bad for name, _ in named),
            len(named),
        )
        for part, named in parts.items()
    }
