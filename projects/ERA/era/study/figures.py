"""AP during the training: over iterations, and over the time that their steps take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from era.study.summary import Entry

# Okabe and Ito's colours, which colour-blind people tell apart; more variants get another dash.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
DASHES = ("-", "--", ":", "-.")
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


def mean_curve(entry: Entry) -> np.ndarray:
    """Optimiser steps, and mean AP over seeds there: (2, points), at the steps that every seed has."""
    curves = [dict(map(tuple, result.curve)) for result in entry.results.values()]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    points = [(step, np.mean([curve[step] for curve in curves])) for step in shared]
    return np.array(points, dtype=float).reshape(-1, 2).T


def write_curves(entries: Sequence[Entry], path: Path) -> bool:
    """Draw the students' curves as an SVG file: means over seeds bold, single seeds faint.

    The time is that of the training steps alone (iterations times the median of a step): without start, and
    without evaluations, of which a study makes more than a user would.

    Returns:
        Whether there was anything to draw.
    """
    shown = [entry for entry in entries if not entry.is_teacher and mean_curve(entry).size]
    if not shown:
        return False
    looks = itertools.cycle([(colour, dash) for dash in DASHES for colour in COLOURS])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        steps, minutes = figure.subplots(1, 2, sharey=True)
        for entry, (colour, dash) in zip(shown, looks, strict=False):
            look = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 3}
            x, y = mean_curve(entry)
            steps.plot(x, y, label=entry.label, **look)
            for result in entry.results.values():
                if len(entry.results) > 1:
                    steps.plot(
                        *zip(*result.curve, strict=True), color=colour, alpha=0.25, linewidth=1
                    )
            step_ms = entry.median("step_ms")
            if step_ms is not None:
                minutes.plot(x * step_ms / 60_000, y, **look)
        steps.set_xlabel("iteration (optimiser steps)")
        minutes.set_xlabel("minutes of training steps")
        steps.set_ylabel("box AP (points)")
        for axis in (steps, minutes):
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
        figure.legend(loc="outside right center")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return True
