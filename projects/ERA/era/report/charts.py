"""Line charts: matplotlib's SVG, made fit to stand in an HTML page among others."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from era.report.looks import COLOURS

WIDTH, HEIGHT = 480, 320  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 14, 50  # margins around the plot
FONT = 14  # as style.css has it; matplotlib only has to know how much room a text takes
GRID, AXIS = "#d9dce1", "#565b63"  # --rule and --soft of style.css
MOST_POINTS = 240  # of a curve; longer ones are averaged in groups of neighbours
# Numbers on a logarithmic axis between the powers of ten, if it spans more decades than this.
LOG_STEPS = {3.0: (1,), 1.2: (1, 2, 5), 0.4: (1, 1.5, 2, 3, 5, 7)}
FEW_POINTS = 4  # of a curve that is drawn with dots

RC = {
    "font.family": "DejaVu Sans",
    "font.size": FONT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": AXIS,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "lines.scale_dashes": False,
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "report",  # the same input gives the same ids
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Curve:
    """A line over optimiser steps: ``look`` names its colour, ``dash`` is an SVG dash array."""

    name: str
    x: np.ndarray
    y: np.ndarray
    look: str
    dash: str = ""


@dataclass(frozen=True)
class LineChart:
    """A drawing and what the page says around it."""

    title: str
    unit: str
    svg: Markup
    legend: tuple[Curve, ...]
    note: str


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    y_label: str,
    ident: str,
    note: str = "",
    log: bool = False,
) -> LineChart | None:
    """Draw curves; None if there is nothing to draw.

    Args:
        curves: those without a point are left out.
        y_label: with its unit.
        ident: another one for every chart of a page, for the ids in the drawing.
        note: how to read it.
        log: logarithmic y axis; points that are not positive are left out.
    """
    shown = []
    for curve in map(thinned, curves):
        keep = np.isfinite(curve.y) & ((curve.y > 0) | (not log))
        if keep.any():
            shown.append(replace(curve, x=curve.x[keep], y=curve.y[keep]))
    if not shown:
        return None
    scale = "logarithmic scale" if log else "linear scale"
    ends = "; ".join(f"{c.name} ends at {c.y[-1]:.3g}" for c in shown)
    spoken = f"{title}. {y_label}, {scale}, over iterations. {ends}."
    svg = inline_svg(_draw(shown, log=log), ident, spoken)
    unit = f"{y_label}, log scale" if log else y_label
    return LineChart(title, unit, svg, tuple(shown), note)


def thinned(curve: Curve) -> Curve:
    """The curve with at most :data:`MOST_POINTS` points, each the mean of as many neighbours."""
    group = math.ceil(len(curve.x) / MOST_POINTS)
    if group <= 1:
        return curve
    cuts = np.arange(0, len(curve.x), group)
    size = np.diff([*cuts, len(curve.x)])
    x, y = (np.add.reduceat(v, cuts) / size for v in (curve.x, curve.y))
    return replace(curve, x=x, y=y)


def _draw(curves: Sequence[Curve], *, log: bool) -> str:
    """matplotlib's SVG document."""
    with matplotlib.style.context(["default", RC]):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes(
            (
                LEFT / WIDTH,
                BOTTOM / HEIGHT,
                1 - (LEFT + RIGHT) / WIDTH,
                1 - (TOP + BOTTOM) / HEIGHT,
            )
        )
        for patch in (figure.patch, axes.patch):
            patch.set_visible(False)
        for curve in curves:
            dashes = tuple(map(float, curve.dash.split()))
            axes.plot(
                curve.x,
                curve.y,
                color=COLOURS[curve.look],
                linestyle=(0, dashes) if dashes else "-",
                marker="o" if len(curve.x) < FEW_POINTS else "",
                clip_on=False,
            )
        axes.set_xlim(left=0)
        axes.set_xlabel("iteration (optimiser steps)")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _scale_y(axes, np.concatenate([curve.y for curve in curves]), log=log)
        axes.grid(axis="y", clip_on=False)
        axes.tick_params(length=0, pad=7)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=NO_METADATA)
    return stream.getvalue()


def _scale_y(axes: Axes, values: np.ndarray, *, log: bool) -> None:
    """Round numbers on the axis, at least two of them however short its range is."""
    if log:
        axes.set_yscale("log")
        decades = math.log10(values.max() / values.min())
        steps = next((s for least, s in LOG_STEPS.items() if decades > least), None)
        axes.yaxis.set_major_locator(LogLocator(subs=steps) if steps else MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0.0, float(values.min())))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def inline_svg(document: str, ident: str, spoken: str) -> Markup:
    """The ``svg`` element out of a document of matplotlib's, as HTML takes it.

    Namespaces, metadata and the style sheet, which would hold for the whole page, go; ids that
    something refers to get ``ident`` in front, others go; numbers are cut to tenths.

    Args:
        spoken: what the drawing shows, for who cannot see it.
    """
    root = ElementTree.fromstring(document)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                if element.tag != "g":
                    element.set(key, f"{ident}-{value}")
            elif key == "href" or "url(#" in value:
                element.set(key, value.replace("#", f"#{ident}-", 1))
            elif key == "style" and element.tag == "text":  # the page's own font
                anchor = re.search(r"text-anchor: (\w+)", value)
                element.set("text-anchor", anchor[1] if anchor else "start")
            elif key in ("d", "x", "y"):
                element.set(key, re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.1f}", value))
            elif not value.startswith("rotate(-0 "):  # matplotlib turns every text, by nothing
                element.set(key, value)
    root.attrib.clear()
    root.attrib |= {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": spoken}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]
