"""What a variant has at the iterations, and at the time, that the one it is compared with took.

Read off the curves of evaluations that were made during the trainings, by straight lines between them: nothing
before the first evaluation, nothing after the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from era.runs import tables
from era.study.summary import Entry

NOTE = (
    "Minutes: iterations times the median of a step, so without evaluations. AP on the way is read off the evaluations "
    "that were made, by straight lines between them, and is – where a curve does not reach. Where the learning rate "
    "falls to the end of the schedule (a cosine, or steps), AP on the way is lower than that of a whole schedule of "
    "that length: the slower of two is understated. A run that was trained for as long as another is the fair form."
)

COLUMNS = {
    "minutes": "minutes",
    "reference_minutes": "the reference's",
    "ap_at_reference_iterations": "AP at its iterations",
    "ap_at_reference_minutes": "AP at its minutes",
    "reference_ap": "the reference's AP",
    "ap": "AP at the end",
    "reference_ap_at_minutes": "the reference's AP at that time",
}


def ap_at(curve: np.ndarray, step: float) -> float | None:
    """AP at an optimiser step, by straight lines between evaluations.

    Args:
        curve: (2, points), optimiser steps in rising order and AP.

    Returns:
        None before the first evaluation and after the last one.
    """
    steps, ap = curve
    if not steps.size or not steps[0] <= step <= steps[-1] * (1 + 1e-9):
        return None
    return float(np.interp(step, steps, ap))


def minutes(entry: Entry) -> float | None:
    """Of all training steps; None where the time of a step is not known."""
    step_ms = entry.median("step_ms")
    return entry.iterations * step_ms / 60_000 if step_ms and entry.iterations else None


def ap_after(entry: Entry, time: float | None) -> float | None:
    """AP after so many minutes of training steps."""
    step_ms = entry.median("step_ms")
    return ap_at(entry.curve, time * 60_000 / step_ms) if step_ms and time is not None else None


def compare_times(entry: Entry, reference: Entry) -> dict[str, float | None]:
    """The numbers of a row of :func:`table`, by the names of :data:`COLUMNS`."""
    own, other = minutes(entry), minutes(reference)
    return {
        "minutes": own,
        "reference_minutes": other,
        "ap_at_reference_iterations": ap_at(entry.curve, reference.iterations),
        "ap_at_reference_minutes": ap_after(entry, other),
        "reference_ap": reference.mean(),
        "ap": entry.mean(),
        "reference_ap_at_minutes": ap_after(reference, own),
    }


def compared(entries: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """The trainings with curves, each with the one that its gain is counted from."""
    by_name = {entry.name: entry for entry in entries}
    pairs = [(entry, by_name[entry.reference]) for entry in entries if entry.reference]
    return [(entry, other) for entry, other in pairs if entry.curve.size and other.curve.size]


def as_dict(entries: Sequence[Entry]) -> dict[str, dict[str, float | None]]:
    """:func:`compare_times` of every variant that is compared, by its name."""
    return {entry.name: compare_times(entry, other) for entry, other in compared(entries)}


def table(entries: Sequence[Entry]) -> str:
    """Variants at equal iterations and at equal time, as a Markdown table; "" where there is nothing to compare."""
    labels = {entry.name: entry.label for entry in entries}
    pairs = compared(entries)
    texts = ["variant", "reference"] + ["trained for the time of"] * any(
        e.time_of for e, _ in pairs
    )
    rows = []
    for entry, reference in pairs:
        names = [entry.label, reference.label, labels.get(entry.time_of, "")][: len(texts)]
        numbers = compare_times(entry, reference)
        rows.append([*names, *(tables.number(numbers[name], ".1f") for name in COLUMNS)])
    return tables.markdown([*texts, *COLUMNS.values()], rows, texts=len(texts)) if rows else ""
