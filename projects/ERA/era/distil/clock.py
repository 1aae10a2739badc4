"""The time that a distillation takes, over all calls of its command, and each training's part of what is left of ``--time``."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from era.checkpoint.writing import write_text_whole
from era.distil.configs import DISTILLED, PLAIN, TEACHER
from era.errors import UserError

TIME_FILE = "time.json"
PREPARE = "prepare"  # looking at the data, steps that are tried, and the start of later calls
BEAT = 5.0  # seconds after which the file is written again: a command that is killed loses no more
USED = 0.98  # of a given time; the rest is for what is foreseen by rule of thumb
clock = time.monotonic


class Clock:
    """Counts the seconds of each step, and keeps them in a file; inside ``with`` it runs.

    Args:
        file: of an earlier call, which is gone on with, or a new one.

    Attributes:
        seconds: by step, of all calls.

    Raises:
        UserError: a file that cannot be read.
    """

    def __init__(self, file: Path):
        self.file = file
        self.seconds = _read(file)
        self._step, self._since = "", 0.0
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()
        self.begin("")

    def snapshot(self) -> dict[str, float]:
        """Seconds by step, up to now."""
        with self._lock:
            self._count()
            return dict(self.seconds)

    def begin(self, step: str) -> None:
        """From now on the time is of this step; "" = of none."""
        with self._lock:
            self._count()
            self._step, self._since = step, clock()
            self._write()

    def add(self, step: str, seconds: float) -> None:
        """Time that a step has taken already."""
        with self._lock:
            self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    def _count(self) -> None:
        now = clock()
        if self._step:
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._since
        self._since = now

    def _write(self) -> None:
        seconds = {step: round(value, 1) for step, value in self.seconds.items()}
        write_text_whole(json.dumps({"seconds": seconds}, indent=1) + "\n", str(self.file))

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with self._lock:
                self._count()
                self._write()


def _read(file: Path) -> dict[str, float]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        return {str(step): float(value) for step, value in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(
            f"{file} cannot be read ({' '.join(str(e).split())[:100]}): expected what distil wrote there; remove it to count "
            "the time anew."
        ) from e


def seconds_for(
    training: str, limit: float, planned: Mapping[str, float], used: Mapping[str, float]
) -> float:
    """What a training that begins, or goes on, has of the time that is left: what follows the trainings is kept free, and the
    rest is shared out by what is still foreseen of each.

    Args:
        training: the next one, of those that are not done.
        limit: seconds of ``--time``.
        planned: seconds foreseen, by step in their order.
        used: seconds, by step.
    """
    names = [name for name in planned if name in (TEACHER, PLAIN, DISTILLED)]
    after = sum(seconds for name, seconds in planned.items() if name not in names)
    left = USED * limit - sum(used.values()) - after
    later = sum(planned[name] for name in names[names.index(training) + 1 :])
    own = max(planned[training] - used.get(training, 0.0), 0.0)
    return max(left, 0.0) * own / (own + later) if own else 0.0
