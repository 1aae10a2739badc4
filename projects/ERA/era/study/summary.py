"""What a study found, variant by variant."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from era.runs.metrics import AP_NAMES
from era.runs.plan import Run
from era.runs.results import Result
from era.runs.schema import Plan
from era.runs.series import method_charts
from era.study.interval import bootstrap_interval

if TYPE_CHECKING:
    from era.methods.base import Chart


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
    charts: tuple[Chart, ...] = ()  # of its methods
    time_of: str = ""  # the variant for whose time it was trained, "" = for iterations of its own

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
        """Median over seeds of ``step_ms``, ``peak_mib``, ``gpu_mib`` or ``seconds``, as far as it is known."""
        values = [getattr(result, field) for result in self.results.values()]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    @property
    def curve(self) -> np.ndarray:
        """Optimiser steps, and mean AP over seeds there: (2, points), at the steps that every seed has."""
        curves = [dict(map(tuple, result.curve)) for result in self.results.values()]
        shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        points = [(step, np.mean([curve[step] for curve in curves])) for step in shared]
        return np.array(points, dtype=float).reshape(-1, 2).T

    def ends(self, chart: Chart) -> dict[str, float]:
        """Where the curves of one of its charts end: mean over seeds by the curve's group, in the chart's order,
        for the groups that every seed has whose result tells of them."""
        known = [r.charts[chart.title] for r in self.results.values() if chart.title in r.charts]
        shared = (
            [group for group in known[0] if all(group in ends for ends in known)] if known else []
        )
        return {group: statistics.mean(ends[group] for ends in known) for group in shared}

    def share(self, heading: str) -> float | None:
        """The last curve's end over the first's, mean over seeds, of the chart with that :attr:`Chart.share`;
        None if there is no such chart, or it has a single curve."""
        shares = []
        for chart in self.charts:
            for result in self.results.values():
                ends = [*result.charts.get(chart.title, {}).values()]
                if chart.share == heading and len(ends) > 1 and ends[0] > 0:
                    shares.append(ends[-1] / ends[0])
        return statistics.mean(shares) if shares else None

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
            "gpu_mib": self.median("gpu_mib"),
            "charts": {chart.title: self.ends(chart) for chart in self.charts},
            "shares": {
                chart.share: self.share(chart.share) for chart in self.charts if chart.share
            },
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
    for run in (run for run in runs if not run.is_part):
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
                charts=method_charts(run.methods),
                time_of=plan.variants[name].pace[0] if plan.variants[name].pace else "",
            )
        )
    return entries
