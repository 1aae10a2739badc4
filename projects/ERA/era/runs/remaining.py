"""How long the runs that are left will take, by the steps that were measured so far."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from era.runs.execute import State


def remaining_seconds(states: Mapping[str, State], jobs: int) -> float | None:
    """Seconds until all runs are done; None before a step was measured.

    The longest chain of runs that wait for one another, or all that is left to do shared out among ``jobs``,
    whichever is more. A run that was not started takes the steps of the others' mean; one that is to take as
    long as another, that one's time. Complete runs count with their start and evaluations, others without.

    Args:
        states: by name, each after those that it depends on.
        jobs: runs at a time.
    """
    paces = {name: pace for name, state in states.items() if (pace := _pace(state))}
    if not paces:
        return None
    usual = statistics.fmean(paces.values())
    alone: dict[str, float] = {}  # seconds of a whole run
    left: dict[str, float] = {}  # seconds that it still needs
    end: dict[str, float] = {}  # seconds until it is done
    for name, state in states.items():
        run, pace = state.run, paces.get(name, usual)
        alone[name] = run.iterations * pace
        if run.time_of and state.is_waiting:
            alone[name] = statistics.fmean(alone[other] for other in run.time_of)
        live = state.is_waiting or state.is_running
        left[name] = alone[name] - min(state.steps, run.iterations) * pace if live else 0.0
        end[name] = left[name] + max((end[other] for other in run.depends_on), default=0.0)
    return max(*end.values(), sum(left.values()) / jobs)


def _pace(state: State) -> float | None:
    """Seconds a step: of a complete run all of its time, of another the median of its steps so far."""
    if state.is_done and state.seconds is not None and state.run.iterations:
        return state.seconds / state.run.iterations
    return state.step_seconds
