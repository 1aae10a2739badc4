"""Line charts as inline SVG: axes with units, linear or logarithmic, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 480, 320  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 14, 46  # margins around the plot
MOST_POINTS = 240  # of a curve; longer ones are averaged in groups of neighbours


@dataclass(frozen=True)
class Curve:
    """A line: ``look`` is the class of the style sheet that colours it, ``dash`` an SVG dash array."""

    name: str
    x: np.ndarray
    y: np.ndarray
    look: str
    dash: str = ""


def thinned(curve: Curve) -> Curve:
    """The curve with at most :data:`MOST_POINTS` points, each the mean of as many neighbours."""
    group = math.ceil(len(curve.x) / MOST_POINTS)
    if group <= 1:
        return curve
    cuts = np.arange(0, len(curve.x), group)
    size = np.diff([*cuts, len(curve.x)])
    x, y = (np.add.reduceat(v, cuts) / size for v in (curve.x, curve.y))
    return Curve(curve.name, x, y, curve.look, curve.dash)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about ``count``, that cover ``low`` to ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten and, over a short range, what lies between, from at most ``low`` to ``high``."""
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        every = [m * 10.0**p for p in powers for m in steps]
        first = max(i for i, v in enumerate(every) if v <= low * 1.0001)
        last = min(i for i, v in enumerate(every) if v >= high * 0.9999)
        if last - first >= 3 or len(steps) == 6:
            return every[first : max(last, first + 1) + 1]
    raise AssertionError("unreachable")


def line_chart(
    title: str, curves: Sequence[Curve], *, y_label: str, note: str = "", log: bool = False
) -> str:
    """A ``figure`` with a drawing, a legend and, for who cannot see it, the last value of each curve.

    Args:
        curves: over optimiser steps; those without a point are left out.
        y_label: with its unit.
        note: below the title, plain text.
        log: logarithmic y axis; points that are not positive are left out.
    """
    shown = []
    for curve in map(thinned, curves):
        keep = np.isfinite(curve.y) & ((curve.y > 0) | (not log))
        if keep.any():
            shown.append(Curve(curve.name, curve.x[keep], curve.y[keep], curve.look, curve.dash))
    if not shown:
        return ""
    every = np.concatenate([curve.y for curve in shown])
    low, high = float(every.min()), float(every.max())
    y_ticks = log_ticks(low, high) if log else nice_ticks(min(0.0, low), high)
    x_ticks = nice_ticks(0.0, max(float(curve.x.max()) for curve in shown))

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def up(y: float) -> float:
        a, b, v = y_ticks[0], y_ticks[-1], y
        if log:
            a, b, v = math.log(a), math.log(b), math.log(v)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (v - a) / (b - a)

    parts = []
    for tick in y_ticks:
        y = f"{up(tick):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y}" dy=".35em" text-anchor="end">{_short(tick)}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{_short(tick)}</text>'
        )
    parts.append(
        f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" '
        'text-anchor="middle">iteration (optimiser steps)</text>'
    )
    for curve in shown:
        points = [(across(x), up(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="line {curve.look}"{dash} d="M{line}"/>')
        if len(points) < 4:
            parts += [
                f'<circle class="dot {curve.look}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                for x, y in points
            ]
    scale = "logarithmic scale" if log else "linear scale"
    ends = "; ".join(f"{c.name} ends at {_short(float(c.y[-1]), 3)}" for c in shown)
    spoken = escape(f"{title}. {y_label}, {scale}, over iterations. {ends}.", quote=True)
    legend = "".join(f"<li>{swatch(c.look, c.dash)}{escape(c.name)}</li>" for c in shown)
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>'
        f'<p class="unit">{escape(y_label)}{", log scale" if log else ""}</p></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul>{below}</figure>'
    )


def swatch(look: str, dash: str = "") -> str:
    """A short piece of a line, for a legend."""
    attribute = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        '<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">'
        f'<path class="line {look}"{attribute} d="M1 5H27"/></svg>'
    )


def _short(value: float, digits: int = 4) -> str:
    """A number for an axis: 20000 as 20k, 0.00001 as 1e-05."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.{digits}g}k"
    return f"{value:.{digits}g}"
