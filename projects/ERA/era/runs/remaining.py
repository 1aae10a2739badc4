"""How long the runs that are left will take, by what was measured so far."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from era.runs.execute import State


def remaining_seconds(states: Mapping[str, State], jobs: int) -> float | None:
    """Seconds until all runs are done; None before a step was measured.

    The longest chain of runs that wait for one another, or all that is left to do shared out among ``jobs``,
    whichever is more. A run that was not started takes a step as the mean of the others does, and what complete
    ones took besides their steps; one that is to take as long as another, that one's time.

    Args:
        states: by name, each after those that it depends on.
        jobs: runs at a time.
    """
    steps = {name: state.step_seconds for name, state in states.items() if state.step_seconds}
    if not steps:
        return None
    usual = statistics.fmean(steps.values())
    besides = _seconds_besides_steps(states)
    alone: dict[str, float] = {}  # seconds of a whole run
    left: dict[str, float] = {}  # seconds that it still needs
    end: dict[str, float] = {}  # seconds until it is done
    for name, state in states.items():
        run, step = state.run, steps.get(name, usual)
        alone[name] = besides + run.iterations * step
        if run.time_of:
            alone[name] = statistics.fmean(alone[other] for other in run.time_of)
        if state.is_waiting:
            left[name] = alone[name]
        else:
            left[name] = max(run.iterations - state.steps, 0) * step if state.is_running else 0.0
        end[name] = left[name] + max((end[other] for other in run.depends_on), default=0.0)
    return max(*end.values(), sum(left.values()) / jobs)


def _seconds_besides_steps(states: Mapping[str, State]) -> float:
    """Start and evaluations of a run, by the mean of the complete ones; 0 while there is none."""
    found = [
        max(state.seconds - state.run.iterations * (state.step_seconds or 0.0), 0.0)
        for state in states.values()
        if state.is_done and state.seconds is not None
    ]
    return statistics.fmean(found) if found else 0.0
