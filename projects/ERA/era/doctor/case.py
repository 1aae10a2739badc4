"""What is examined, what a check finds, and how findings are told."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from era.devices import CUDA, MPS, kind_of

OK, WARNING, WRONG, SKIPPED = "ok", "warning", "wrong", "not checked"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        status: :data:`OK`, :data:`WARNING` (it can start, but look at this), :data:`WRONG` (it should not start) or
            :data:`SKIPPED`.
        sentence: one, for people.
        details: numbers and tables for ``--json``.
        lines: what is printed below the sentence, such as a table.
    """

    status: str
    sentence: str
    details: dict[str, Any] = field(default_factory=dict)
    lines: str = ""

    def told(self, name: str) -> str:
        """As it is printed."""
        below = "".join(f"\n    {line}" for line in self.lines.splitlines())
        return f"{self.status:<11}  {name}: {self.sentence}{below}"


@dataclass
class Case:
    """A run that is to be started.

    Attributes:
        args: the command line as ``tools/train_net.py`` has it, with the options of the doctor.
        cfg: the run's config on all its processes, frozen.
        told: what reading the config warned of.
        model: what is trained, on the CPU with its first weights, once the check that builds it has passed.
        step_results: what the steps took, by number of processes, see :mod:`era.doctor.steps`.
    """

    args: argparse.Namespace
    cfg: CfgNode
    told: list[str] = field(default_factory=list)
    model: nn.Module | None = None
    step_results: dict[int, dict] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Processes of the run on all machines."""
        return self.args.num_gpus * self.args.num_machines

    @property
    def on_gpu(self) -> bool:
        """Whether it is to run on GPUs by CUDA."""
        return kind_of(self.cfg.MODEL.DEVICE) == CUDA

    @property
    def on_mps(self) -> bool:
        """Whether it is to run on Apple's GPU, which is one, shares the memory of the CPU and counts as a process there."""
        return kind_of(self.cfg.MODEL.DEVICE) == MPS


def plural(number: int, what: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
