"""The demo's plots: losses, the methods' own charts, and AP, from the runs' metrics."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from era.demo.table import Gain, Row
from era.runs.metrics import read_metrics
from era.runs.plan import NOTHING, Run
from era.runs.series import chart_series, method_charts, method_losses, own_losses, series

# Okabe and Ito's colours, which colour-blind people tell apart.
GREY = "#555555"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
}
DPI = 130


def looks(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Colour and line style of every training: the colour says the method, dashes that it inherited.

    Where several have the same methods and the same start, each has a colour of its own.
    """
    found: dict[str, dict[str, str]] = {}
    colours: dict[tuple, str] = {}
    alike: list[tuple] = []
    for run in runs:
        if run.is_teacher:
            found[run.name] = {"color": GREY, "linestyle": ":"}
        elif run.iterations:
            alike.append((run.methods, run.inherited))
            key = (run.methods, alike.count(alike[-1]))
            colour = colours.setdefault(key, COLOURS[len(colours) % len(COLOURS)])
            found[run.name] = {
                "color": colour,
                "linestyle": "-" if run.inherited == NOTHING else "--",
            }
    return found


def write_losses(runs: Sequence[Run], distilled: Run, path: Path) -> None:
    """Every training's own losses, summed, and what distillation adds to them in one run."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        # The teacher trains longer: room for it, without pressing the students together.
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
        style = looks(runs)
        for run in runs:
            if run.name in style:
                metrics = read_metrics(run.folder)
                x, y = series(metrics, own_losses(metrics, run.methods))
                left.plot(x, y, label=run.label, marker=_marker(x), **style[run.name])
        _label(left, "Each model's own detection loss")
        left.set_ylabel("loss (sum of its terms)")

        metrics = read_metrics(distilled.folder)
        for index, (name, label) in enumerate(method_losses(metrics, distilled.methods).items()):
            x, y = series(metrics, [name])
            right.plot(x, y, label=label, color=COLOURS[index % len(COLOURS)], marker=_marker(x))
        _label(right, f"What distillation adds to it ({distilled.label})")
        right.set_ylabel("weighted loss")
        for axis in (left, right):
            axis.set_ylim(bottom=0)
            if axis.lines:
                axis.legend()
        figure.savefig(path, dpi=DPI)


def write_charts(runs: Sequence[Run], path: Path) -> None:
    """The charts of the runs' methods, a column a run; no file if no run has any."""
    panels = [
        [(run, chart) for chart in method_charts(run.methods)] for run in runs if run.iterations
    ]
    panels = [column for column in panels if column]
    if not panels:
        return
    rows = max(map(len, panels))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * len(panels), 4.4 * rows), layout="constrained")
        axes = figure.subplots(rows, len(panels), sharey="row", squeeze=False)
        for column, axis_column in zip(panels, axes.T, strict=True):
            for axis in axis_column[len(column) :]:
                axis.set_axis_off()
            for (run, chart), axis in zip(column, axis_column, strict=False):
                curves = chart_series(read_metrics(run.folder), chart)
                # From light to dark, in the order of the curves.
                shades = matplotlib.colormaps["viridis_r"](np.linspace(0.12, 0.95, len(curves)))
                for (name, x, y), shade in zip(curves, shades, strict=True):
                    axis.plot(x, y, color=shade, label=name, marker=_marker(x))
                if chart.log_scale and curves:
                    axis.set_yscale("log")
                    axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
                    axis.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
                _label(axis, f"{run.label}: {chart.title}")
                axis.set_ylabel(chart.y_label)
                if curves:
                    axis.legend()
        figure.savefig(path, dpi=DPI)


def write_ap(rows: Sequence[Row], runs: Sequence[Run], found: Sequence[Gain], path: Path) -> None:
    """AP of the students as bars, with their gains, by what they inherited; the teacher as a line."""
    teacher = next((run.name for run in runs if run.is_teacher), None)
    origin = {run.name: run.evaluates or run.name for run in runs}
    style, points = looks(runs), {gain.run: gain.points for gain in found}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.name != teacher:
            groups.setdefault(row.inherited, []).append(row)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axis = figure.subplots()
        names, where, x = [], [], 0.0
        for inherited, group in groups.items():
            centre = x + (len(group) - 1) / 2
            for row in group:
                # A model that is an evaluation of another is paler than that one.
                alpha = 1.0 if origin[row.name] == row.name else 0.55
                colour = style[origin[row.name]]["color"]
                axis.bar(x, row.ap, width=0.78, color=colour, alpha=alpha)
                text = f"{row.ap:.1f}"
                if row.name in points:
                    text += f"\n({round(points[row.name], 1) + 0.0:+.1f})"
                axis.annotate(
                    text, (x, row.ap), (0, 3), textcoords="offset points",
                    ha="center", va="bottom", fontweight="bold",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
                )  # fmt: skip
                names.append(textwrap.fill(row.label, 13))
                where.append(x)
                x += 1
            x += 0.7
            text = "nothing inherited" if inherited == NOTHING else f"inherited: {inherited}"
            axis.annotate(
                text, (centre, 0), (0, -62), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="top", color="#444444", fontsize=10,
            )  # fmt: skip
        axis.set_xticks(where, names, fontsize=9)
        axis.tick_params(axis="x", length=0)
        for row in rows:
            if row.name == teacher:
                axis.axhline(row.ap, color=GREY, linestyle=":", linewidth=1.6, zorder=0)
                axis.annotate(
                    f"teacher {row.ap:.1f}\n({row.iterations} iterations)",
                    (1, row.ap), (4, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", color=GREY, fontsize=9.5,
                )  # fmt: skip
        top = max([row.ap for row in rows if row.ap == row.ap], default=1.0)
        axis.set_ylim(0, max(top * 1.2, 1.0))
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("box AP (points)")
        counts = sorted({row.iterations for row in rows if row.name != teacher})
        after = " / ".join(map(str, counts))
        axis.set_title(f"Box AP of the students after {after} iterations, and gains")
        figure.savefig(path, dpi=DPI)


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("iteration (optimiser steps)")
    axis.set_xlim(left=0)


def _marker(x: np.ndarray) -> str | None:
    """A curve of very few points would be invisible without one."""
    return "o" if len(x) < 4 else None
