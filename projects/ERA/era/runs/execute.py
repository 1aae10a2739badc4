"""Run the processes of a plan side by side, the longest way first; resumable, and stopped together."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from era import environment
from era.errors import UserError
from era.runs.folder import is_finished, mark_finished, read_stamp
from era.runs.identity import identities
from era.runs.metrics import read_metrics, step_seconds, steps_done
from era.runs.placement import gpus_needed, lend, threads_each
from era.runs.plan import Run
from era.runs.process import peak_memory, start_process, stop
from era.runs.progress import Progress
from era.runs.remaining import remaining_seconds

TAIL_LINES = 12  # of a failed run's log
INTERRUPTED = 130  # exit status


@dataclass
class State:
    """Where a run stands."""

    run: Run
    identity: str = ""
    process: subprocess.Popen | None = None
    gpus: tuple[str, ...] = ()  # that were lent to it
    started: float = 0.0  # time.monotonic()
    seconds: float | None = None  # wall time of the complete run
    peak_mib: float | None = None  # most resident memory of its process; of several it is not known
    commit: str = "unknown"  # of the code that it runs
    reused: bool = False
    steps: int = 0
    step_seconds: float | None = None  # median of its steps so far
    problem: str = ""  # why it failed, or was not started

    @property
    def is_done(self) -> bool:
        """Complete, now or by an earlier call."""
        return not self.problem and (self.reused or self.seconds is not None)

    @property
    def is_running(self) -> bool:
        """Started and not complete."""
        return self.process is not None and not self.is_done and not self.problem

    @property
    def is_waiting(self) -> bool:
        """Not started yet."""
        return self.process is None and not self.reused and not self.problem

    @property
    def where(self) -> str:
        """For people, as ``student 120/800``."""
        is_training = self.steps < self.run.iterations
        at = f"{self.steps}/{self.run.iterations}" if is_training else "evaluating"
        return f"{self.run.name} {at}"


def execute(
    runs: Sequence[Run],
    *,
    jobs: int,
    cores: int,
    gpus: Sequence[str] = (),
    reuse: bool = False,
    known: Mapping[str, int] | None = None,
    go_on: bool = False,
    on_finished: Callable[[State], None] | None = None,
    stream: TextIO | None = None,
    poll_seconds: float = 1.0,
    start: Callable[[Run, int, Sequence[str] | None], subprocess.Popen] | None = None,
) -> dict[str, State]:
    """Run everything.

    Args:
        runs: each after those that it depends on.
        jobs: processes at a time.
        cores: CPU cores to share among them.
        gpus: GPUs to share among them, see :mod:`era.runs.placement`; none = the machine has none, or processes
            see those that this one sees.
        reuse: keep runs that an earlier call completed, if nothing they follow from has changed.
        known: iterations by name of runs whose results are known, without their folders being here: they
            are run only where another run needs what is in their folder.
        go_on: a run that fails leaves the others going; those that depend on it are skipped.
        on_finished: called with every complete run that is not known, reused ones first. Its UserError is
            that run's failure.
        stream: where progress is shown; None = standard output.
        poll_seconds: how often to look.
        start: starts a run on that many threads and these GPUs; :func:`start_process` unless a test says otherwise.

    Returns:
        The final states by name; each ``run`` with its iterations, where other runs decided on them. Failed
        and skipped ones have a ``problem``.

    Raises:
        UserError: a run failed, without ``go_on``. On that, and on any other exception, the others are stopped.
    """
    start, known = start or start_process, known or {}
    folder_of = {run.name: run.folder for run in runs}
    names = identities(runs)
    states = {run.name: State(run, names[run.name]) for run in runs}
    here = {run.name for run in runs if reuse and is_finished(run, names[run.name], folder_of)}
    left = unfinished(runs, here, known)
    for name, state in states.items():
        if name not in left:
            _reuse(state, known.get(name))
    progress = Progress(*_count(states), stream)

    @contextmanager
    def guarded(state: State) -> Iterator[None]:
        try:
            yield
        except UserError as e:
            if not go_on:
                raise
            state.problem = str(e)
            progress.say(state.problem)

    def finish(state: State) -> None:
        if on_finished is not None and state.run.name not in known:
            on_finished(state)

    try:
        for state in states.values():
            if state.reused:
                with guarded(state):
                    finish(state)
        while True:
            for state in states.values():
                if state.is_running:
                    metrics = read_metrics(state.run.folder)
                    state.steps, state.step_seconds = steps_done(metrics), step_seconds(metrics)
                    if state.run.num_gpus == 1:
                        state.peak_mib = peak_memory(state.process.pid) or state.peak_mib
                    with guarded(state):
                        _collect(state, folder_of, progress, finish)
            _skip(states, progress)
            running = [state for state in states.values() if state.is_running]
            while len(running) < jobs and (run := next_run(states)):
                state, lent = states[run.name], None
                if gpus:
                    in_use = [gpu for other in running for gpu in other.gpus]
                    lent = lend(gpus_needed(run), gpus, in_use, jobs)
                    if lent is None:  # it is next, so that none that needs many waits for ever
                        break
                with guarded(state):
                    state.run = with_iterations(run, states)
                    threads = threads_each(run, jobs=jobs, cores=cores, has_gpus=bool(gpus))
                    state.process, state.gpus = start(state.run, threads, lent), lent or ()
                    state.started = time.monotonic()
                    state.commit = environment.commit()
                    running.append(state)
            seconds = remaining_seconds(states, jobs)
            progress.show(*_count(states), seconds, ", ".join(state.where for state in running))
            if not running and not any(state.is_waiting for state in states.values()):
                return states
            time.sleep(poll_seconds)
    finally:
        stop([s.process for s in states.values() if s.process is not None])
        progress.close()


def unfinished(runs: Sequence[Run], here: Collection[str], known: Collection[str]) -> set[str]:
    """Names of the runs that are still to be done.

    A run is kept if its folder is complete and nothing that it builds upon is done anew, or if its result
    is known and nobody needs its folder.

    Args:
        runs: each after those that it depends on.
        here: names of those whose folders are complete.
        known: names of those whose results are known.
    """
    left: set[str] = set()
    while True:
        needed = {name for run in runs if run.name in left for name in run.depends_on}
        more = set(left)
        for run in runs:
            kept = run.name in here and not more & set(run.depends_on)
            if not kept and not (run.name in known and run.name not in needed):
                more.add(run.name)
        if more == left:
            return left
        left = more


def next_run(states: Mapping[str, State]) -> Run | None:
    """The run to start now: all that it depends on is done, and most steps wait for it or are its own."""
    runs = [state.run for state in states.values()]
    behind: dict[str, int] = {}  # steps of the longest chain that begins with a run
    for run in reversed(runs):
        after = [behind[other.name] for other in runs if run.name in other.depends_on]
        behind[run.name] = run.iterations + max(after, default=0)
    ready = [
        run
        for run in runs
        if states[run.name].is_waiting and all(states[name].is_done for name in run.depends_on)
    ]
    return max(ready, key=lambda run: behind[run.name], default=None)


def with_iterations(run: Run, states: Mapping[str, State]) -> Run:
    """A run that is to take as long as others, with the iterations for that, by their measured steps.

    Raises:
        UserError: those trained for too short to measure a step.
    """
    if not run.time_of:
        return run
    step = []
    for names in (run.time_of, run.step_of):
        times = [step_seconds(read_metrics(states[name].run.folder)) for name in names]
        if None in times:
            raise UserError(
                f"{names[times.index(None)]} wrote no time of a step into its metrics.json, which "
                f"{run.name} needs: let it train for more iterations."
            )
        step.append(statistics.median(times))
    return _lasting(run, round(states[run.time_of[0]].run.iterations * step[0] / step[1]))


def _lasting(run: Run, iterations: int) -> Run:
    more = ("SOLVER.MAX_ITER", str(iterations))
    return replace(
        run, iterations=iterations, opts=(*run.opts, *more), command=(*run.command, *more)
    )


@contextmanager
def interruptible(output: Path, *, how: str = "--reuse goes on from there") -> Iterator[None]:
    """Ctrl-C and SIGTERM end the program with one sentence, after what runs was stopped.

    Args:
        output: where complete runs stay.
        how: what a user does to go on.

    Raises:
        SystemExit: with status 130.
    """

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted; what is complete stays in {output}, and {how}.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _reuse(state: State, known_iterations: int | None) -> None:
    """Take a run as complete, with the iterations that it had."""
    run, stamp = state.run, read_stamp(state.run.folder)
    if run.time_of:
        done = known_iterations or steps_done(read_metrics(run.folder))
        state.run = _lasting(run, done)
    state.reused, state.steps = True, state.run.iterations
    state.step_seconds = step_seconds(read_metrics(run.folder))
    if stamp.get("identity") == state.identity:
        state.seconds, state.peak_mib = stamp.get("seconds"), stamp.get("peak_mib")
        state.commit = stamp.get("commit", "unknown")


def _skip(states: Mapping[str, State], progress: Progress) -> None:
    """Runs that wait for one that failed, or for one that is skipped, are skipped."""
    for state in states.values():  # each after those that it depends on
        lost = [name for name in state.run.depends_on if states[name].problem]
        if state.is_waiting and lost:
            state.problem = f"skipped, for it needs {', '.join(lost)}"
            progress.say(f"{state.run.name}: {state.problem}")


def _count(states: Mapping[str, State]) -> tuple[int, int]:
    """Optimiser steps of all runs, and how many of them are done; of one that failed, those that it did."""
    live = [state for state in states.values() if not state.problem]
    lost = sum(state.steps for state in states.values() if state.problem)
    return (
        lost + sum(state.run.iterations for state in live),
        lost + sum(state.run.iterations if state.is_done else state.steps for state in live),
    )


def _collect(
    state: State,
    folder_of: Mapping[str, Path],
    progress: Progress,
    finish: Callable[[State], None],
) -> None:
    code = state.process.poll()
    if code is None:
        return
    run = state.run
    if code != 0:
        lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
        progress.say("\n".join(f"  {run.name}: {line}" for line in lines[-TAIL_LINES:]))
        how = f"exit status {code}" if code > 0 else f"signal {-code}"
        raise UserError(
            f"the run {run.name!r} failed ({how}), its last lines are above and the whole log is "
            f"{run.log}: mend what it names, then go on (--reuse keeps what is complete)."
        )
    state.seconds = time.monotonic() - state.started
    finish(state)
    mark_finished(
        run,
        state.identity,
        folder_of,
        seconds=state.seconds,
        peak=state.peak_mib,
        commit=state.commit,
    )
    progress.say(f"{run.name}: done in {state.seconds:.0f} s")
