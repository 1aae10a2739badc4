"""The demo's plots: losses, residuals and AP, from the runs' metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from era.demo.table import Row, gains
from era.runs.metrics import read_metrics
from era.runs.plan import NOTHING, Run

DETECTION_LOSSES = ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
ERA_LOSSES = {
    "loss_era_feature": "feature: e₀ to the teacher's maps",
    "loss_era_residual": "residual: the branches",
    "loss_era_twi_rpn": "TWI: teacher's RPN head",
    "loss_era_twi_roi": "TWI: teacher's ROI head",
    "loss_era_kd": "KD: teacher's classes",
}
# Okabe and Ito's colours, which colour-blind people tell apart. Colour says the method, line style
# what was inherited.
GREY, ORANGE, BLUE, GREEN, PURPLE, SKY = (
    "#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9",
)  # fmt: skip
LOOKS = {
    "teacher": {"color": GREY, "linestyle": ":"},
    "plain": {"color": ORANGE},
    "plain_init": {"color": ORANGE, "linestyle": "--"},
    "era": {"color": BLUE},
    "era_init": {"color": BLUE, "linestyle": "--"},
}
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

_RESIDUAL = re.compile(r"era/(?P<level>\w+)/residual_e(?P<step>\d+)")


def series(metrics: Sequence[dict], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Iterations, and the sum of the named scalars there; lines that lack one are left out."""
    points = [
        (m["iteration"] + 1, sum(m[name] for name in names))
        for m in metrics
        if all(name in m for name in names)
    ]
    table = np.array(points, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def residual_series(metrics: Sequence[dict]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For i = 0..N: iterations, and the mean over levels of the mean of (F_T - e_i)^2."""
    names: dict[int, set[str]] = {}
    for line in metrics:
        for name in line:
            if match := _RESIDUAL.fullmatch(name):
                names.setdefault(int(match["step"]), set()).add(name)
    found = []
    for step in sorted(names):
        iterations, total = series(metrics, sorted(names[step]))
        found.append((iterations, total / len(names[step])))
    return found


def write_losses(runs: Sequence[Run], path: Path) -> None:
    """Detection losses of every training, and the terms of the ERA loss without inheritance."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        # The teacher trains longer: room for it, without pressing the students together.
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
        for run in runs:
            if run.name in LOOKS:
                x, y = series(read_metrics(run.folder), DETECTION_LOSSES)
                left.plot(x, y, label=run.label, marker=_marker(x), **LOOKS[run.name])
        _label(left, "Each model's own detection loss")
        left.set_ylabel("loss (sum of 4 terms)")
        left.set_ylim(bottom=0)
        left.legend()

        era = next((run for run in runs if run.name == "era"), None)
        metrics = read_metrics(era.folder) if era else []
        colours = (BLUE, SKY, ORANGE, GREEN, PURPLE)
        for (name, label), colour in zip(ERA_LOSSES.items(), colours, strict=True):
            x, y = series(metrics, [name])
            if len(x):
                right.plot(x, y, label=label, color=colour, marker=_marker(x))
        _label(right, "What ERA adds to it (ERA student)")
        right.set_ylabel("weighted loss")
        right.set_ylim(bottom=0)
        if right.lines:
            right.legend()
        figure.savefig(path, dpi=DPI)


def write_residuals(runs: Sequence[Run], path: Path) -> None:
    """Distance of every estimate to the teacher's features, for the ERA trainings."""
    chosen = []
    for run in runs:
        curves = residual_series(read_metrics(run.folder)) if run.name in LOOKS else []
        if curves:
            chosen.append((run, curves))
    with matplotlib.rc_context(STYLE):
        panels = max(1, len(chosen))
        figure = Figure(figsize=(5.5 * panels, 4.4), layout="constrained")
        axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
        for axis, (run, curves) in zip(axes, chosen, strict=False):
            # From light to dark, as the estimates come closer.
            shades = matplotlib.colormaps["viridis_r"](np.linspace(0.12, 0.95, len(curves)))
            for step, ((x, y), shade) in enumerate(zip(curves, shades, strict=True)):
                name = "$e_0$ (no branch)" if step == 0 else f"$e_{step}$"
                axis.plot(x, y, color=shade, label=name, marker=_marker(x))
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
            axis.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
            _label(axis, f"{run.label}: what is left after each branch")
            axis.legend(title="estimate")
        axes[0].set_ylabel("mean of $(F_T - e_i)^2$ over the FPN levels")
        figure.savefig(path, dpi=DPI)


def write_ap(rows: Sequence[Row], path: Path) -> None:
    """AP as bars: plain against ERA, those that inherited apart; the teacher as a line."""
    groups = [[row for row in rows if row.inherited == NOTHING and row.name != "teacher"]]
    groups.append([row for row in rows if row.inherited != NOTHING])
    groups = [group for group in groups if group]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axis = figure.subplots()
        names, where, centres, x = [], [], [], 0.0
        for group in groups:
            first = x
            for row in group:
                colour = LOOKS[row.name]["color"] if row.name in LOOKS else SKY
                axis.bar(x, row.ap, width=0.78, color=colour)
                axis.annotate(
                    f"{row.ap:.1f}", (x, row.ap), (0, 3), textcoords="offset points",
                    ha="center", va="bottom", fontweight="bold",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
                )  # fmt: skip
                names.append(_bar_name(row))
                where.append(x)
                x += 1
            centres.append((first + x - 1) / 2)
            x += 0.7
        axis.set_xticks(where, names)
        axis.tick_params(axis="x", length=0)
        for centre, group in zip(centres, groups, strict=True):
            inherited = group[0].inherited
            text = "nothing inherited" if inherited == NOTHING else f"inherited: {inherited}"
            gain = next((g["gain"] for g in gains(rows) if g["inherited"] == inherited), None)
            text += "" if gain is None else f"\nERA {round(gain, 1) + 0.0:+.1f} points"
            axis.annotate(
                text, (centre, 0), (0, -32), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="top", color="#444444", fontsize=10,
                linespacing=1.5,
            )  # fmt: skip
        teacher = next((row for row in rows if row.name == "teacher"), None)
        if teacher:
            axis.axhline(teacher.ap, color=GREY, linestyle=":", linewidth=1.6, zorder=0)
            axis.annotate(
                f"teacher {teacher.ap:.1f}\n({teacher.iterations} iterations)",
                (1, teacher.ap), (4, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", color=GREY, fontsize=9.5,
            )  # fmt: skip
        top = max([row.ap for row in rows if row.ap == row.ap], default=1.0)
        axis.set_ylim(0, max(top * 1.14, 1.0))
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("box AP (points)")
        counts = sorted({row.iterations for row in rows if row.name != "teacher"})
        axis.set_title(f"Box AP of the students after {' / '.join(map(str, counts))} iterations")
        figure.savefig(path, dpi=DPI)


def _bar_name(row: Row) -> str:
    if row.name == "era_alpha1":
        return "ERA\nα = 1"
    return "ERA" if row.name.startswith("era") else "plain"


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("iteration (optimiser steps)")
    axis.set_xlim(left=0)


def _marker(x: np.ndarray) -> str | None:
    """A curve of very few points would be invisible without one."""
    return "o" if len(x) < 4 else None
