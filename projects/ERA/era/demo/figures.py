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

from era.demo.table import Row
from era.runs.metrics import read_metrics
from era.runs.plan import Run
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
    """Colour and line style of every training: the teacher grey and dotted, every student a colour of its own."""
    teachers = [run.name for run in runs if run.is_teacher]
    students = [run.name for run in runs if run.iterations and not run.is_teacher]
    return {
        **{name: {"color": GREY, "linestyle": ":"} for name in teachers},
        **{
            name: {"color": COLOURS[index % len(COLOURS)], "linestyle": "-"}
            for index, name in enumerate(students)
        },
    }


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


def write_ap(rows: Sequence[Row], runs: Sequence[Run], path: Path) -> None:
    """AP of the students as bars, with what their training took below; the teacher as a line."""
    by_name = {row.name: row for row in rows}
    teachers = [by_name[run.name] for run in runs if run.is_teacher]
    students = [run for run in runs if not run.is_teacher]
    style = looks(runs)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axis = figure.subplots()
        names = []
        for x, run in enumerate(students):
            row, trained = by_name[run.name], by_name[run.evaluates or run.name]
            # A model that is an evaluation of another is paler than that one.
            alpha = 0.55 if run.evaluates else 1.0
            axis.bar(x, row.ap, width=0.7, color=style[trained.name]["color"], alpha=alpha)
            axis.annotate(
                f"{row.ap:.1f}", (x, row.ap), (0, 3), textcoords="offset points",
                ha="center", va="bottom", fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )  # fmt: skip
            names.append(f"{textwrap.fill(row.label, 18)}\n{_effort(trained)}")
        axis.set_xticks(range(len(names)), names, fontsize=9)
        axis.tick_params(axis="x", length=0)
        for row in teachers:
            axis.axhline(row.ap, color=GREY, linestyle=":", linewidth=1.6, zorder=0)
            axis.annotate(
                f"{row.label} {row.ap:.1f}\n{_effort(row)}",
                (1, row.ap), (4, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", color=GREY, fontsize=9.5,
            )  # fmt: skip
        top = max([row.ap for row in rows if row.ap == row.ap], default=1.0)
        axis.set_ylim(0, max(top * 1.2, 1.0))
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("box AP (points)")
        axis.set_title("Box AP of the students, and what their training took")
        figure.savefig(path, dpi=DPI)


def _effort(row: Row) -> str:
    """Iterations and minutes of a training, a line each."""
    minutes = "" if row.minutes is None else f"\n{row.minutes:.1f} min of steps"
    return f"{row.iterations} iterations{minutes}"


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("iteration (optimiser steps)")
    axis.set_xlim(left=0)


def _marker(x: np.ndarray) -> str | None:
    """A curve of very few points would be invisible without one."""
    return "o" if len(x) < 4 else None
