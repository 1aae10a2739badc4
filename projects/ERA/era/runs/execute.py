"""Run the demo's processes side by side, the longest way first, and tell how long it will take."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from era.errors import UserError
from era.runs.metrics import read_metrics, step_seconds, steps_done
from era.runs.plan import Run, is_finished, mark_finished, remove
from era.runs.progress import RunView, Screen

# Priors, until something is measured, in seconds on a slow core.
STEP_SECONDS = 0.3  # one step of a run of cost 1
OVERHEAD_SECONDS = 30.0  # start-up and evaluation of a run
FINISH_SECONDS = 30.0  # what follows the last run: timing, figures, pictures
STOP_SECONDS = 10.0  # a child that was asked to stop is killed after that
TAIL_LINES = 12  # of a failed run's log


@dataclass
class State:
    """Where a run stands."""

    run: Run
    process: subprocess.Popen | None = None
    started: float = 0.0  # time.monotonic()
    seconds: float | None = None  # wall time of the complete run
    reused: bool = False
    steps: int = 0
    step_seconds: float | None = None

    @property
    def is_done(self) -> bool:
        """Complete, now or in an earlier demo."""
        return self.reused or self.seconds is not None

    def view(self) -> RunView:
        """As it is shown."""
        if self.is_done:
            name = "reused" if self.reused else "done"
        elif self.process is None:
            name = "waiting"
        else:
            name = "evaluating" if self.steps >= self.run.iterations else "running"
        return RunView(self.run.name, self.steps, self.run.iterations, name)


def estimate_left(states: Sequence[State], now: float) -> dict[str, float]:
    """Seconds that each run still needs, waiting for others not counted.

    A run's own steps tell it best; before that, a measured run of the same cost; before that, the
    priors, scaled by what is measured at all.
    """
    measured = [s for s in states if s.step_seconds and s.run.cost]
    scale = statistics.median([s.step_seconds / s.run.cost for s in measured] or [STEP_SECONDS])
    overheads = [
        max(0.0, s.seconds - s.run.iterations * (s.step_seconds or 0.0))
        for s in states
        if s.seconds is not None and (s.step_seconds or not s.run.iterations)
    ]
    overhead = statistics.mean(overheads) if overheads else OVERHEAD_SECONDS
    left = {}
    for state in states:
        run = state.run
        if state.is_done:
            left[run.name] = 0.0
            continue
        alike = [s.step_seconds for s in measured if s.run.cost == run.cost]
        per_step = state.step_seconds or (statistics.median(alike) if alike else scale * run.cost)
        total = run.iterations * per_step + overhead
        if state.process is None:
            left[run.name] = total
            continue
        # By the clock, but never behind the steps that are known to be done; half the overhead is
        # start-up. A run that takes longer than thought is taken to be nearly done.
        by_steps = (run.iterations - state.steps) * per_step + overhead / 2
        by_clock = total - (now - state.started)
        best = min(by_steps, max(by_clock, by_steps - 25 * per_step)) if state.steps else by_clock
        left[run.name] = max(1.0, best)
    return left


def priorities(runs: Sequence[Run], left: dict[str, float]) -> dict[str, float]:
    """Seconds of the longest chain that starts with each run: who has most behind it goes first."""
    chain: dict[str, float] = {}

    def length(run: Run) -> float:
        if run.name not in chain:
            after = [length(other) for other in runs if other.depends_on == run.name]
            chain[run.name] = left[run.name] + max(after, default=0.0)
        return chain[run.name]

    for run in runs:
        length(run)
    return chain


def next_run(runs: Sequence[Run], waiting: set[str], done: set[str], left: dict) -> Run | None:
    """The run to start now: its dependency is done, and its chain is the longest."""
    ready = [r for r in runs if r.name in waiting and (not r.depends_on or r.depends_on in done)]
    chain = priorities(runs, left)
    return max(ready, key=lambda run: chain[run.name], default=None)


def makespan(
    runs: Sequence[Run], left: dict[str, float], running: set[str], done: set[str], jobs: int
) -> float:
    """Seconds until all runs are done on ``jobs`` workers, if each needs what ``left`` says."""
    done = set(done)
    ends = {name: left[name] for name in running}
    waiting = {r.name for r in runs} - done - set(ends)
    now = 0.0
    while waiting or ends:
        while len(ends) < jobs:
            run = next_run(runs, waiting, done, left)
            if run is None:
                break
            waiting.remove(run.name)
            ends[run.name] = now + left[run.name]
        if not ends:
            break  # a dependency that is no run of ours
        first = min(ends, key=ends.__getitem__)
        now = ends.pop(first)
        done.add(first)
    return now


def execute(
    runs: Sequence[Run],
    *,
    jobs: int,
    cores: int,
    screen: Screen,
    reuse: bool = False,
    poll_seconds: float = 1.0,
    start: Callable[[Run, int], subprocess.Popen] | None = None,
) -> dict[str, State]:
    """Run everything; returns the final states by name.

    Args:
        runs: each may depend on one other.
        jobs: processes at a time.
        cores: CPU cores to share among them.
        reuse: keep runs that an earlier demo completed, if nothing they follow from has changed.
        poll_seconds: how often to look.
        start: starts a run on that many threads; :func:`start_process` unless a test says otherwise.

    Raises:
        UserError: a run failed. On that, and on any other exception, the others are stopped.
    """
    start = start or start_process
    folder_of = {run.name: run.folder for run in runs}
    states = {run.name: State(run) for run in runs}
    if reuse:
        for run in runs:  # in order of dependency, so that a redone teacher redoes its students
            needed = states[run.depends_on].reused if run.depends_on else True
            if needed and is_finished(run, folder_of):
                states[run.name].reused = True
                _look(states[run.name])
    began = time.monotonic()
    try:
        while True:
            for state in states.values():
                if state.process is not None and not state.is_done:
                    _look(state)
                    _collect(state, folder_of, screen)
            now = time.monotonic()
            done = {name for name, s in states.items() if s.is_done}
            running = {name for name, s in states.items() if s.process and not s.is_done}
            left = estimate_left(list(states.values()), now)
            while len(running) < jobs:
                waiting = set(states) - done - running
                run = next_run(runs, waiting, done, left)
                if run is None:
                    break
                states[run.name].process = start(run, max(1, cores // jobs))
                states[run.name].started = time.monotonic()
                running.add(run.name)
            rest = makespan(runs, left, running, done, jobs) + FINISH_SECONDS
            screen.show((s.view() for s in states.values()), now - began, rest)
            if len(done) == len(states):
                return states
            time.sleep(poll_seconds)
    finally:
        stop([s.process for s in states.values() if s.process is not None])
        screen.close()


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


def _look(state: State) -> None:
    metrics = read_metrics(state.run.folder)
    state.steps = steps_done(metrics)
    state.step_seconds = step_seconds(metrics)


def _collect(state: State, folder_of: dict, screen: Screen) -> None:
    code = state.process.poll()
    if code is None:
        return
    run = state.run
    if code != 0:
        lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
        screen.say("\n".join(f"  {run.name}: {line}" for line in lines[-TAIL_LINES:]))
        how = f"exit status {code}" if code > 0 else f"signal {-code}"
        raise UserError(
            f"the demo's run {run.name!r} failed ({how}), its last lines are above and the whole log "
            f"is {run.log}: mend what it names, then go on with --reuse."
        )
    state.seconds = time.monotonic() - state.started
    mark_finished(run, folder_of, state.seconds)
    if not screen.is_tty:
        screen.say(f"{run.name}: done in {state.seconds:.0f} s")
