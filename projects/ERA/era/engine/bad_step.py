"""The file that a step leaves which had to be stopped: what it takes to go through that step again.

``OUTPUT_DIR/bad_step/iter_<iteration>_rank<rank>.pt`` holds the step's inputs as the model got them, what its random numbers
follow from (:mod:`era.data.seeds`), its losses, and the buffers as they were before it: megabytes, in tensors, numbers and
texts alone, so that reading it runs nothing. The weights, as they were before the step, lie beside it in
``..._weights.pth`` where there is room for them; they are no checkpoint to go on from. A process keeps one such step, the last.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from detectron2.utils import comm
from torch import Tensor

from era.checkpoint.writing import PARTIAL, remove, save_whole
from era.engine.guard import Diverged, TakenStep, bare, weights_problem
from era.engine.preflight import teacher_record
from era.engine.room import free_bytes, in_words
from era.engine.stepping import StepTrainer
from era.errors import UserError

FOLDER = "bad_step"  # below OUTPUT_DIR
FORM = 1  # of the file
STEP_FILE, WEIGHTS = ".pt", "_weights.pth"  # end the files' names
TYPE = "__type__"  # in a packed structure: which one
OF_TENSORS = {"Boxes": Boxes, "RotatedBoxes": RotatedBoxes, "BitMasks": BitMasks, "Keypoints": Keypoints}  # fmt: skip
DEEPEST = 20  # structures in structures


@dataclass(frozen=True)
class BadStep:
    """What such a file holds.

    Attributes:
        iteration, rank, processes: of the step, the process, the run.
        seed: of the run.
        reason: why it was stopped.
        losses: by name, as they were; empty where no forward came to its end.
        gradients: names of the parameters whose gradient was not finite.
        loss_scale: of float16, 1 without.
        learning_rates: by parameter group.
        updated: whether it was the step's update that spoilt the weights, which are gone.
        batches: the model's inputs, batch by batch.
        buffers: the model's, by name, before the step.
        weights: name of the file beside it with the weights before the step; "" if there is none.
        why_no_weights: a phrase, "" if there are some.
    """

    iteration: int
    rank: int
    processes: int
    seed: int
    reason: str
    losses: dict[str, float]
    gradients: list[str]
    loss_scale: float
    learning_rates: list[float]
    updated: bool
    batches: list[list[dict]]
    buffers: dict[str, Tensor]
    weights: str
    why_no_weights: str


# ---- writing -------------------------------------------------------------------------------------


def keep_bad_step(
    error: FloatingPointError, trainer: StepTrainer, folder: str | None, seed: int, *, updated: bool
) -> Diverged:
    """Keep the step that an error ended, in the processes that it concerns.

    Nothing that goes wrong meanwhile hides the error: it becomes a part of what is told.

    Args:
        trainer: took the step.
        folder: ``OUTPUT_DIR``; None to keep nothing.
        seed: of the run.
        updated: whether the step's update was done, so that the weights before it are gone.

    Returns:
        The error to raise: it says what was kept and how to look at it.
    """
    rank, steps = comm.get_rank(), list(trainer.steps)
    found = error
    if not isinstance(error, Diverged):  # a detector's own, or a checkpoint's that was not written
        reason = f"{' '.join(str(error).split()).rstrip('.')} (iteration {trainer.iter})"
        found = Diverged(reason, ranks=[rank], together=False)
    if not updated and (problem := weights_problem(trainer.model)):
        steps, whence, updated = steps[:-1], "before the first step of this process", True
        if steps:
            whence = f"with the update of iteration {steps[-1].iteration}"
        found.reason = f"the weights left every bound {whence} ({problem}), so that {found.reason}"
    found.is_told = not found.together or rank == _teller(found)
    if folder is None or not steps or rank not in (found.ranks or (rank,)):
        return found
    try:
        found.kept = _keep(found, trainer, steps[-1], os.path.join(folder, FOLDER), seed, updated)
    except Exception as e:  # of inputs that cannot be packed, of a disk that is full
        found.kept = f"the step could not be kept ({' '.join(str(e).split())[:300]})"
    return found


def _teller(error: Diverged) -> int:
    """Of the processes that stop together, the one that tells the user and writes the weights, which all have."""
    return (error.ranks or (0,))[0]


def _keep(
    error: Diverged, trainer: StepTrainer, step: TakenStep, folder: str, seed: int, updated: bool
) -> str:
    """Write the file, and the weights beside it; a phrase that names it."""
    rank, processes = comm.get_rank(), comm.get_world_size()
    writer = _teller(error) if error.together else rank
    stem = f"iter_{step.iteration:07d}_rank"
    weights, why = f"{stem}{writer}{WEIGHTS}", ""
    os.makedirs(folder, exist_ok=True)
    _remove_earlier(folder, rank)
    if updated:
        weights, why = "", "the update was done, and they were gone with it"
    elif rank == writer:
        state = {**bare(trainer.model).state_dict(), **trainer.buffers.by_name()}
        others = {key: record.state_dict() for key, record in teacher_record(trainer.model).items()}
        why = _written({"model": state, **others}, os.path.join(folder, weights), processes)
        weights = "" if why else weights
    is_newest = step.iteration == trainer.iter
    data = {
        "form": FORM,
        "iteration": step.iteration,
        "rank": rank,
        "processes": processes,
        "seed": seed,
        "reason": error.reason,
        "losses": dict(step.losses),
        "gradients": error.gradients,
        "loss_scale": float(trainer.grad_scaler.get_scale()),
        "learning_rates": list(step.learning_rates),
        "updated": updated,
        "batches": pack(step.batches),
        "buffers": pack(trainer.buffers.by_name()) if is_newest else {},
        "weights": weights,
        "why_no_weights": why,
    }
    path = os.path.join(folder, f"{stem}{rank}{STEP_FILE}")
    if problem := _written(data, path, processes):
        _remove_earlier(folder, rank)
        return f"the step could not be kept ({problem})"
    each = ", of each process one" if error.ranks is None and processes > 1 else ""
    command = f"python tools/replay_step.py {shlex.quote(path)}"
    return f"the step is kept in {path}{each}, and `{command}` takes it again"


def _written(data: dict, path: str, processes: int) -> str:
    """Write a file if half of the room stays free where every process writes as much; "" or why it was not written."""
    needed, free = _size(data) * processes, free_bytes(os.path.dirname(path))
    if free < 2 * needed:
        return f"{in_words(free)} free, of which half stays free, and {in_words(needed)} needed"
    try:
        save_whole(data, path)
    except UserError as e:
        return str(e)
    return ""


def _remove_earlier(folder: str, rank: int) -> None:
    endings = "|".join(map(re.escape, (STEP_FILE, WEIGHTS)))
    pattern = re.compile(rf"iter_\d{{7,}}_rank{rank}({endings})({re.escape(PARTIAL)})?")
    remove(*(os.path.join(folder, n) for n in os.listdir(folder) if pattern.fullmatch(n)))


def _size(data: Any) -> int:
    """Bytes of the tensors in it."""
    if isinstance(data, Tensor):
        return data.numel() * data.element_size()
    if isinstance(data, dict):
        return sum(map(_size, data.values()))
    return sum(map(_size, data)) if isinstance(data, (list, tuple)) else 0


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, with storage of its own, of which no more is written than is seen."""
    return tensor.detach().cpu().clone()


