"""Tables of results, as Markdown and for a terminal: texts to the left, numbers to the right."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tabulate import tabulate

ABSENT = "–"  # a number that is not known


def number(value: float | None, form: str) -> str:
    """A number as text, ``form`` as for :func:`format`; of None and NaN, a dash."""
    return ABSENT if value is None or math.isnan(value) else format(value, form)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """A table for GitHub.

    Args:
        rows: cells as text, as many a row as there are headings.
        texts: how many columns, from the left, are texts; the others are numbers.
    """
    return _table(headings, rows, texts, "pipe")


def terminal(headings: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """As :func:`markdown`, for a terminal; a heading may have several lines."""
    return _table(headings, rows, texts, "simple")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int, style: str) -> str:
    align = ["left"] * texts + ["right"] * (len(headings) - texts)
    return tabulate(
        rows, headings, tablefmt=style, disable_numparse=True, colalign=align if rows else None
    )
