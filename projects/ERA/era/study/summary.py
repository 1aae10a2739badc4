"""What a study found, variant by variant, and its tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from era.runs import tables
from era.runs.metrics import AP_NAMES
from era.runs.plan import Run
from era.runs.results import Result
from era.runs.schema import Plan
from era.study.interval import METHOD, bootstrap_interval


@dataclass(frozen=True)
class Entry:
    """Results of one variant, of the seeds whose runs are complete. AP in points of 100."""

    name: str
    label: str
    inherited: str
    iterations: int  # optimiser steps; 0 = evaluation only
    is_teacher: bool
    results: dict[int | None, Result]  # by seed; None = the config's own
    reference: str  # the variant that its gain is counted from, "" = none
    differences: tuple[float, ...]  # AP minus the reference's, by the seeds that both have

    def ap(self, name: str = "AP") -> list[float]:
        """The values of one of :data:`era.runs.metrics.AP_NAMES`, by seed, as far as there are any."""
        values = [result.ap[name] for result in self.results.values()]
        return [value for value in values if value is not None]

    def mean(self, name: str = "AP") -> float | None:
        """Over seeds."""
        return statistics.mean(self.ap(name)) if self.ap(name) else None

    def spread(self, name: str = "AP") -> float | None:
        """Standard deviation over seeds, of a sample; None with fewer than two."""
        return statistics.stdev(self.ap(name)) if len(self.ap(name)) > 1 else None

    @property
    def gain(self) -> float | None:
        """Mean of the paired differences."""
        return statistics.mean(self.differences) if self.differences else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """See :func:`era.study.interval.bootstrap_interval`."""
        return bootstrap_interval(self.differences)

    def median(self, field: str) -> float | None:
        """Median over seeds of ``step_ms``, ``peak_mib`` or ``seconds``, as far as it is known."""
        values = [getattr(result, field) for result in self.results.values()]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "label": self.label,
            "inherited": self.inherited,
            "iterations": self.iterations,
            "is_teacher": self.is_teacher,
            "seeds": list(self.results),
            "ap": {name: [r.ap[name] for r in self.results.values()] for name in AP_NAMES},
            "mean": {name: self.mean(name) for name in AP_NAMES},
            "spread": {name: self.spread(name) for name in AP_NAMES},
            "reference": self.reference or None,
            "differences": list(self.differences),
            "gain": self.gain,
            "interval": list(self.interval) if self.interval else None,
            "step_ms": self.median("step_ms"),
            "peak_mib": self.median("peak_mib"),
            "seconds": self.median("seconds"),
            "curves": [r.curve for r in self.results.values()],
        }


def summarise(plan: Plan, runs: Sequence[Run], results: Mapping[str, Result]) -> list[Entry]:
    """One entry a variant, in the plan's order, with what is complete of it.

    Args:
        results: by name of the run.
    """
    found: dict[str, dict[int | None, Result]] = {}
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.variant, run)
        of_variant = found.setdefault(run.variant, {})
        if run.name in results:
            of_variant[run.seed] = results[run.name]
    entries = []
    for name, run in first.items():
        reference = plan.compare.get(name, "")
        base = found.get(reference, {})
        pairs = [
            (r.ap["AP"], base[seed].ap["AP"]) for seed, r in found[name].items() if seed in base
        ]
        pairs = [pair for pair in pairs if None not in pair]
        iterations = {result.iterations for result in found[name].values()} or {run.iterations}
        entries.append(
            Entry(
                name=name,
                label=run.label,
                inherited=run.inherited,
                iterations=max(iterations),
                is_teacher=run.is_teacher,
                results=found[name],
                reference=reference if base else "",
                differences=tuple(own - other for own, other in pairs),
            )
        )
    return entries


def table(entries: Sequence[Entry]) -> str:
    """AP by seed, gains, time and memory, as a Markdown table."""
    labels = {entry.name: entry.label for entry in entries}
    seeds = list(dict.fromkeys(seed for e in entries for seed in e.results if seed is not None))
    headings = ["variant", "inherited", "iterations", *(f"AP, seed {seed}" for seed in seeds)]
    headings += ["AP, mean", "spread", "gain", "95 % interval", "over", "ms a step", "peak MiB"]
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


def page(plan: Plan, entries: Sequence[Entry], problems: Mapping[str, str]) -> str:
    """Everything for ``table.md``.

    Args:
        problems: why runs are missing, by their names.
    """
    notes = [
        "AP of boxes in points, of the model after its last iteration; spread: standard deviation over seeds.",
        METHOD,
        "ms a step: median of the run's steps while other runs went on beside it; peak MiB: most resident memory "
        "of its process; both: median over seeds.",
        *plan.notes,
        *(f"Missing: {name}: {why}" for name, why in problems.items()),
    ]
    listed = "\n".join(f"- {note}" for note in notes)
    return f"# {plan.title}\n\n{table(entries)}\n\n{size_table(entries)}\n\n{listed}\n"
