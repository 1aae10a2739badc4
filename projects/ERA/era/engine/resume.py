"""What a checkpoint keeps beside weights and optimiser so that a run goes on exactly.

Random numbers and the order of the pictures follow from the run's seed and the iteration
(:mod:`era.data.seeds`, :mod:`era.data.loader`). What is left are the seed, where none was set; the last values of the
scalars, whose medians metrics.json shows; how far that file was written; and numbers of the detector that training moves and no
weight holds, such as RetinaNet's running normaliser. Of several processes, each of which has its own, these are the main one's.

And nothing in the process may remember how often something ran before: :func:`torchscript_without_history`.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.utils.events import EventStorage, JSONWriter
from fvcore.common.history_buffer import HistoryBuffer

from era.devices import CPU, kind_of

# Scalars that tell of this process's clock: they begin anew with every process.
CLOCK = ("time", "data_time", "rank_data_time", "eta_seconds")
WINDOW = 20  # iterations whose median Detectron2's writers show
LONGEST_WINDOW = 1000  # values that they look back at for the time that is left


def torchscript_without_history(device: str) -> AbstractContextManager:
    """On a CPU, scripted functions give the same bits in their first call of a process as in their tenth.

    TorchScript rewrites a function after it has watched two calls; the gradients of fvcore's focal loss, which RetinaNet and
    FCOS use, then differ in the last bits, so that a resumed run would leave the way of the whole one at its first step. On a
    CPU the rewriting is worth nothing: forward and backward at 800x1344 (201,600 anchors of 80 classes) took 1.09 to
    1.18 s of CPU time with it, 1.11 to 1.23 without. On other devices, where it fuses kernels and no bits are promised, it stays.
    """
    return torch.jit.optimized_execution(False) if kind_of(device) == CPU else nullcontext()


def limit_histories(storage: EventStorage) -> None:
    """Keep of every scalar no more values than a writer looks at. Detectron2 keeps a million of each, which grows by
    308 MiB in 90,000 iterations of 40 scalars. Of a storage that holds none yet."""
    storage.histories().default_factory = functools.partial(HistoryBuffer, LONGEST_WINDOW)


def scalars_of(storage: EventStorage) -> dict[str, dict]:
    """By name, whether a scalar is smoothed and its ``[value, iteration]`` within the window that writers look at."""
    return {
        name: {"smooth": storage.smoothing_hints()[name], "values": _recent(history.values())}
        for name, history in storage.histories().items()
        if name not in CLOCK
    }


def _recent(values: list[tuple[float, int]]) -> list[list]:
    since = values[-1][1] - WINDOW
    recent = itertools.takewhile(lambda item: item[1] > since, reversed(values))
    return [[value, iteration] for value, iteration in recent][::-1]


def put_scalars_back(storage: EventStorage, scalars: dict[str, dict]) -> None:
    """Inverse of :func:`scalars_of`, for a new storage."""
    for name, scalar in scalars.items():
        for value, iteration in scalar["values"]:
            storage.put_scalar(name, value, smoothing_hint=scalar["smooth"], cur_iter=iteration)


def check_place(state: dict) -> None:
    """What a checkpoint says of the place in the run is of the form that ``Trainer.state_dict`` gives, for the file may
    come from anybody, and the checkpoints that it names are removed one by one.

    Raises:
        ValueError: it is not.
    """
    place = state.get("place")
    match state["iteration"], place:
        case int(), None:  # of a version without it
            return
        case int(), {
            "seed": int(),
            "scalars": dict(scalars),
            "metrics_written": int(),
            "checkpoints": list(names),
        } if all(map(_is_scalar, scalars.values())) and all(map(_is_name, names)):
            running = place.get("running", {})
            if isinstance(running, dict) and all(isinstance(x, float) for x in running.values()):
                return
    raise ValueError("its place in the run is of another form")


def _is_scalar(scalar: object) -> bool:
    match scalar:
        case {"smooth": bool(), "values": list(values)}:
            return all(
                isinstance(pair, list) and list(map(type, pair)) == [float, int] for pair in values
            )
    return False


def _is_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"model_[0-9]{7,}", name) is not None


class MetricsFile(JSONWriter):
    """Detectron2's writer of metrics.json, which can go on where a checkpoint was written.

    Args:
        path: the file; lines are appended.
    """

    def __init__(self, path: str):
        super().__init__(path, window_size=WINDOW)
        self.path = path

    @property
    def written(self) -> int:
        """The last iteration of which everything was written, -1 before the first."""
        return self._last_write

    def go_on_after(self, written: int) -> None:
        """Take the lines of later iterations out of the end of the file, for they will come again, and a line that
        was only half written."""
        self._last_write = written
        with open(self.path, "rb") as file:
            lines = file.readlines()
        size = sum(map(len, lines))
        while lines and _iteration(lines[-1]) > written:
            size -= len(lines.pop())
        os.truncate(self.path, size)


def _iteration(line: bytes) -> float:
    try:
        return json.loads(line)["iteration"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
