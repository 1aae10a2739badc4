"""Validation images with ground truth, teacher, plain and ERA detections side by side."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib.font_manager
from PIL import Image, ImageDraw, ImageFont

from era.runs.compare import MIN_SCORE, Example, choose, read_examples, rule, summary
from era.runs.plan import Run

COUNT = 6  # pictures
SHOWN = ("teacher", "plain", "era")  # runs, a column each, after the ground truth
COMPARED = ("the plain student", "the ERA student")  # in words
SIDE = 512  # about the longest side of an enlarged image, pixels
OVERVIEW_WIDTH = 1200  # pixels
OVERVIEW_BYTES = 300 * 1024  # at most

INK, SOFT, PAPER = "#1c1c1c", "#5c5c5c", "#ffffff"
TRUTH, RIGHT, WRONG, MISSED = "#ffffff", "#56B4E9", "#E69F00", "#ffffff"


def write_pictures(runs: Sequence[Run], dataset: str, folder: Path) -> list[Path]:
    """Write the pictures, ``overview.png`` and ``README.md`` with captions into ``folder``.

    Which images are shown is :func:`era.runs.compare.rule`; it shows losses of ERA as well as gains.

    Args:
        runs: teacher, plain and ERA among them.
        dataset: registered name of the validation set.

    Returns:
        What was written, the overview first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = {run.name: run.label for run in runs if run.name in SHOWN}
    folders = {run.name: run.folder for run in runs if run.name in SHOWN}
    examples, classes = read_examples(dataset, folders, baseline="plain", compared="era")
    chosen = choose(examples, COUNT)
    paths, captions = [], []
    for number, example in enumerate(chosen, start=1):
        path = folder / f"{number}_image_{example.image_id}.jpg"
        strip([example], classes, labels, side=SIDE).save(path, quality=92)
        paths.append(path)
        captions.append(f"- `{path.name}`: {caption(example, labels)}")
    overview = folder / "overview.png"
    write_overview(chosen, classes, labels, overview)
    (folder / "README.md").write_text(
        "# Detections side by side\n\n"
        f"Boxes of score {MIN_SCORE} and more. Blue, solid: right. Orange, dashed: wrong class or "
        "place, or found twice. White, dotted: an object that was missed.\n\n"
        f"{summary(examples, *COMPARED)}\n\nHow the images were chosen: {rule(*COMPARED)}\n\n"
        + "\n".join(captions)
        + "\n",
        encoding="utf-8",
    )
    return [overview, *paths]


def caption(example: Example, labels: dict[str, str]) -> str:
    """Who found how much in one image."""
    lead = example.lead
    who = "ERA leads" if lead > 0 else "the plain student leads" if lead < 0 else "no difference"
    parts = [f"{labels[name]} {_count(example, name)}" for name in labels]
    return f"image {example.image_id}, {who} (F1 {lead:+.2f}): {'; '.join(parts)}."


