"""Run the processes of a plan side by side, the longest way first; resumable, and stopped together."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from era.errors import UserError
from era.runs.folder import is_finished, mark_finished, remove
from era.runs.metrics import read_metrics, step_seconds, steps_done
from era.runs.plan import Run
from era.runs.progress import Progress

STOP_SECONDS = 10.0  # a child that was asked to stop is killed after that
TAIL_LINES = 12  # of a failed run's log
INTERRUPTED = 130  # exit status


@dataclass
class State:
    """Where a run stands."""

    run: Run
    process: subprocess.Popen | None = None
    started: float = 0.0  # time.monotonic()
    seconds: float | None = None  # wall time of the complete run
    reused: bool = False
    steps: int = 0

    @property
    def is_done(self) -> bool:
        """Complete, now or by an earlier call."""
        return self.reused or self.seconds is not None

    @property
    def is_running(self) -> bool:
        """Started and not complete."""
        return self.process is not None and not self.is_done

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
    reuse: bool = False,
    stream: TextIO | None = None,
    poll_seconds: float = 1.0,
    start: Callable[[Run, int], subprocess.Popen] | None = None,
) -> dict[str, State]:
    """Run everything.

    Args:
        runs: each after those that it depends on.
        jobs: processes at a time.
        cores: CPU cores to share among them.
        reuse: keep runs that an earlier call completed, if nothing they follow from has changed.
        stream: where progress is shown; None = standard output.
        poll_seconds: how often to look.
        start: starts a run on that many threads; :func:`start_process` unless a test says otherwise.

    Returns:
        The final states by name; each ``run`` with its iterations, where other runs decided on them.

    Raises:
        UserError: a run failed. On that, and on any other exception, the others are stopped.
    """
    start = start or start_process
    folder_of = {run.name: run.folder for run in runs}
    states = {run.name: State(run) for run in runs}
    for run in (
        runs if reuse else ()
    ):  # in order of dependency: a redone teacher redoes its students
        if all(states[name].reused for name in run.depends_on):
            state = states[run.name]
            state.run = with_iterations(run, states)
            state.reused = is_finished(state.run, folder_of)
            state.steps = state.run.iterations if state.reused else 0
    progress = Progress(*_count(states), stream)
    try:
        while True:
            for state in states.values():
                if state.is_running:
                    state.steps = steps_done(read_metrics(state.run.folder))
                    _collect(state, folder_of, progress)
            running = [state for state in states.values() if state.is_running]
            while len(running) < jobs and (run := next_run(states)):
                state = states[run.name]
                state.run = with_iterations(run, states)
                state.process = start(state.run, max(1, cores // jobs))
                state.started = time.monotonic()
                running.append(state)
            progress.show(*_count(states), ", ".join(state.where for state in running))
            if not running:
                return states
            time.sleep(poll_seconds)
    finally:
        stop([s.process for s in states.values() if s.process is not None])
        progress.close()


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
        if states[run.name].process is None
        and not states[run.name].reused
        and all(states[name].is_done for name in run.depends_on)
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
    iterations = round(states[run.time_of[0]].run.iterations * step[0] / step[1])
    more = ("SOLVER.MAX_ITER", str(iterations))
    return replace(
        run, iterations=iterations, opts=(*run.opts, *more), command=(*run.command, *more)
    )


@contextmanager
def interruptible(output: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the program with one sentence, after what runs was stopped.

    Raises:
        SystemExit: with status 130.
    """

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; what is complete stays in {output}, and --reuse goes on from there.",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def start_process(run: Run, threads: int) -> subprocess.Popen:
    """Start a run in an empty folder, its output in its log, on that many threads, unless the user's
    own OMP_NUM_THREADS says otherwise."""
    remove(run.folder)  # Detectron2 would append to the metrics of an earlier run
    run.folder.mkdir(parents=True)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with open(run.log, "w", encoding="utf-8") as log:
        log.write(f"$ {' '.join(run.command)}\n")
        log.flush()
        return subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ask processes that still run to stop, wait, and kill those that do not."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _count(states: Mapping[str, State]) -> tuple[int, int]:
    """Optimiser steps of all runs, and how many of them are done."""
    return (
        sum(state.run.iterations for state in states.values()),
        sum(state.run.iterations if state.is_done else state.steps for state in states.values()),
    )


def _collect(state: State, folder_of: Mapping[str, Path], progress: Progress) -> None:
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
            f"{run.log}: mend what it names, then go on with --reuse."
        )
    state.seconds = time.monotonic() - state.started
    mark_finished(run, folder_of, state.seconds)
    progress.say(f"{run.name}: done in {state.seconds:.0f} s")
