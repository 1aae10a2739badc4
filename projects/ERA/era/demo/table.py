"""The demo's numbers: gathered from the runs, as a table, as sentences, and machine-readable."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from era.runs import tables
from era.runs.measure import Measurement
from era.runs.metrics import read_ap, read_metrics, step_seconds
from era.runs.plan import NOTHING, Run

CLEARLY = 1.0  # AP points from which on a gain is called clear
ALIKE = 0.1  # two trainings whose times differ by at most this fraction took equally long


@dataclass(frozen=True)
class Row:
    """One run's results. AP in points of 100; None = not measured."""

    name: str
    label: str
    inherited: str
    iterations: int  # optimiser steps of the training behind the model
    ap: float
    ap50: float
    ap75: float
    parameters: int | None
    step_ms: float | None  # median time of a training step, trainings running side by side
    minutes: float | None  # of all training steps: iterations times step_ms, without evaluations
    image_ms: float | None  # median time of an image: batch 1, one thread, nothing else running


def gather(runs: Sequence[Run], measured: dict[str, Measurement]) -> list[Row]:
    """A row for every run, in their order.

    Raises:
        UserError: a run left no evaluation.
    """
    rows = []
    steps = {run.name: run.iterations for run in runs}
    for run in runs:
        ap = read_ap(run)
        seconds = step_seconds(read_metrics(run.folder)) if run.iterations else None
        cost = measured.get(run.name)
        rows.append(
            Row(
                name=run.name,
                label=run.label,
                inherited=run.inherited,
                iterations=steps.get(run.evaluates or run.name, 0),
                ap=ap["AP"],
                ap50=ap["AP50"],
                ap75=ap["AP75"],
                parameters=cost.parameters if cost else None,
                step_ms=seconds * 1000 if seconds is not None else None,
                minutes=run.iterations * seconds / 60 if seconds is not None else None,
                image_ms=cost.image_seconds * 1000 if cost else None,
            )
        )
    return rows


@dataclass(frozen=True)
class Gain:
    """AP of one run minus AP of the run that it is compared with, in points."""

    run: str
    reference: str
    points: float
    sentence: str


def gains(rows: Sequence[Row], compare: dict[str, str]) -> list[Gain]:
    """The gains of the pairs that are there.

    Args:
        compare: name of a run -> name of the run that it is compared with.
    """
    by_name = {row.name: row for row in rows}
    return [
        Gain(name, reference, by_name[name].ap - by_name[reference].ap,
             _sentence(by_name[name], by_name[reference]))
        for name, reference in compare.items()
        if name in by_name and reference in by_name
    ]  # fmt: skip


def _sentence(row: Row, reference: Row) -> str:
    """Who is ahead, the winner first, and what the two had in common."""
    points = round(row.ap - reference.ap, 1)
    first, second = (reference, row) if points < 0 else (row, reference)
    if first.inherited != second.inherited:
        start = f"NOT from an equal start (inherited {first.inherited} against {second.inherited})"
    elif first.inherited == NOTHING:
        start = "nothing inherited"
    else:
        start = f"both starting from the teacher's {first.inherited}"
    lead = abs(points)
    if lead >= CLEARLY:
        verdict = f'"{first.label}" beats "{second.label}" by {lead:.1f} points'
    elif lead > 0:
        verdict = (
            f'"{first.label}" is {lead:.1f} points ahead of "{second.label}", which is not a clear '
            "win"
        )
    elif lead == 0:
        verdict = f'"{first.label}" and "{second.label}" are level'
    else:  # NaN: a model without a single detection has no AP
        verdict = f'"{first.label}" and "{second.label}" cannot be compared'
    when = _common(first, second)
    return f"{when} and {start}, {verdict} ({first.ap:.1f} AP against {second.ap:.1f} AP)."


def _common(first: Row, second: Row) -> str:
    """What two trainings had in common: iterations, or time; and if neither, that."""
    if first.iterations == second.iterations:
        return f"At equal iterations ({first.iterations})"
    counts = f"{first.iterations} against {second.iterations}"
    if first.minutes is None or second.minutes is None:
        return f"NOT at equal iterations ({counts})"
    one, other = (f"{row.minutes:.1f}" for row in (first, second))
    if abs(first.minutes - second.minutes) <= ALIKE * max(first.minutes, second.minutes):
        each = f"{one} min of steps each" if one == other else f"{one} and {other} min of steps"
        return f"At equal training time ({each})"
    return (
        f"NOT at equal iterations ({counts}) or training time ({one} min of steps against {other})"
    )


def teacher_warning(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """A sentence if the teacher is not above every student that was trained; "" if it is, or if there is none."""
    by_name = {row.name: row for row in rows}
    students = [by_name[run.name] for run in runs if run.iterations and not run.is_teacher]
    for teacher in (by_name[run.name] for run in runs if run.is_teacher):
        ahead = [row for row in students if not (row.ap < teacher.ap or math.isnan(row.ap))]
        if ahead:
            best = max(ahead, key=lambda row: row.ap)
            return (
                f'The teacher is NOT above its students in this run: {teacher.ap:.1f} AP, "{best.label}" {best.ap:.1f} '
                "AP. So it says nothing about learning from a stronger teacher."
            )
    return ""


HEADINGS = (
    "run",
    "iterations",
    "AP",
    "AP50",
    "AP75",
    "parameters",
    "ms per training step",
    "min of training steps",
    "ms per image",
)
SHORT_HEADINGS = (
    *HEADINGS[:6],
    "ms per\nstep",
    "min of\nsteps",
    "ms per\nimage",
)


def cells(row: Row) -> list[str]:
    """A row as text."""
    return [
        row.label,
        str(row.iterations),
        *(tables.number(value, ".1f") for value in (row.ap, row.ap50, row.ap75)),
        tables.number(row.parameters, ","),
        tables.number(row.step_ms, ".0f"),
        tables.number(row.minutes, ".1f"),
        tables.number(row.image_ms, ".1f"),
    ]


def terminal_table(rows: Sequence[Row]) -> str:
    """The table for a terminal, long headings over two lines."""
    return tables.terminal(SHORT_HEADINGS, [cells(row) for row in rows])


def markdown(rows: Sequence[Row], sentences: Sequence[str], notes: Sequence[str]) -> str:
    """The table as Markdown, with the sentences on what it comes to and notes below."""
    table = tables.markdown(HEADINGS, [cells(row) for row in rows])
    found, more = ("\n".join(f"- {text}" for text in texts) for texts in (sentences, notes))
    return f"# Demo results\n\n{table}\n\n{found}\n\nHow to read it:\n\n{more}\n"


def write(
    folder: Path, rows: Sequence[Row], runs: Sequence[Run], found: Sequence[Gain], about: dict
) -> None:
    """Write ``table.md`` and ``results.json``.

    Args:
        about: what ``results.json`` says besides; ``sentences`` in it, what the rows come to, and ``notes``, how to
            read them, are in both.
    """
    (folder / "table.md").write_text(
        markdown(rows, about["sentences"], about["notes"]), encoding="utf-8"
    )
    commands = {run.name: list(run.command) for run in runs}
    results = {
        **about,
        "runs": [{**asdict(row), "command": commands[row.name]} for row in rows],
        "gains": [asdict(gain) for gain in found],
    }
    text = json.dumps(_without_nan(results), indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def _without_nan(value):
    """JSON has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
