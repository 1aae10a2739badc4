"""Cutting a photo and its boxes into tiles."""

from __future__ import annotations

import numpy as np


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the fewest tiles that cover a side, evenly spread.

    Args:
        length: of the side, pixels, at least ``tile``.
        tile: length of a tile, pixels.
        overlap: pixels that two neighbours share at least, less than ``tile``.
    """
    count = max(1, -(-(length - overlap) // (tile - overlap)))
    return [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]


def boxes_on(boxes: np.ndarray, x: int, y: int, tile: int, min_visible: float) -> np.ndarray:
    """Boxes that a tile shows, cut at its border.

    Args:
        boxes: (n, 4), x0, y0, x1, y1 in pixels of the photo, of positive area.
        x, y: the tile's first column and row in the photo.
        tile: its height and width, pixels.
        min_visible: a box is kept if at least this share of its area is on the tile.

    Returns:
        (m, 4), x0, y0, x1, y1 in pixels of the tile, in the order of ``boxes``.
    """
    moved = np.clip(boxes - [x, y, x, y], 0, tile)
    return moved[area(moved) >= min_visible * area(boxes)]


def area(boxes: np.ndarray) -> np.ndarray:
    """Areas (n,) of boxes (n, 4)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
