"""Boxes and their names as SVG over a picture, in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from era.runs.compare import MIN_SCORE, Box

TRUTH = "truth"  # the group of the ground truth; those of the runs are m0, m1, ...


@dataclass(frozen=True)
class Mark:
    """A box that can be switched: its group, the class of the style sheet that colours it, its name."""

    box: Box
    group: str
    look: str
    right: bool
    text: str

    @property
    def classes(self) -> str:
        """For the class attribute."""
        below = " below" if self.group != TRUTH and self.box.score < MIN_SCORE else ""
        return f"box {self.group} {'right' if self.right else 'wrong'}{below}"


@dataclass(frozen=True)
class Tag:
    """Where a name stands."""

    x: float
    y: float
    width: float
    height: float


def name_size(width: int, height: int) -> float:
    """Font size of the names: about 11 px where a card is as narrow as on a phone."""
    return max(width, height) / 25


def shape(mark: Mark, width: int, height: int) -> str:
    """The box with a dark rim, so that it shows on any ground; cut at the picture's edges."""
    x0, y0, x1, y1 = clipped(mark.box, width, height)
    frame = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
    return (
        f'<g class="{mark.classes}" data-score="{mark.box.score:.4f}"><rect class="rim" {frame}/>'
        f'<rect class="stroke {mark.look}" {frame}/></g>'
    )


def name(mark: Mark, tag: Tag, size: float) -> str:
    """The name on a ground of the box's colour."""
    return (
        f'<g class="{mark.classes.replace("box", "tag", 1)}" data-score="{mark.box.score:.4f}">'
        f'<rect class="fill {mark.look}" x="{tag.x:.1f}" y="{tag.y:.1f}" width="{tag.width:.1f}" '
        f'height="{tag.height:.1f}"/><text x="{tag.x + tag.width / 2:.1f}" '
        f'y="{tag.y + size * 0.93:.1f}" text-anchor="middle" font-size="{size:.1f}">'
        f"{escape(mark.text)}</text></g>"
    )


def place_tags(marks: Sequence[Mark], width: int, height: int, first: set[str]) -> list[Tag]:
    """A place for every name, at a corner of its box where it covers least of the others.

    Args:
        first: groups that are shown at the start, which choose before the ground truth and the rest.
    """

    def order(i: int) -> tuple:
        mark = marks[i]
        at_start = mark.group in first and mark.box.score >= MIN_SCORE
        return (0 if at_start else 1 if mark.group == TRUTH else 2, -mark.box.score, i)

    placed: dict[int, Tag] = {}
    for i in sorted(range(len(marks)), key=order):
        # Names that are hidden at the start do not matter to those that are shown.
        placed[i] = _best(marks[i], width, height, list(placed.values()))
    return [placed[i] for i in range(len(marks))]


def clipped(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """The box's corners within the picture."""
    x0, y0, x1, y1 = box.corners
    x0, x1 = (min(max(0.0, v), width) for v in (x0, x1))
    y0, y1 = (min(max(0.0, v), height) for v in (y0, y1))
    return x0, y0, max(x0, x1), max(y0, y1)


def _best(mark: Mark, width: int, height: int, others: Sequence[Tag]) -> Tag:
    x0, y0, x1, y1 = clipped(mark.box, width, height)
    size = name_size(width, height)
    w, h = (len(mark.text) * 0.6 + 0.6) * size, 1.25 * size
    corners = ((x0, y0 - h), (x1 - w, y0 - h), (x0, y1), (x1 - w, y1))
    inside = ((x0, y0), (x1 - w, y0), (x0, y1 - h), (x1 - w, y1 - h))
    tags = [
        Tag(min(max(0.0, x), max(0.0, width - w)), min(max(0.0, y), max(0.0, height - h)), w, h)
        for x, y in (*corners, *inside)
    ]
    return min(tags, key=lambda tag: sum(_overlap(tag, other) for other in others))


def _overlap(a: Tag, b: Tag) -> float:
    across = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    down = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    return max(0.0, across) * max(0.0, down)