def pack(value: Any) -> Any:
    """A model's inputs as tensors, numbers and texts.

    Raises:
        TypeError: names a type that is unknown.
    """
    name = type(value).__name__
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)  # enumerations too
        case float():
            return float(value)
        case np.generic():
            return value.item()
        case np.ndarray():
            return {TYPE: "ndarray", "tensor": _own(torch.from_numpy(np.ascontiguousarray(value)))}
        case Tensor():
            return _own(value)
        case list() | tuple():
            return [pack(item) for item in value]
        case dict():
            return {str(key): pack(item) for key, item in value.items()}
        case PolygonMasks():
            return {TYPE: name, "polygons": pack(value.polygons)}
        case Instances():
            return {TYPE: name, "size": pack(value.image_size), "fields": pack(value.get_fields())}
        case _ if name in OF_TENSORS:
            return {TYPE: name, "tensor": _own(value.tensor)}
    raise TypeError(f"an input holds a {name}, which cannot be kept")


# ---- reading -------------------------------------------------------------------------------------


def unpack(value: Any, depth: int = 0) -> Any:
    """Inverse of :func:`pack`; tuples come back as lists.

    Raises:
        ValueError: it is nothing that :func:`pack` gives.
    """
    if depth > DEEPEST:
        raise ValueError("structures are nested too deeply")
    match value:
        case None | bool() | int() | float() | str() | Tensor():
            return value
        case list():
            return [unpack(item, depth + 1) for item in value]
        case {"__type__": "ndarray", "tensor": Tensor() as tensor}:
            return tensor.numpy()
        case {"__type__": "PolygonMasks", "polygons": list(polygons)}:
            return PolygonMasks(unpack(polygons, depth + 1))
        case {"__type__": "Instances", "size": [int(height), int(width)], "fields": dict(fields)}:
            own = {str(name): unpack(item, depth + 1) for name, item in fields.items()}
            return Instances((height, width), **own)
        case {"__type__": str(name), "tensor": Tensor() as tensor} if name in OF_TENSORS:
            return OF_TENSORS[name](tensor)
        case dict() if TYPE not in value:
            return {str(key): unpack(item, depth + 1) for key, item in value.items()}
    raise ValueError(f"it holds a {type(value).__name__} of another form")


