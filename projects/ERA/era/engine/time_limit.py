"""``SOLVER.MAX_SECONDS``: a training that is done in time, with its schedule at its end.

After every step the time that is left is compared with what the rest of the schedule takes at the pace of the last steps. Where
that is more, the rest of the schedule is gone through in fewer iterations (:class:`~era.engine.schedule.Shortened`), so that the
learning rate still comes down to its end; where the machine has become faster again, in as many as fit, up to ``SOLVER.MAX_ITER``.
All processes decide alike. A checkpoint keeps the shortened schedule, and a run that is resumed goes on along it, whatever
``SOLVER.MAX_SECONDS`` it has.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import statistics
import time
from collections import deque

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from era.checkpoint.writing import remove, write_text_whole
from era.engine.schedule import Shortened

logger = logging.getLogger(__name__)

SHORTENED_FILE = "shortened.json"  # in OUTPUT_DIR: how far, of a run that was
PACE = 0.1  # of the schedule: the last steps whose mean is the pace
LEAST = 5  # steps that are a pace; the first one of a process, which warms up, is none of them
TOLERANCE = 0.02  # of the schedule: differences up to that change nothing, but near the end
clock = time.monotonic


class TimeLimit(HookBase):
    """Moves the end of a training so that it is done in time; the first of all hooks, for others look at the end.

    Args:
        schedule: of the learning rate, which is shortened.
        seconds: from now on, evaluations included; 0 = as long as it takes.
        eval_period: ``TEST.EVAL_PERIOD``, iterations; 0 = evaluated at the end only.
        folder: ``OUTPUT_DIR``.
    """

    def __init__(self, schedule: Shortened, *, seconds: float, eval_period: int, folder: str):
        self.schedule, self.seconds, self.eval_period = schedule, seconds, eval_period
        self.file = os.path.join(folder, SHORTENED_FILE)
        self._start = clock()
        self._steps: deque[float] = deque(maxlen=max(LEAST, int(PACE * schedule.iterations)))
        self._evaluation = 0.0  # seconds of the last one
        self._began: float | None = None  # the step at work
        self._ended: float | None = None
        self._is_first = True

    @classmethod
    def insert(cls, hooks: list[HookBase | None], schedule: Shortened, cfg: CfgNode) -> None:
        """Into a trainer's hooks, by its config."""
        limit = cls(
            schedule,
            seconds=cfg.SOLVER.MAX_SECONDS,
            eval_period=cfg.TEST.EVAL_PERIOD,
            folder=cfg.OUTPUT_DIR,
        )
        hooks.insert(0, limit)

    def before_train(self) -> None:
        """A run that goes on ends where its checkpoint says, whatever was decided after that."""
        if self.schedule.is_shortened:
            self.trainer.max_iter = self.schedule.end
            self._write()
        elif comm.is_main_process():
            remove(self.file)

    def before_step(self) -> None:
        """The step before, with all that was done after it; an evaluation counts by itself."""
        now = clock()
        if self._began is not None:
            is_evaluated = self.eval_period > 0 and self.trainer.iter % self.eval_period == 0
            if is_evaluated:
                self._evaluation = now - self._ended
            if not self._is_first:
                self._steps.append((self._ended if is_evaluated else now) - self._began)
            self._is_first = False
        self._began = now

    def after_step(self) -> None:
        """Move the end, where that is called for."""
        self._ended = clock()
        done, end = self.trainer.iter + 1, self.trainer.max_iter
        if not self.seconds or done >= end:
            return
        fits = min(comm.all_gather(self.fitting_end(done)))
        tolerance = int(TOLERANCE * self.schedule.iterations)
        is_near = end - done <= tolerance
        if fits < end - (0 if is_near else tolerance) or end + tolerance < fits:
            self._move(fits, done)

    def fitting_end(self, done: int) -> int:
        """How many iterations in all are done in time, at most those of the whole schedule.

        Args:
            done: so far.
        """
        left = self.seconds - (self._ended - self._start)
        if left <= self._evaluation:
            return done
        if len(self._steps) < LEAST:
            return self.trainer.max_iter
        pace = statistics.fmean(self._steps)

        def takes(end: int) -> float:
            """Seconds from now until all is done, with the evaluations before ``end`` and that at the end."""
            period = self.eval_period
            evaluations = 1 + ((end - 1) // period - (done - 1) // period if period else 0)
            return (end - done) * pace + evaluations * self._evaluation

        ends = range(done, self.schedule.iterations + 1)
        return done + max(bisect.bisect_right(ends, left, key=takes) - 1, 0)

    def _move(self, end: int, done: int) -> None:
        self.schedule.end_at(end, done)
        self.trainer.max_iter = end
        whole = self.schedule.iterations
        logger.info(
            "SOLVER.MAX_SECONDS %d: after %d iterations and %.0f s the schedule of %d ends at %d.",
            self.seconds, done, self._ended - self._start, whole, end,
        )  # fmt: skip
        self._write()

    def _write(self) -> None:
        if comm.is_main_process():
            about = {"iterations": self.schedule.end, "planned": self.schedule.iterations}
            write_text_whole(json.dumps(about) + "\n", self.file)

    def state_dict(self) -> dict:
        """The schedule, where it was shortened."""
        return self.schedule.state_dict() if self.schedule.is_shortened else {}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of :meth:`state_dict`; of a run with another ``SOLVER.MAX_ITER`` nothing is taken over, for that sets
        another schedule.

        Raises:
            ValueError: the state is of another form.
        """
        if self.schedule.load_state_dict(state):
            logger.info("The schedule of %d iterations ends at %d.", self.schedule.iterations, self.schedule.end)  # fmt: skip


def read_shortened(folder: str | os.PathLike) -> tuple[int, int] | None:
    """Iterations at which a run's schedule was made to end, and those that were planned; None where it was not shortened.

    Args:
        folder: ``OUTPUT_DIR`` of the run.
    """
    try:
        with open(os.path.join(folder, SHORTENED_FILE), encoding="utf-8") as file:
            found = json.load(file)
        end, planned = int(found["iterations"]), int(found["planned"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (end, planned) if end < planned else None
