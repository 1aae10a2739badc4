"""Which GPUs a run's process sees: each its own, as many as its processes; given back when it ends.

Names are those of ``CUDA_VISIBLE_DEVICES``, which the process is started with. Nothing is kept here: a GPU is in
use as long as a process that was lent it runs.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from era.errors import UserError
from era.runs.plan import Run

VISIBLE = "CUDA_VISIBLE_DEVICES"


def usable_gpus(
    count: int | None = None, environment: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The GPUs that this process may use, by the names that its children are told.

    Args:
        count: how many there are; None = as torch sees them, which heeds the user's own setting.
        environment: None = this process's.
    """
    count = torch.cuda.device_count() if count is None else count
    setting = (os.environ if environment is None else environment).get(VISIBLE)
    names = map(str, range(count)) if setting is None else setting.split(",")
    return tuple(name.strip() for name in names)[:count]


def gpus_needed(run: Run) -> int:
    """One a process of the run; none where its config says CPU."""
    return 0 if run.config.MODEL.DEVICE == "cpu" else run.num_gpus


def check_gpus(runs: Sequence[Run], gpus: Sequence[str]) -> None:
    """On a machine with GPUs, a run must not ask for more of them than there are.

    Raises:
        UserError: one does.
    """
    for run in runs if gpus else ():
        if gpus_needed(run) > len(gpus):
            raise UserError(
                f"the plan's num_gpus is {run.num_gpus}, this machine has {len(gpus)} GPU(s) to use ({', '.join(gpus)}): "
                f"set it to at most that, and SOLVER.ACCUMULATION_STEPS to {run.num_gpus} over it for the same batches."
            )


def lend(
    count: int, gpus: Sequence[str], in_use: Sequence[str], jobs: int
) -> tuple[str, ...] | None:
    """GPUs for a process that is to start, the idlest first; None while too many of them are in use.

    Args:
        count: how many it needs.
        gpus: all that there are.
        in_use: those of the processes that run, once for each.
        jobs: processes at a time; more than there are GPUs share them evenly.
    """
    most = math.ceil(jobs / len(gpus)) if gpus else 0
    load = Counter(in_use)
    free = sorted((gpu for gpu in gpus if load[gpu] < most), key=lambda gpu: load[gpu])
    return tuple(free[:count]) if len(free) >= count else None


def threads_each(run: Run, *, jobs: int, cores: int, has_gpus: bool) -> int:
    """CPU threads of each of a run's processes, when the machine is full: of such runs there are ``jobs`` on a CPU,
    on GPUs as many as there are processes for these."""
    processes = max(jobs, run.num_gpus) if has_gpus else jobs * run.num_gpus
    return max(1, cores // processes)
