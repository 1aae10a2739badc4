"""What is drawn over a picture: boxes, outlines of masks and names, in pixels of the original image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from era.data.rle import checked_rle
from era.runs.compare import MIN_SCORE, Box

TRUTH = "truth"  # the group of the ground truth; those of the runs are m0, m1, ...
SMOOTHING = 1 / 640  # of the longest side: what an outline may be off by, about a pixel on the page

Rectangle = tuple[float, float, float, float]  # x, y, width, height


@dataclass
class Mark:
    """An object that can be switched: its group, the class of the style sheet that colours it, its name."""

    group: str
    look: str
    state: str  # classes: right or wrong, and "below" where the slider hides it at the start
    score: float
    text: str
    frame: Rectangle  # its box, cut at the picture's edges
    outline: str  # of its mask, as an SVG path; "" without one
    tag: Rectangle = (0.0, 0.0, 0.0, 0.0)  # where its name stands

    @classmethod
    def of(
        cls, box: Box, group: str, look: str, right: bool, text: str, width: int, height: int
    ) -> Mark:
        """The mark of a box in a picture of that size.

        Raises:
            ValueError: its mask is none of this picture.
        """
        x0, x1 = (min(max(0.0, x), width) for x in box.corners[0::2])
        y0, y1 = (min(max(0.0, y), height) for y in box.corners[1::2])
        state = "right" if right else "wrong"
        state += " below" if group != TRUTH and box.score < MIN_SCORE else ""
        path = outline(box.mask, width, height) if box.mask else ""
        frame = (x0, y0, max(0.0, x1 - x0), max(0.0, y1 - y0))
        return cls(group, look, state, box.score, text, frame, path)


def outline(mask: dict | list, width: int, height: int) -> str:
    """A mask's contours as an SVG path, holes included (fill rule evenodd).

    Args:
        mask: RLE, or COCO's polygons [[x0, y0, x1, y1, ...], ...].

    Raises:
        ValueError: it is neither, or of another size.
    """
    if isinstance(mask, list):
        rings = [np.asarray(ring, dtype=float).reshape(-1, 2) for ring in mask]
        rings = [np.clip(ring, 0, (width, height)) for ring in rings]
    else:
        pixels = coco_mask.decode(checked_rle(mask, height, width))
        contours, _ = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        most = max(width, height) * SMOOTHING
        # A contour runs through the centres of its pixels.
        rings = [cv2.approxPolyDP(c, most, closed=True)[:, 0] + 0.5 for c in contours]
    return "".join(
        "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in ring) + "Z" for ring in rings if len(ring) > 2
    )


def name_size(width: int, height: int) -> float:
    """Font size of the names: about 11 px where a card is as narrow as on a phone."""
    return max(width, height) / 25


def place_tags(marks: Sequence[Mark], width: int, height: int, first: Collection[str]) -> None:
    """Give every name a place at a corner of its box, where it covers least of the others.

    Args:
        first: groups that are shown at the start, which choose before the ground truth and the rest:
            names that are hidden at the start do not matter to those that are shown.
    """

    def order(mark: Mark) -> tuple:
        at_start = mark.group in first and "below" not in mark.state
        return (0 if at_start else 1 if mark.group == TRUTH else 2, -mark.score)

    placed: list[Rectangle] = []
    size = name_size(width, height)
    for mark in sorted(marks, key=order):
        x, y, w, h = mark.frame
        across, down = (len(mark.text) * 0.6 + 0.6) * size, 1.25 * size
        corners = [
            (left, top)
            for top in (y - down, y + h, y, y + h - down)  # above, below, inside
            for left in (x, x + w - across)
        ]
        places = [
            (
                min(max(0.0, left), max(0.0, width - across)),
                min(max(0.0, top), max(0.0, height - down)),
                across,
                down,
            )
            for left, top in corners
        ]
        mark.tag = min(places, key=lambda place: sum(_overlap(place, other) for other in placed))
        placed.append(mark.tag)


def _overlap(a: Rectangle, b: Rectangle) -> float:
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0.0, across) * max(0.0, down)
