"""Runs that are asked to stop: Ctrl-C, SIGTERM, or the signal that a scheduler sends before it takes the machine.

The step at work is finished, a checkpoint is written, and the run leaves with :class:`Stopped`. Where no step is at
work, as while models are built or evaluated, it leaves at once; an evaluation is repeated after ``--resume``.
Several processes agree after every step, so that all of them stop after the same one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from era import compat
from era.engine.hooks import place_of_evaluation
from era.engine.launchers import command_line
from era.errors import UserError

STOP_SIGNALS = "SIGTERM,SIGUSR1"  # beside SIGINT, which Ctrl-C sends
EXIT_SIGNAL = 128  # plus the number of the signal: the exit status of a run that was asked to stop
NOTHING_NEW = "nothing was trained since the last checkpoint, if there is one"


class Stopped(BaseException):
    """The run was asked to stop and does so. Like KeyboardInterrupt no ``except Exception`` takes it.

    Args:
        number: of the signal.
        kept: what was saved, for the user.
        together: whether all processes of the run stop here.
    """

    def __init__(self, number: int, kept: str = NOTHING_NEW, *, together: bool = False):
        super().__init__(number, kept)
        self.number, self.kept, self.together = number, kept, together

    @property
    def status(self) -> int:
        """The exit status of the program, as shells give it for the signal."""
        return EXIT_SIGNAL + self.number

    def __str__(self) -> str:
        return f"stopped by {name_of(self.number)}: {self.kept}. {how_to_go_on()}"


@dataclass
class _State:
    """Of this process, as signals are."""

    pid: int = 0  # of the process that notes signals, 0 = none; those that it forks have another
    asked: int = 0  # number of the signal that asked to stop
    at_work: bool = False  # on a step that is to be finished
    numbers: Sequence[int] = ()  # of the signals that ask
    in_worker: bool = False  # the launcher hears a second Ctrl-C


_state = _State()


def name_of(number: int) -> str:
    """``SIGTERM`` for 15; ``signal 99`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def how_to_go_on() -> str:
    """The command of this process, with ``--resume``."""
    arguments = sys.argv[1:]
    again = "--eval-only" in arguments
    if not again and "--resume" not in arguments:
        arguments = ["--resume", *arguments]  # in front, for KEY VALUE pairs end the command
    return f"{'Evaluate again' if again else 'Go on'} with:\n    {command_line(arguments)}"


def tell(text: str) -> None:
    """A line on standard error, also from within a handler of a signal, where ``print`` may fail."""
    os.write(2, f"{text}\n".encode())


def stop_numbers(names: str) -> list[int]:
    """Numbers of SIGINT and of the signals in a comma-separated list; those that are ignored stay so.

    Raises:
        UserError: no such signal, or one that cannot be noted.
    """
    numbers = [signal.SIGINT]
    for name in filter(None, (part.strip() for part in names.split(","))):
        number = getattr(signal, name, None)
        if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
            raise UserError(
                f"--stop-signals names {name!r}: expected names of signals that can be caught, such as {STOP_SIGNALS}; "
                "name those that your scheduler sends."
            )
        numbers.append(number)
    return [n for n in dict.fromkeys(numbers) if signal.getsignal(n) != signal.SIG_IGN]


@contextmanager
def stop_signals(names: str, *, in_worker: bool = False) -> Iterator[None]:
    """Inside, these signals and SIGINT ask the run to stop. Outside the main thread nothing changes.

    Processes that are forked meanwhile, the data loader's, leave the signals to this one: a terminal and SLURM send
    them to all processes of a run, and a step cannot be finished without its pictures. At the end they are ended.

    Args:
        names: comma-separated.
        in_worker: a launcher passes the signals on, and a second one changes nothing.

    Raises:
        UserError: as :func:`stop_numbers`.
        Stopped: a signal came while no step was at work.
    """
    global _state
    numbers = stop_numbers(names)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier, children = _state, set(multiprocessing.active_children())
    _state = _State(pid=os.getpid(), numbers=numbers, in_worker=in_worker)
    handlers = {number: signal.signal(number, _note) for number in numbers}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # the launcher blocked them until here
        yield
    finally:
        _end(set(multiprocessing.active_children()) - children)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _state = earlier


def _note(number: int, frame) -> None:
    if _state.pid != os.getpid() or _state.asked:
        return
    _state.asked = number
    if not _state.in_worker:
        if signal.SIGINT in _state.numbers:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # once more ends the process, whatever it does
        if _state.at_work:
            tell(asked_to_stop(number))
    if not _state.at_work:
        raise Stopped(number)


def asked_to_stop(number: int) -> str:
    """What is told at once after the signal."""
    again = "once more " if number == signal.SIGINT else ""
    return (
        f"{name_of(number)}: finishing the step at work and writing a checkpoint; Ctrl-C {again}stops at once and loses "
        "what was trained since the last one."
    )


def _leave_signals_to_parent() -> None:
    # In a forked process. torch's loader gives its processes handlers of their own; what is blocked stays so.
    if _state.pid and _state.pid == os.getppid():
        signal.pthread_sigmask(signal.SIG_BLOCK, _state.numbers)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_signals_to_parent)


def _end(children: set) -> None:
    """End processes that SIGTERM does not end; nobody hears of it."""
    if not children:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's calls it a failure
    for child in children:
        child.kill()
    for child in children:
        child.join()
    signal.signal(signal.SIGCHLD, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """No step is at work inside: the main process leaves at once where it is asked to, and the launcher ends the rest.

    Raises:
        Stopped: a signal came, or had come before.
    """
    if not comm.is_main_process():
        yield
        return
    before, _state.at_work = _state.at_work, False
    try:
        if _state.asked:
            raise Stopped(_state.asked)
        yield
    finally:
        _state.at_work = before


def agreed_signal() -> int:
    """The signal that any process of the run was asked to stop by, 0 if none was; all must ask together."""
    if comm.get_world_size() == 1:
        return _state.asked
    asked = torch.tensor([_state.asked], dtype=torch.int32)
    dist.all_reduce(asked, dist.ReduceOp.MAX, group=compat.cpu_group())
    return int(asked)


class StopAtSignal(HookBase):
    """Ends training after the step in which any process was asked to stop, with a checkpoint of that step."""

    def __init__(self):
        self._done: int | None = None  # the last step, until the next one begins

    @classmethod
    def insert(cls, hooks: list[HookBase | None]) -> None:
        """Into a trainer's hooks: after those of the schedule and the checkpoints, before the evaluation."""
        evaluation = place_of_evaluation(hooks)
        hooks.insert(evaluation, cls())

    def before_train(self) -> None:
        """From here on a signal waits for the end of the step."""
        _state.at_work = True

    def before_step(self) -> None:
        """What was done before is no longer in the weights alone."""
        self._done = None

    def after_step(self) -> None:
        """Raises Stopped in all processes, or in none."""
        self._done = self.trainer.iter
        if number := agreed_signal():
            raise Stopped(number, self._keep(), together=True)

    def after_train(self) -> None:
        """A run that left while it evaluated has a step that may not be saved yet."""
        _state.at_work = False
        stopped = sys.exc_info()[1]
        if isinstance(stopped, Stopped) and self._done is not None:
            stopped.kept = self._keep()

    def _keep(self) -> str:
        """Save the last step, unless it has a checkpoint anyway; what is to be told about it."""
        trainer, iteration = self.trainer, self._done
        self._done = None
        name, period = f"model_{iteration:07d}", trainer.cfg.SOLVER.CHECKPOINT_PERIOD
        if iteration >= trainer.max_iter - 1:
            name = "model_final"
        elif comm.is_main_process() and not (period > 0 and (iteration + 1) % period == 0):
            trainer.save_checkpoint(iteration)
        path = os.path.join(trainer.cfg.OUTPUT_DIR, f"{name}.pth")
        return f"{iteration + 1} of {trainer.max_iter} iterations are done and in {path}"
