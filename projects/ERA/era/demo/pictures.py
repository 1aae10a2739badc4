"""Validation images with ground truth and the detections of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from era.runs.compare import MIN_SCORE, Example, choose, read_examples, rule, summary
from era.runs.plan import Run

COUNT = 6  # pictures
SIDE = 512  # longest side of an enlarged image, pixels
OVERVIEW_SIDE = 290  # of an image in the overview, pixels; four of them in a row
OVERVIEW_BYTES = 300 * 1024  # at most
DPI = 100

# Colour and line style, so that neither is needed alone: Okabe and Ito's colours.
RIGHT, WRONG, MISSED = ("#56B4E9", "-"), ("#E69F00", "--"), ("#ffffff", ":")
TRUTH = ("#ffffff", "-")
KEY = {
    RIGHT: "right",
    WRONG: "wrong class or place, or found twice",
    MISSED: "missed object",
}


def write_pictures(
    runs: Sequence[Run], baseline: Run, compared: Run, dataset: str, folder: Path
) -> list[Path]:
    """Write the pictures, ``overview.png`` and ``README.md`` with captions into ``folder``.

    Args:
        runs: a column each, after the ground truth; ``baseline`` and ``compared`` are among them.
        dataset: registered name of the validation set.

    Returns:
        What was written, the overview first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = {run.name: run.label for run in runs}
    examples, classes = read_examples(
        dataset,
        {run.name: run.folder for run in runs},
        baseline=baseline.name,
        compared=compared.name,
    )
    pair = (f'"{baseline.label}"', f'"{compared.label}"')
    chosen = choose(examples, COUNT)
    paths, captions = [], []
    for number, example in enumerate(chosen, start=1):
        path = folder / f"{number}_image_{example.image_id}.jpg"
        strip([example], classes, labels, side=SIDE).save(path, quality=92)
        paths.append(path)
        captions.append(f"- `{path.name}`: {caption(example, labels, *pair)}")
    overview = folder / "overview.png"
    write_overview(chosen, classes, labels, overview)
    (folder / "README.md").write_text(
        "# Detections side by side\n\n"
        f"Boxes of score {MIN_SCORE} and more. Blue, solid: right. Orange, dashed: wrong class or "
        "place, or found twice. White, dotted: an object that was missed.\n\n"
        f"{summary(examples, *pair)}\n\nHow the images were chosen: {rule(*pair)}\n\n"
        + "\n".join(captions)
        + "\n",
        encoding="utf-8",
    )
    return [overview, *paths]


def caption(example: Example, labels: dict[str, str], baseline: str, compared: str) -> str:
    """Who found how much in one image."""
    lead = example.lead
    who = f"{compared if lead > 0 else baseline} leads" if lead else "no difference"
    parts = [f"{labels[name]} {_count(example, name)}" for name in labels]
    return f"image {example.image_id}, {who} (F1 {lead:+.2f}): {'; '.join(parts)}."


def write_overview(
    examples: Sequence[Example], classes: list[str], labels: dict[str, str], path: Path
) -> None:
    """One picture for a README: as many rows as its size allows, gains and losses in turn."""
    gains = [e for e in examples if e.lead > 0]
    losses = [e for e in examples if e.lead <= 0]
    for rows in (3, 2, 1):
        few = losses[: max(rows // 3, rows - len(gains))]
        picture = strip(gains[: rows - len(few)] + few, classes, labels, side=OVERVIEW_SIDE)
        for colours in (None, 256):  # all of them if they fit
            (picture.quantize(colours) if colours else picture).save(path, optimize=True)
            if path.stat().st_size <= OVERVIEW_BYTES:
                return


def strip(
    examples: Sequence[Example], classes: list[str], labels: dict[str, str], *, side: int
) -> Image.Image:
    """A table of images: a row an example; ground truth and the runs of ``labels`` as columns.

    Args:
        side: longest side of an image, pixels.
    """
    tiles = [
        [draw(example, name, classes, side) for name in (None, *labels)] for example in examples
    ]
    height = sum(row[0].shape[0] + 0.09 * side for row in tiles) + 0.22 * side
    width = sum(tile.shape[1] for tile in tiles[0]) * 1.03
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    size = max(9.0, side / 34)  # of the font, points
    axes = figure.subplots(len(tiles), len(labels) + 1, squeeze=False)
    for row, example, axis_row in zip(tiles, examples, axes, strict=True):
        for tile, name, axis in zip(row, (None, *labels), axis_row, strict=True):
            axis.imshow(tile)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            text = "" if name is None else _count(example, name)
            axis.set_xlabel(text, fontsize=size, loc="left", color="#5c5c5c")
    for axis, title in zip(axes[0], ("Ground truth", *labels.values()), strict=True):
        axis.set_title(title, fontsize=1.15 * size, loc="left", fontweight="bold")
    figure.legend(
        handles=[Line2D([], [], color=c, linestyle=s, label=text) for (c, s), text in KEY.items()],
        loc="outside lower left", ncols=len(KEY), fontsize=size, facecolor="#5c5c5c",
        labelcolor="white", edgecolor="none",
    )  # fmt: skip
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def draw(example: Example, name: str | None, classes: list[str], side: int) -> np.ndarray:
    """One image with boxes, class names and scores.

    Args:
        name: of the run whose detections are drawn; None = the ground truth.
        side: longest side of the result, pixels.

    Returns:
        RGB, (height, width, 3) uint8.
    """
    photo = read_image(example.file_name, "RGB")
    scale = side / max(photo.shape[:2])
    large = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    visualizer = Visualizer(large, font_size_scale=0.8)
    if name is None:
        marks = [(box, TRUTH, classes[box.category]) for box in example.objects]
    else:
        judged = example.judged[name]
        marks = [(box, MISSED, "") for box in judged.missed]
        for box, right in sorted(zip(judged.boxes, judged.right, strict=True), key=lambda p: p[1]):
            text = f"{classes[box.category]} {box.score:.2f}"
            marks.append((box, RIGHT if right else WRONG, text))
    for box, (colour, style), text in marks:
        x0, y0, x1, y1 = (corner * scale for corner in box.corners)
        visualizer.draw_box((x0, y0, x1, y1), alpha=1.0, edge_color=colour, line_style=style)
        if text:
            is_far_right = x0 > 0.7 * large.shape[1]  # the text ends with the box, to stay within
            place = (min(x1, large.shape[1]), "right") if is_far_right else (x0, "left")
            visualizer.draw_text(text, (place[0], y0), color=colour, horizontal_alignment=place[1])
    return visualizer.output.get_image()


def _count(example: Example, name: str) -> str:
    judged = example.judged[name]
    hits = sum(judged.right)
    return f"{hits} of {len(example.objects)} found, {len(judged.boxes) - hits} wrong"
