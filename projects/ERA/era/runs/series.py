"""Curves from a run's metrics: the student's own losses, what methods add to them, and methods' charts.

A loss ``loss_<method in lower case>_...`` of one of the run's methods is that method's; every other
``loss_...`` is the student's own. Which those are depends on the detector, so no name is listed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from era.registry import METHOD_REGISTRY

if TYPE_CHECKING:
    from era.methods.base import Chart

LAST_POINTS = 5  # of a chart's curve: their mean is where it ends


def own_losses(metrics: Sequence[dict], methods: Sequence[str]) -> tuple[str, ...]:
    """Names of the student's own losses, sorted.

    Args:
        metrics: lines of a run's metrics.json.
        methods: the run's methods by their registered names; () for a plain run.
    """
    return tuple(n for n in _losses(metrics) if not n.startswith(_prefixes(methods)))


def method_losses(metrics: Sequence[dict], methods: Sequence[str]) -> dict[str, str]:
    """Name and label of every loss that the methods added, in the order of the methods' own labels.

    A loss without a label is called by its name; those come last.
    """
    found = [name for name in _losses(metrics) if name.startswith(_prefixes(methods))]
    labels: dict[str, str] = {}
    for name in methods:
        if name in METHOD_REGISTRY:
            labels |= METHOD_REGISTRY.get(name).loss_labels
    known = {name: label for name, label in labels.items() if name in found}
    return known | {name: name for name in found if name not in labels}


def method_charts(methods: Sequence[str]) -> tuple[Chart, ...]:
    """The charts of the methods, in their order."""
    known = [METHOD_REGISTRY.get(name) for name in methods if name in METHOD_REGISTRY]
    return tuple(chart for method in known for chart in method.charts)


def series(metrics: Sequence[dict], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Optimiser steps, and the sum of the named scalars there; lines that lack one are left out.

    Returns:
        Two float arrays of equal length; empty without names.
    """
    points = [
        (line["iteration"] + 1, sum(line[name] for name in names))
        for line in metrics
        if names and all(name in line for name in names)
    ]
    table = np.array(points, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def chart_series(metrics: Sequence[dict], chart: Chart) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The curves of a method's chart: name in the legend, optimiser steps, means of the scalars there."""
    return [(chart.curve_name(group), *curve) for group, *curve in _chart_groups(metrics, chart)]


def chart_ends(metrics: Sequence[dict], chart: Chart) -> dict[str, float]:
    """What a method's chart shows at the end of a training: by the curve's group in the chart's pattern, the mean
    of the last :data:`LAST_POINTS` points."""
    groups = _chart_groups(metrics, chart)
    return {group: float(values[-LAST_POINTS:].mean()) for group, _, values in groups}


def _chart_groups(
    metrics: Sequence[dict], chart: Chart
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Group, optimiser steps, means: scalars that the chart's pattern puts into one group are averaged; groups are
    in natural order, so that "10" follows "9"."""
    groups: dict[str, list[str]] = {}
    for name in sorted({name for line in metrics for name in line}):
        if match := re.fullmatch(chart.pattern, name):
            groups.setdefault(match["curve"], []).append(name)
    curves = []
    for group in sorted(groups, key=_natural):
        iterations, total = series(metrics, groups[group])
        if iterations.size:
            curves.append((group, iterations, total / len(groups[group])))
    return curves


def _losses(metrics: Sequence[dict]) -> list[str]:
    return sorted({name for line in metrics for name in line if name.startswith("loss_")})


def _prefixes(methods: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"loss_{name.lower()}_" for name in methods)


def _natural(text: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
