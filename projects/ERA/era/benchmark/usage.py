"""What a running program and what it started hold of the machine (Linux), and whether that grows."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

MIB = 2**20


class Usage(NamedTuple):
    """Of processes together.

    Attributes:
        memory: resident sets, MiB; a page that two processes share counts twice.
        shared: the part of it that is shared memory (``/dev/shm``, also of names that are removed already), MiB.
        handles: open file descriptors.
        threads: of all processes.
        processes: how many there are.
    """

    memory: float
    shared: float
    handles: int
    threads: int
    processes: int


def usage_of(pids: Sequence[int]) -> Usage:
    """What these processes hold now; one that has just ended holds nothing."""
    total = Usage(0.0, 0.0, 0, 0, 0)
    for pid in pids:
        try:
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            own = Usage(
                _mib(status["VmRSS"]),
                _mib(status["RssShmem"]),
                len(os.listdir(f"/proc/{pid}/fd")),
                int(status["Threads"]),
                1,
            )
        except (OSError, KeyError):
            continue
        total = Usage(*(a + b for a, b in zip(total, own, strict=True)))
    return total


def members_of(session: int) -> list[int]:
    """The living processes of a session: the one that began it and what it started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        state, _, _, own = fields[:4]
        if int(own) == session and state != "Z":
            found.append(int(folder.name))
    return sorted(found)


def left_in_shared_memory(pids: Sequence[int]) -> list[str]:
    """Names in ``/dev/shm`` that torch gave there for these processes."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return sorted(name for name in names if any(name.startswith(f"torch_{pid}_") for pid in pids))


def drift(places: Sequence[float], values: Sequence[float], length: float) -> float:
    """How much a value would rise over a whole run at the rate of the last half of its samples.

    The rate is the median of the slopes between all pairs of samples (Theil and Sen), which single peaks, as of an
    evaluation that just ends, do not move.

    Args:
        places, values: where in the run, rising, and what was found there; at least four.
        length: of the run, in the unit of ``places``.

    Returns:
        In the unit of ``values``; below 0 if it falls.
    """
    if len(places) < 4:
        raise ValueError(f"{len(places)} samples tell no rate: expected at least 4")
    late = list(zip(places, values, strict=True))[len(places) // 2 :]
    slopes = [(v2 - v1) / (p2 - p1) for (p1, v1), (p2, v2) in combinations(late, 2)]
    return statistics.median(slopes) * length


def _mib(text: str) -> float:
    return int(text.split()[0]) * 1024 / MIB