def read_bad_step(path: str) -> BadStep:
    """Read such a file; nothing in it is run.

    Raises:
        UserError: it is absent, unreadable, or of another form.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(data, dict) or data.pop("form", None) != FORM:
            raise ValueError("it does not say that it is one")
        data["batches"] = unpack(data["batches"])
        step = BadStep(**data)
        _check(step)
        return step
    except Exception as e:  # a file of anything can fail in any way
        raise UserError(
            f"{path} is no step that can be taken again ({' '.join(str(e).split())[:160] or type(e).__name__}): expected "
            f"a file iter_<iteration>_rank<rank>.pt that a run left below OUTPUT_DIR/{FOLDER}; name one."
        ) from e


def _check(step: BadStep) -> None:
    """Raises ValueError where a field is of another type than :class:`BadStep` says."""
    numbers = (step.iteration, step.rank, step.processes, step.seed)
    plain = (
        all(type(n) is int and n >= 0 for n in numbers)
        and all(isinstance(t, str) for t in (step.reason, step.weights, step.why_no_weights))
        and type(step.loss_scale) is float
        and type(step.updated) is bool
        and step.loss_scale > 0
        and _are(step.learning_rates, list, float)
        and _are(step.gradients, list, str)
        and isinstance(step.losses, dict)
        and all(isinstance(k, str) and type(v) is float for k, v in step.losses.items())
        and isinstance(step.buffers, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in step.buffers.items())
        and os.path.basename(step.weights) == step.weights
    )
    if not plain:
        raise ValueError("a field is of another type")
    if not _are(step.batches, list, list) or not step.batches:
        raise ValueError("it holds no batches")
    for item in (item for batch in step.batches for item in batch):
        image = item.get("image") if isinstance(item, dict) else None
        if not isinstance(image, Tensor) or image.dim() != 3:
            raise ValueError("an input has no image")


def _are(values: Any, of: type, what: type) -> bool:
    return isinstance(values, of) and all(type(value) is what for value in values)
