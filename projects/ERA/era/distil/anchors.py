"""Anchors from the boxes of the data: how well given ones cover them, and ones that fit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_BOXES = 20_000  # looked at, spread evenly: more change nothing
SMALLEST = 8  # pixels
GAIN = 0.02  # of mean IoU: below that anchors of one's own are not worth another start of the RPN


@dataclass(frozen=True)
class Anchors:
    """Sizes by level (square roots of areas, pixels of the model's input) and ratios of height to width."""

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]

    def shapes(self) -> np.ndarray:
        """(k, 2) float: width and height of all anchors."""
        sizes = np.unique([size for level in self.sizes for size in level])
        ratios = np.sqrt(np.asarray(self.ratios, dtype=float))
        width, height = sizes[:, None] / ratios, sizes[:, None] * ratios
        return np.stack([width.ravel(), height.ravel()], axis=1)

    def in_words(self) -> str:
        """As ``24 / 36 / 52 / 76 pixels, heights of 0.5, 1, 2 widths``."""
        levels = " / ".join(", ".join(f"{size:g}" for size in level) for level in self.sizes)
        return f"{levels} pixels, heights of {', '.join(f'{r:g}' for r in self.ratios)} widths"


def cover(anchors: Anchors, boxes: np.ndarray) -> float:
    """Mean over boxes of the best IoU with an anchor of the same centre, 0 to 1.

    Args:
        boxes: (n, 2) float, width and height in pixels of the model's input, n > 0.
    """
    boxes, shapes = _some(boxes), anchors.shapes()
    inter = np.minimum(boxes[:, None], shapes[None]).prod(axis=2)
    union = boxes.prod(axis=1)[:, None] + shapes.prod(axis=1)[None] - inter
    return float((inter / union).max(axis=1).mean())


def fit(boxes: np.ndarray, strides: Sequence[int], *, sizes: int = 1, ratios: int = 3) -> Anchors:
    """Anchors of the boxes' own sizes: each level has the middle of its equal part of them, and no level smaller ones
    than its stride, for these would leave gaps; the ratios are the middles of as many equal parts.

    Args:
        boxes: as of :func:`cover`.
        strides: of the levels in pixels, rising.
        sizes: of a level, one octave divided evenly.
        ratios: how many.
    """
    boxes = _some(boxes)
    middles = _middles(np.sqrt(boxes.prod(axis=1)), len(strides))
    lowest = np.maximum.accumulate(np.maximum(middles, [max(s, SMALLEST) for s in strides]))
    found = tuple(
        tuple(float(round(base * 2 ** (i / sizes))) for i in range(sizes)) for base in lowest
    )
    forms = np.exp(_middles(np.log(boxes[:, 1] / boxes[:, 0]), ratios))
    return Anchors(found, tuple(float(round(r, 2)) for r in forms))


def choose(given: Anchors, boxes: np.ndarray, strides: Sequence[int]) -> tuple[Anchors, str]:
    """The given anchors, or ones of the boxes' own where these cover them clearly better; and why, in words.

    Args:
        given: of the teacher; as many sizes a level and ratios are kept, so that its weights still fit.
        boxes, strides: as of :func:`fit`.
    """
    own = fit(boxes, strides, sizes=len(given.sizes[0]), ratios=len(given.ratios))
    before, after = cover(given, boxes), cover(own, boxes)
    if after < before + GAIN:
        return given, f"the teacher's, of mean IoU {before:.2f} with the boxes"
    return own, f"mean IoU {after:.2f} with the boxes, the teacher's {before:.2f}"


def _middles(values: np.ndarray, parts: int) -> np.ndarray:
    return np.quantile(values, (np.arange(parts) + 0.5) / parts)


def _some(boxes: np.ndarray) -> np.ndarray:
    return boxes[:: -(-len(boxes) // MOST_BOXES)]
