"""Real runs that get signals: started side by side with the test, watched by their session, ended in any case."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from builders import REPO
from detectron2.utils import comm
from forked import fork_train_net

from era.engine import processes, trainer

LIMIT = 100.0  # seconds until a run counts as hanging


class Running:
    """A run with a session of its own.

    Args:
        pid: of its first process, a child of the test's.
        log: what it writes on both streams.
    """

    def __init__(self, pid: int, log: Path):
        self.pid, self.log = pid, log
        self.seen: set[int] = set()  # all processes that were ever looked at
        self._status: int | None = None

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> dict[int, int]:
        """Parents of the living processes of its session."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, parent, _, session = (
                    (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                )
            except OSError:
                continue
            if int(session) == self.pid and state != "Z":
                found[int(folder.name)] = int(parent)
        self.seen |= set(found)
        return found

    def workers(self) -> list[int]:
        """Training processes of a forked run, by rank."""
        found = set(re.findall(r"rank (\d+) in process (\d+)", self.text))
        return [int(pid) for _, pid in sorted(found)]

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait."""
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, f"no {what}: {self.text[-3000:]}"
            time.sleep(0.02)

    def until_written(self, pattern: str) -> None:
        """Wait for a line in its output."""
        self.until(lambda: re.search(pattern, self.text), pattern)

    def end(self) -> int:
        """Wait for its exit status, below 0 for the signal that ended it."""

        def has_ended():
            self.processes()
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._status = os.waitstatus_to_exitcode(status)
            return done

        self.until(has_ended, "end")
        return self._status

    def leaves_nothing(self, seconds: float) -> None:
        """Within this time no process of it is left, and no shared memory of any that it had."""
        end = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < end, f"left: {left}"
            time.sleep(0.05)
        names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
        shared = [n for n in names if any(n.startswith(f"torch_{pid}_") for pid in self.seen)]
        assert not shared

    def clear(self) -> None:
        """After the test, whatever became of it."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        if self._status is None:
            os.waitpid(self.pid, 0)


@contextmanager
def command(args, log: Path, *, ignore_ctrl_c: bool = False) -> Iterator[Running]:
    """A command line, as a user would start it; ``ignore_ctrl_c`` as a shell does for ``command &`` in a script."""
    disposition = signal.SIG_IGN if ignore_ctrl_c else signal.default_int_handler
    before = signal.signal(signal.SIGINT, disposition)
    try:
        with open(log, "w") as output:
            process = subprocess.Popen(
                list(map(str, args)),
                cwd=REPO,
                env={**os.environ, "PYTHONWARNINGS": "ignore"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(processes.end_with, os.getpid()),
            )
    finally:
        signal.signal(signal.SIGINT, before)
    run = Running(process.pid, log)
    try:
        yield run
    finally:
        run.clear()
        process.returncode = run._status


@contextmanager
def forked(args, log: Path, prepare: Callable[[], None] = lambda: None) -> Iterator[Running]:
    """``train_net.py`` in a process that is forked, as are those that it starts: nothing is imported again.

    Args:
        prepare: called in that process.
    """
    test = os.getpid()

    def set_up() -> None:
        os.setsid()
        processes.end_with(test)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _say_steps()
        prepare()

    pid = fork_train_net(args, log, set_up)
    log.touch()
    run = Running(pid, log)
    try:
        yield run
    finally:
        run.clear()


def _say_steps() -> None:
    own = trainer.Trainer.run_step

    def run_step(self):
        own(self)
        os.write(
            1, f"rank {comm.get_rank()} in process {os.getpid()} did step {self.iter}\n".encode()
        )

    trainer.Trainer.run_step = run_step
