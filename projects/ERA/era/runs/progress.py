"""How far the runs are, and how that is shown: a block that renews itself, or a line now and then."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

LINE_EVERY = 15.0  # seconds between two lines where the screen cannot be renewed
BAR = 24  # width of a run's bar, characters


@dataclass(frozen=True)
class RunView:
    """One run as it is shown."""

    name: str
    done: int  # optimiser steps
    total: int  # optimiser steps, 0 for an evaluation
    state: str  # waiting, running, evaluating, done, reused

    def short(self) -> str:
        """For a single line, as ``era 120/800``."""
        if self.state == "running" and self.total:
            return f"{self.name} {self.done}/{self.total}"
        return f"{self.name} {self.state}"

    def long(self, width: int) -> str:
        """For a line of its own, with a bar."""
        done = self.state in ("done", "reused")
        share = 1.0 if done else self.done / self.total if self.total else 0.0
        full = round(share * BAR)
        bar = "█" * full + "·" * (BAR - full)
        steps = f"{self.done:5d}/{self.total} steps" if self.total and not done else ""
        state = "" if self.state == "running" and self.total else self.state
        return f"  {self.name:<{width}} {bar} {steps} {state}".rstrip()


def duration(seconds: float) -> str:
    """``3:10``, or ``1:02:03`` from an hour on."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def clock(elapsed: float, left: float) -> str:
    """Elapsed and remaining time in words; the latter rounded, for it is an estimate."""
    step = 10 if left < 600 else 30
    rounded = math.ceil(left / step) * step
    return f"{duration(elapsed)} elapsed, about {duration(rounded)} left"


class Screen:
    """Shows progress on a terminal as a block that renews itself, elsewhere as lines, not often."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.is_tty = self.stream.isatty()
        self._height = 0  # of the block that is on the terminal
        self._next_line = 0.0

    def show(self, views: Iterable[RunView], elapsed: float, left: float) -> None:
        """Show the state of all runs; ``elapsed`` and ``left`` in seconds."""
        views = list(views)
        if self.is_tty:
            width = max(len(view.name) for view in views)
            self._block([*(view.long(width) for view in views), f"  {clock(elapsed, left)}"])
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            runs = "  ".join(view.short() for view in views if view.state != "waiting")
            self._write(f"{runs} | {clock(elapsed, left)}\n")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(self._erase() + text + "\n")

    def close(self) -> None:
        """Leave the block where it is; what follows goes below."""
        self._height = 0

    def _block(self, lines: list[str]) -> None:
        columns = shutil.get_terminal_size().columns
        text = "".join(line[: columns - 1] + "\n" for line in lines)
        self._write(self._erase() + text)
        self._height = len(lines)

    def _erase(self) -> str:
        height, self._height = self._height, 0
        return f"\x1b[{height}F\x1b[J" if height else ""

    def _write(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.encode(encoding, errors="replace").decode(encoding))
        self.stream.flush()
