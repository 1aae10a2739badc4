"""The processes of a run on one machine: started, watched, and ended together.

None of them outlives the process that started it, however that ended: on Linux the system kills them with it
(``PR_SET_PDEATHSIG``); elsewhere, where there is no prctl, each looks once a second whether its parent is still there.
"""

from __future__ import annotations

import ctypes
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import NamedTuple

import torch.multiprocessing as mp

from era import compat
from era.engine.stopping import (
    EXIT_SIGNAL,
    Stopped,
    asked_to_stop,
    how_to_go_on,
    stop_numbers,
    stop_signals,
    tell,
)

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
LOOK_SECONDS = 1.0  # between two looks for the parent, where there is no prctl
WAKE_SECONDS = 0.1  # the launcher looks for signals
GRACE_SECONDS = (
    5.0  # after one process has failed the others may say why they fail too, or finish a file
)


class Launch(NamedTuple):
    """How many processes there are and where they meet.

    Attributes:
        processes: on each machine.
        url: ``tcp://HOST:PORT``; "auto" = a free port of this machine.
        signals: names of those that ask to stop, comma-separated.
    """

    processes: int
    machines: int
    machine_rank: int
    url: str
    signals: str


class Outcome(NamedTuple):
    """How the processes of this machine ended.

    Attributes:
        asked: the signal that asked the launcher to stop, 0 if none did.
        at_once: the user did not want to wait.
        codes: exit codes by local rank; below 0 the signal that ended it.
        first: local rank of the one that failed first, of which the others' end follows; None if none failed.
        traceback: what that one raised, "" if it told by itself.
    """

    asked: int
    at_once: bool
    codes: list[int]
    first: int | None
    traceback: str


def run_processes(function: Callable[..., object], args: tuple, how: Launch) -> Outcome:
    """Run ``function(*args)`` in processes of their own, which meet first, and wait for the end of all.

    When one fails, the others have :data:`GRACE_SECONDS` and are killed then. A signal that asks to stop is passed on
    to them; Ctrl-C after it kills them.
    """
    if how.url == "auto":
        how = how._replace(url=f"tcp://127.0.0.1:{compat.free_port()}")
    numbers = stop_numbers(how.signals)
    resource_tracker.ensure_running()  # or starting it below would let the signals through
    with _held_back(numbers):  # the processes inherit that, until they can note the signals
        context = mp.start_processes(
            _process, (os.getpid(), function, args, how), how.processes, join=False
        )
        watch = _Watch(context.processes)
        handlers = {number: signal.signal(number, watch.note) for number in numbers}
    try:
        watch.wait()
    finally:
        watch.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    codes = [process.exitcode for process in context.processes]
    traceback = "" if watch.first is None else _traceback(context.error_files[watch.first])
    return Outcome(watch.asked, watch.at_once, codes, watch.first, traceback)


@contextmanager
def _held_back(numbers: list[int]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _traceback(path: str) -> str:
    # Written by torch's wrapper around the function of a process, in a file that only this user may write.
    try:
        with open(path, "rb") as file:
            return pickle.load(file)
    except FileNotFoundError:
        return ""


class _Watch:
    """Over processes that were started."""

    def __init__(self, processes: list):
        self.processes = processes
        self.pid = os.getpid()
        self.signals: list[int] = []
        self.asked, self.at_once = 0, False
        self.first: int | None = None
        self._deadline = float("inf")

    def note(self, number: int, frame) -> None:
        """Handler of the signals that ask to stop."""
        if os.getpid() == self.pid:
            self.signals.append(number)

    def wait(self) -> None:
        """Until all have ended."""
        running = {process.sentinel: rank for rank, process in enumerate(self.processes)}
        while running:
            self._look_for_signals()
            ready = multiprocessing.connection.wait(list(running), WAKE_SECONDS)
            ranks = [running.pop(sentinel) for sentinel in ready]
            for rank in ranks:
                self.processes[rank].join()
            self._judge(ranks)
            if time.monotonic() > self._deadline:
                self.kill()

    def kill(self) -> None:
        """End those that still run."""
        for process in self.processes:
            if process.exitcode is None:
                process.kill()

    def _look_for_signals(self) -> None:
        while self.signals:
            number = self.signals.pop(0)
            if not self.asked:
                self.asked = number
                tell(asked_to_stop(number))
                for process in self.processes:
                    if process.exitcode is None:
                        os.kill(process.pid, number)
            elif number == signal.SIGINT and not self.at_once:
                self.at_once, self._deadline = True, 0.0

    def _judge(self, ranks: list[int]) -> None:
        """Processes that ended together: whether one of them failed, and whether the others are to follow.

        Processes that stop together after a step have waited for the checkpoint before they end.
        """
        codes = {rank: self.processes[rank].exitcode for rank in ranks}
        failed = [rank for rank, code in codes.items() if code != 0 and not is_stop(code)]
        if failed and self._deadline == float("inf"):
            # one that a signal ended comes before those that miss it
            self.first = min(failed, key=lambda rank: codes[rank] > 0)
        if any(codes.values()):
            self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)


def is_stop(code: int) -> bool:
    """Whether an exit code is that of a process that was asked to stop."""
    return code > EXIT_SIGNAL


def _process(local_rank: int, launcher: int, function, args: tuple, how: Launch) -> None:
    """One process of a run that was started here."""
    end_with(launcher)
    take_part(local_rank, function, args, how)


def take_part(local_rank: int, function: Callable[..., object], args: tuple, how: Launch) -> None:
    """As one of the processes of a run: meet the others, then ``function(*args)``.

    Raises:
        SystemExit: asked to stop; the main process has told so.
    """
    stopped = None
    with stop_signals(how.signals, in_worker=True):
        try:
            compat.join_run(
                function,
                args,
                local_rank=local_rank,
                processes=how.processes,
                machines=how.machines,
                machine_rank=how.machine_rank,
                url=how.url,
            )
        except Stopped as e:
            stopped = e.with_traceback(None)  # whose frames hold the model and its process group
            stopped.__context__ = None
    if stopped is None:
        return
    if local_rank == 0 and how.machine_rank == 0:
        tell(str(stopped))
    if stopped.together:
        compat.leave_process_group()
    sys.exit(stopped.status)


def end_with(parent: int) -> None:
    """This process is killed when ``parent``, its parent, has ended in any way."""
    if not (sys.platform == "linux" and _killed_with_parent()):
        threading.Thread(target=_look_for, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def _killed_with_parent() -> bool:
    try:
        return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    except (OSError, AttributeError):
        return False


def _look_for(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def stopped_sentence(outcome: Outcome) -> str:
    """For a stop of which the main process told nothing, being ended or on another machine."""
    if outcome.at_once:
        why = "stopped at once: what was trained since the last checkpoint is lost"
    else:
        why = "stopped before a step was done; what was saved before is whole"
    last = outcome.traceback.strip().splitlines()[-1:]
    return f"{why}{f' ({last[0][:200]})' if last else ''}. {how_to_go_on()}"
