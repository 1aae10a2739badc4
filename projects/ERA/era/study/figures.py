"""AP during the training, over iterations and over the time that their steps take; where the methods' charts end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from era.study.summary import Entry

if TYPE_CHECKING:
    from era.methods.base import Chart

# Okabe and Ito's colours, which colour-blind people tell apart; more variants get another dash.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
DASHES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # and the marks that go with them
STYLE = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "study",  # the same input gives the same file
}
NO_METADATA = {"Date": None, "Creator": None}
FEW = 8  # variants up to which single seeds are drawn, too
WIDTH, HEIGHT, LINE = 13, 4.8, 0.24  # of a figure, and of a line of its legend, in inches


def looks(entries: Sequence[Entry]) -> dict[str, dict]:
    """How each student's lines look in every figure, by its name."""
    students = [entry.name for entry in entries if not entry.is_teacher]
    cycle = itertools.cycle([(c, d, m) for d, m in DASHES for c in COLOURS])
    return {
        name: {"color": colour, "linestyle": dash, "marker": mark, "markersize": 3.5}
        for name, (colour, dash, mark) in zip(students, cycle, strict=False)
    }


def write_curves(entries: Sequence[Entry], path: Path) -> bool:
    """Draw the students' curves as an SVG file: means over seeds, the best at the end first in the legend; single
    seeds faint, where there are few variants.

    The time is that of the training steps alone (iterations times the median of a step): without start, and
    without evaluations, of which a study makes more than a user would.

    Returns:
        Whether there was anything to draw.
    """
    shown = [entry for entry in entries if not entry.is_teacher and entry.curve.size]
    if not shown:
        return False
    look = looks(entries)
    shown.sort(key=lambda entry: -entry.curve[1, -1])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, max(HEIGHT, LINE * (len(shown) + 1))), layout="constrained")
        steps, minutes = figure.subplots(1, 2, sharey=True)
        for entry in shown:
            x, y = entry.curve
            steps.plot(x, y, label=f"{y[-1]:.1f}  {entry.label}", **look[entry.name])
            if len(entry.results) > 1 and len(shown) <= FEW:
                colour = look[entry.name]["color"]
                for result in entry.results.values():
                    single = zip(*result.curve, strict=True)
                    steps.plot(*single, color=colour, alpha=0.25, linewidth=1)
            step_ms = entry.median("step_ms")
            if step_ms is not None:
                minutes.plot(x * step_ms / 60_000, y, **look[entry.name])
        steps.set_xlabel("iteration (optimiser steps)")
        minutes.set_xlabel("minutes of training steps")
        steps.set_ylabel("box AP (points)")
        for axis in (steps, minutes):
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
        title = "AP at the end" if len(shown) > 1 else None
        figure.legend(loc="outside right center", title=title, alignment="left")
        figure.savefig(path, format="svg", metadata=NO_METADATA)
    return True


def write_charts(entries: Sequence[Entry], path: Path) -> bool:
    """Draw where the curves of the methods' charts end, as an SVG file: a panel a chart, a line a variant, over the
    chart's curves; means over seeds.

    Returns:
        Whether there was anything to draw.
    """
    panels: dict[str, Chart] = {}
    for entry in entries:
        panels |= {chart.title: chart for chart in entry.charts if entry.ends(chart)}
    if not panels:
        return False
    look = looks(entries)
    with matplotlib.rc_context(STYLE):
        shown = [e for e in entries if any(chart.title in panels for chart in e.charts)]
        height = max(HEIGHT, LINE * (len(shown) + 1))
        figure = Figure(figsize=(4 + 5 * len(panels), height), layout="constrained")
        for axis, chart in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.values(), strict=True
        ):
            _draw_ends(axis, chart, shown, look)
        known = {}
        for axis in figure.axes:
            known |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(known.values(), known.keys(), loc="outside right center", alignment="left")
        figure.savefig(path, format="svg", metadata=NO_METADATA)
    return True


def _draw_ends(axis: Axes, chart: Chart, entries: Sequence[Entry], look: dict[str, dict]) -> None:
    """One chart's panel; the first variant with most curves says what stands on the x axis."""
    ends = {entry.name: entry.ends(chart) for entry in entries}
    groups = list(max(ends.values(), key=len))
    for entry in entries:
        points = [(groups.index(g), end) for g, end in ends[entry.name].items() if g in groups]
        if points:
            axis.plot(*zip(*points, strict=True), label=entry.label, **look[entry.name])
    axis.set_xticks(range(len(groups)), [chart.curve_name(group) for group in groups])
    axis.set_xlim(-0.3, len(groups) - 0.7)
    axis.set_title(chart.title)
    axis.set_ylabel(f"{chart.y_label}, at the end")
    axis.set_ylim(
        bottom=min(0.0, axis.get_ylim()[0])
    )  # so that what is taken off shows in proportion
