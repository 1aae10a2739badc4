"""The demo's numbers: gathered from the runs, as a table, as sentences, and machine-readable."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from era.runs.measure import Measurement
from era.runs.metrics import AP_NAMES, read_ap, read_metrics, step_seconds
from era.runs.plan import NOTHING, Run

# The pairs that differ in distillation alone: plain student, ERA student.
PAIRS = (("plain", "era"), ("plain_init", "era_init"))
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
                iterations=run.iterations or steps.get(run.depends_on or "", 0),
                ap=ap["AP"],
                ap50=ap["AP50"],
                ap75=ap["AP75"],
                parameters=cost.parameters if cost else None,
                step_ms=seconds * 1000 if seconds is not None else None,
                image_ms=cost.image_seconds * 1000 if cost else None,
            )
        )
    return rows


def gains(rows: Sequence[Row]) -> list[dict]:
    """For every pair that is there: AP of ERA minus AP of the plain student.

    Returns:
        Dicts with ``plain`` and ``era`` (AP), ``gain`` (points), ``inherited``, ``iterations`` and
        ``sentence``.
    """
    by_name = {row.name: row for row in rows}
    found = []
    for plain_name, era_name in PAIRS:
        plain, era = by_name.get(plain_name), by_name.get(era_name)
        if plain and era:
            found.append(
                {
                    "plain": plain.ap,
                    "era": era.ap,
                    "gain": era.ap - plain.ap,
                    "inherited": era.inherited,
                    "iterations": era.iterations,
                    "sentence": _sentence(plain, era),
                }
            )
    return found


def _sentence(plain: Row, era: Row) -> str:
    if plain.iterations == era.iterations:
        when = f"At equal iterations ({era.iterations})"
    else:
        when = f"NOT at equal iterations (ERA {era.iterations}, plain {plain.iterations})"
    start = (
        "nothing inherited"
        if era.inherited == NOTHING
        else f"both starting from the teacher's {era.inherited}"
    )
    numbers = f"{era.ap:.1f} AP against {plain.ap:.1f} AP"
    gain = round(era.ap - plain.ap, 1) + 0.0  # no "-0.0"
    if gain >= CLEARLY:
        verdict = f"ERA beats the plain student by {gain:+.1f} points"
    elif gain > 0:
        verdict = f"ERA is {gain:+.1f} points ahead of the plain student, which is not a clear win"
    else:
        verdict = f"ERA does NOT beat the plain student: {gain:+.1f} points"
    return f"{when} and {start}, {verdict} ({numbers})."


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


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    return (
        row.label,
        row.inherited,
        str(row.iterations),
        *(_number(value, ".1f") for value in (row.ap, row.ap50, row.ap75)),
        _number(row.parameters, ","),
        _number(row.step_ms, ".0f"),
        _number(row.image_ms, ".1f"),
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def terminal_table(rows: Sequence[Row]) -> str:
    """The table for a terminal: aligned, with headings over two lines."""
    heads = (
        ("", "run"),
        ("inherited from", "the teacher"),
        ("", "iterations"),
        *(("", name) for name in AP_NAMES),
        ("", "parameters"),
        ("ms per", "step"),
        ("ms per", "image"),
    )
    body = [cells(row) for row in rows]
    widths = [max(map(len, [*heads[i], *(line[i] for line in body)])) for i in range(len(heads))]

    def line(texts: Sequence[str]) -> str:
        left = [f"{text:<{w}}" for text, w in zip(texts[:2], widths[:2], strict=True)]
        right = [f"{text:>{w}}" for text, w in zip(texts[2:], widths[2:], strict=True)]
        return "  ".join(left + right).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    top = [line([head[i] for head in heads]) for i in (0, 1)]
    return "\n".join([*top, rule, *(line(texts) for texts in body), rule])


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table as Markdown, with the sentences on the gains and notes below."""
    align = ["---", "---"] + ["---:"] * (len(HEADINGS) - 2)
    lines = [HEADINGS, align, *(cells(row) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    sentences = "\n".join(f"- {gain['sentence']}" for gain in gains(rows))
    more = "\n".join(f"- {note}" for note in notes)
    return f"# Demo results\n\n{table}\n\n{sentences}\n\nHow to read it:\n\n{more}\n"


def results(rows: Sequence[Row], runs: Sequence[Run], about: dict) -> dict:
    """Everything for ``results.json``: rows with their commands, the gains, and ``about`` as it is."""
    commands = {run.name: list(run.command) for run in runs}
    return {
        **about,
        "runs": [{**asdict(row), "command": commands[row.name]} for row in rows],
        "gains": gains(rows),
    }


def write(folder: Path, rows: Sequence[Row], runs: Sequence[Run], about: dict) -> None:
    """Write ``table.md`` and ``results.json``; ``about`` holds ``notes``, a list of sentences."""
    (folder / "table.md").write_text(markdown(rows, about["notes"]), encoding="utf-8")
    text = json.dumps(_without_nan(results(rows, runs, about)), indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def _without_nan(value):
    """JSON has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
