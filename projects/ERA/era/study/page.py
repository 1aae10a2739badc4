"""A study's ``table.md``: AP and what it cost, by size, at equal time, and how it was counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from era.runs import tables
from era.runs.metrics import AP_NAMES
from era.runs.schema import Plan
from era.runs.series import LAST_POINTS
from era.study import equal_time, tuning
from era.study.interval import METHOD
from era.study.summary import Entry


def share_headings(entries: Sequence[Entry]) -> list[str]:
    """Of the columns that the methods' charts ask for, as far as there is anything to stand in them."""
    found = {chart.share: None for entry in entries for chart in entry.charts if chart.share}
    return [name for name in found if any(entry.share(name) is not None for entry in entries)]


def table(entries: Sequence[Entry]) -> str:
    """AP by seed, gains, time and memory, and what the methods' charts come to, as a Markdown table."""
    labels = {entry.name: entry.label for entry in entries}
    seeds = list(dict.fromkeys(seed for e in entries for seed in e.results if seed is not None))
    headings = ["variant", "inherited", "iterations", *(f"AP, seed {seed}" for seed in seeds)]
    headings += ["AP, mean", "spread", "gain", "95 % interval", "over", "ms a step", "peak MiB"]
    has_gpu = any(entry.median("gpu_mib") is not None for entry in entries)
    headings += ["GPU MiB"] * has_gpu
    shares = share_headings(entries)
    headings += shares
    rows = []
    for entry in entries:
        by_seed = [
            entry.results[seed].ap["AP"] if seed in entry.results else None for seed in seeds
        ]
        low, high = entry.interval or (None, None)
        rows.append(
            [
                *(entry.label, entry.inherited, str(entry.iterations)),
                *(tables.number(ap, ".1f") for ap in (*by_seed, entry.mean(), entry.spread())),
                tables.number(entry.gain, "+.1f"),
                tables.ABSENT if low is None else f"{low:+.1f} to {high:+.1f}",
                labels.get(entry.reference, ""),
                tables.number(entry.median("step_ms"), ".0f"),
                tables.number(entry.median("peak_mib"), ".0f"),
                *[tables.number(entry.median("gpu_mib"), ".0f")] * has_gpu,
                *(tables.number(entry.share(name), ".1%") for name in shares),
            ]
        )
    return tables.markdown(headings, rows, texts=2)


def size_table(entries: Sequence[Entry]) -> str:
    """AP at two overlaps and by size, mean and spread over seeds, as a Markdown table."""
    rows = []
    for entry in entries:
        cells = [entry.label]
        for name in AP_NAMES[1:]:
            mean, spread = (tables.number(f(name), ".1f") for f in (entry.mean, entry.spread))
            cells.append(mean if spread == tables.ABSENT else f"{mean} ± {spread}")
        rows.append(cells)
    return tables.markdown(["variant", *AP_NAMES[1:]], rows)


def page(
    plan: Plan,
    entries: Sequence[Entry],
    problems: Mapping[str, str],
    choices: Sequence[tuning.Choice] = (),
) -> str:
    """Everything for ``table.md``.

    Args:
        problems: why runs are missing, by their names.
        choices: what was chosen before.
    """
    has_gpu = any(entry.median("gpu_mib") is not None for entry in entries)
    shares = {c.share: c for e in entries for c in e.charts if c.share in share_headings(entries)}
    notes = [
        "AP of boxes in points, of the model after its last iteration; spread: standard deviation over seeds.",
        METHOD,
        *([equal_time.NOTE] if equal_time.compared(entries) else []),
        "ms a step: median of the run's steps while other runs went on beside it; peak MiB: most resident memory "
        "of its process"
        + ("; GPU MiB: most memory of tensors on its GPU" if has_gpu else "")
        + "; median over seeds.",
        *(
            f"{name}: {chart.y_label}, the last curve's end (mean of its last {LAST_POINTS} logged points) over the "
            f"first's, mean over seeds; charts.svg shows all ends. {chart.explanation}"
            for name, chart in shares.items()
        ),
        *plan.notes,
        *(f"Missing: {name}: {why}" for name, why in problems.items()),
    ]
    listed = "\n".join(f"- {note}" for note in notes)
    parts = [
        f"# {plan.title}",
        table(entries),
        size_table(entries),
        equal_time.table(entries),
        tuning.table(plan, choices),
        listed,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"