def write_overview(
    examples: Sequence[Example], classes: list[str], labels: dict[str, str], path: Path
) -> None:
    """One picture for a README: as many rows as its size allows, gains and losses of ERA in turn."""
    gains = [e for e in examples if e.lead > 0]
    losses = [e for e in examples if e.lead <= 0]
    for rows in (3, 2, 1):
        few = losses[: max(rows // 3, rows - len(gains))]
        chosen = gains[: rows - len(few)] + few
        side = OVERVIEW_WIDTH // (len(SHOWN) + 1) - 12
        picture = strip(chosen, classes, labels, side=side, smooth=True)
        palette = picture.quantize(256, kmeans=3)
        # All colours if they fit, else 256 of them, dithered if that fits.
        for version in (
            picture,
            picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG),
            picture.quantize(palette=palette, dither=Image.Dither.NONE),
        ):
            version.save(path, optimize=True)
            if path.stat().st_size <= OVERVIEW_BYTES:
                return


def strip(
    examples: Sequence[Example],
    classes: list[str],
    labels: dict[str, str],
    *,
    side: int,
    smooth: bool = False,
) -> Image.Image:
    """A table of images: a row an example; ground truth and the runs of ``labels`` as columns.

    Args:
        side: about the longest side of an image, pixels; enlarged by a whole number unless ``smooth``.
    """
    gap, size = max(8, side // 40), max(13, side // 22)
    head = round(size * 2.3)
    tiles = []
    for example in examples:
        photo = Image.open(example.file_name).convert("RGB")
        scale = side / max(photo.size)
        scale = scale if smooth or scale < 1 else max(1, round(scale))
        large = photo.resize([round(s * scale) for s in photo.size], Image.Resampling.BICUBIC)
        row = [(_draw(large.copy(), example, None, classes, scale, size), "")]
        for name in labels:
            drawn = _draw(large.copy(), example, name, classes, scale, size)
            row.append((drawn, _count(example, name)))
        tiles.append(row)
    columns = range(len(labels) + 1)
    widths = [max(row[i][0].width for row in tiles) for i in columns]
    heights = [row[0][0].height + round(size * 1.7) for row in tiles]
    foot = round(size * 2.0)
    width = sum(widths) + gap * (len(widths) + 1)
    canvas = Image.new("RGB", (width, head + sum(heights) + gap * len(heights) + foot), PAPER)
    pen = ImageDraw.Draw(canvas)
    x = gap
    for i, title in enumerate(["Ground truth", *labels.values()]):
        pen.text((x, head / 2), title, INK, font(round(size * 1.15), bold=True), anchor="lm")
        y = head
        for row, height in zip(tiles, heights, strict=True):
            picture, text = row[i]
            canvas.paste(picture, (x, y))
            pen.text((x, y + picture.height + size * 0.75), text, SOFT, font(size), anchor="lm")
            y += height + gap
        x += widths[i] + gap
    _legend(pen, gap, canvas.height - foot * 0.6, size)
    return canvas


def _count(example: Example, name: str) -> str:
    judged = example.judged[name]
    hits = sum(judged.right)
    return f"{hits} of {len(example.objects)} found, {len(judged.boxes) - hits} wrong"


def _draw(
    image: Image.Image,
    example: Example,
    name: str | None,
    classes: list[str],
    scale: float,
    size: int,
) -> Image.Image:
    """Boxes with names and scores; ``name`` None = the ground truth."""
    pen = ImageDraw.Draw(image)
    line = max(2, round(size / 8))
    if name is None:
        marks = [(box, TRUTH, "solid", classes[box.category]) for box in example.objects]
    else:
        judged = example.judged[name]
        marks = [(box, MISSED, "dotted", "") for box in judged.missed]
        for box, right in sorted(zip(judged.boxes, judged.right, strict=True), key=lambda p: p[1]):
            text = f"{classes[box.category]} {box.score:.2f}"
            marks.append((box, RIGHT if right else WRONG, "solid" if right else "dashed", text))
    for box, colour, style, _ in marks:
        _frame(pen, [c * scale for c in box.corners], colour, style, line)
    taken: list[tuple[float, float, float, float]] = []
    for box, colour, _, text in marks:  # names above all boxes
        if text:
            _name(pen, [c * scale for c in box.corners], colour, text, size, image.size, taken)
    return image


def _frame(pen: ImageDraw.ImageDraw, corners: list[float], colour: str, style: str, line: int):
    """A box with a dark rim, so that it shows on any ground."""
    x0, y0, x1, y1 = (round(c) for c in corners)
    on, off = {"solid": (1, 0), "dashed": (4 * line, 2 * line), "dotted": (line, 2 * line)}[style]
    for ink, width in ((INK, line + 2), (colour, line)):
        half = width / 2
        if style == "solid":
            box = (x0 - half, y0 - half, x1 + half, y1 + half)
            pen.rectangle(box, outline=ink, width=width)
            continue
        for start in range(x0, x1, on + off):
            for y in (y0, y1):
                pen.rectangle((start, y - half, min(start + on, x1), y + half), fill=ink)
        for start in range(y0, y1, on + off):
            for x in (x0, x1):
                pen.rectangle((x - half, start, x + half, min(start + on, y1)), fill=ink)


def _name(pen, corners, colour, text, size, image_size, taken) -> None:
    """A name tag at a corner of its box where it covers no other tag, within the image."""
    small = font(round(size * 0.82))
    width, height = pen.textlength(text, small) + 6, round(size * 1.1)
    x0, y0, x1, y1 = corners
    places = [(x0, y0 - height), (x0, y1), (x1 - width, y0 - height), (x1 - width, y1), (x0, y0)]
    tags = []
    for x, y in places:
        x = min(max(0, x), image_size[0] - width)
        y = min(max(0, y), image_size[1] - height)
        tags.append((x, y, x + width, y + height))

    def overlap(tag) -> float:
        return sum(
            max(0, min(tag[2], t[2]) - max(tag[0], t[0])) * max(0, min(tag[3], t[3]) - max(tag[1], t[1]))
            for t in taken
        )  # fmt: skip

    tag = min(tags, key=overlap)
    taken.append(tag)
    pen.rectangle(tag, fill=colour)
    pen.text((tag[0] + 3, (tag[1] + tag[3]) / 2), text, INK, small, anchor="lm")


def _legend(pen: ImageDraw.ImageDraw, x: float, y: float, size: int) -> None:
    line = max(2, round(size / 8))
    for colour, style, text in (
        (RIGHT, "solid", "right"),
        (WRONG, "dashed", "wrong class or place, or found twice"),
        (MISSED, "dotted", "missed object"),
    ):
        corners = [x + 3, y - size * 0.5, x + size * 2, y + size * 0.5]
        pen.rectangle(corners, fill=SOFT)  # white shows on no white paper
        _frame(pen, corners, colour, style, line)
        pen.text((x + size * 2.5, y), text, INK, font(size), anchor="lm")
        x += size * 4 + pen.textlength(text, font(size))


@functools.cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, so that it is the same on every machine."""
    weight = "bold" if bold else "normal"
    wanted = matplotlib.font_manager.FontProperties(family="DejaVu Sans", weight=weight)
    return ImageFont.truetype(matplotlib.font_manager.findfont(wanted), size)
