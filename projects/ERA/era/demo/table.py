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
        seconds = step_seconds(read_metrics(run.folder))
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
    if row.iterations == reference.iterations:
        when = f"At equal iterations ({row.iterations})"
    else:
        when = f"NOT at equal iterations ({row.iterations} against {reference.iterations})"
    if row.inherited != reference.inherited:
        start = f"NOT from an equal start (inherited {row.inherited} against {reference.inherited})"
    elif row.inherited == NOTHING:
        start = "nothing inherited"
    else:
        start = f"both starting from the teacher's {row.inherited}"
    points = round(row.ap - reference.ap, 1) + 0.0  # no "-0.0"
    if points >= CLEARLY:
        verdict = f'"{row.label}" beats "{reference.label}" by {points:+.1f} points'
    elif points > 0:
        verdict = (
            f'"{row.label}" is {points:+.1f} points ahead of "{reference.label}", which is not a '
            "clear win"
        )
    else:
        verdict = f'"{row.label}" does NOT beat "{reference.label}": {points:+.1f} points'
    return f"{when} and {start}, {verdict} ({row.ap:.1f} AP against {reference.ap:.1f} AP)."


HEADINGS = (
    "run",
    "inherited from the teacher",
    "iterations",
    "AP",
    "AP50",
    "AP75",
    "parameters",
    "ms per training step",
    "ms per image",
)
SHORT_HEADINGS = (
    "run",
    "inherited from\nthe teacher",
    *HEADINGS[2:7],
    "ms per\nstep",
    "ms per\nimage",
)
TEXTS = 2  # of these headings; the others are numbers


def cells(row: Row) -> list[str]:
    """A row as text."""
    return [
        row.label,
        row.inherited,
        str(row.iterations),
        *(tables.number(value, ".1f") for value in (row.ap, row.ap50, row.ap75)),
        tables.number(row.parameters, ","),
        tables.number(row.step_ms, ".0f"),
        tables.number(row.image_ms, ".1f"),
    ]


def terminal_table(rows: Sequence[Row]) -> str:
    """The table for a terminal, long headings over two lines."""
    return tables.terminal(SHORT_HEADINGS, [cells(row) for row in rows], texts=TEXTS)


def markdown(rows: Sequence[Row], found: Sequence[Gain], notes: Sequence[str]) -> str:
    """The table as Markdown, with the sentences on the gains and notes below."""
    table = tables.markdown(HEADINGS, [cells(row) for row in rows], texts=TEXTS)
    sentences = "\n".join(f"- {gain.sentence}" for gain in found)
    more = "\n".join(f"- {note}" for note in notes)
    return f"# Demo results\n\n{table}\n\n{sentences}\n\nHow to read it:\n\n{more}\n"


def write(
    folder: Path, rows: Sequence[Row], runs: Sequence[Run], found: Sequence[Gain], about: dict
) -> None:
    """Write ``table.md`` and ``results.json``.

    Args:
        about: what ``results.json`` says besides; ``notes`` in it, a list of sentences, is in both.
    """
    (folder / "table.md").write_text(markdown(rows, found, about["notes"]), encoding="utf-8")
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
