"""Which pictures the report shows, and the boxes in them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.data.detection_utils import read_image
from PIL import Image

from era.errors import UserError
from era.report.scores import Dataset
from era.runs.compare import MIN_IOU, MIN_SCORE, Box, Example, Judged, choose, judge
from era.runs.reading import ReportRun

SHOWN_FROM = 0.2  # score from which on detections are in the report, for the slider
SIDE = 640  # longest side of a picture in the report, pixels
QUALITY = 88  # of its JPEG


@dataclass(frozen=True)
class Picture:
    """One test image with everything that can be drawn on it, in pixels of the original image."""

    image_id: int
    width: int
    height: int
    objects: tuple[Box, ...]
    judged: tuple[Judged, ...]  # of every run, in their order; boxes from SHOWN_FROM on
    lead: float  # F1 of the compared run minus F1 of the baseline, -1 to 1
    data: str  # the image itself, a data URI


@dataclass(frozen=True)
class Comparison:
    """The chosen pictures, and over how many images they were chosen."""

    pictures: tuple[Picture, ...]
    ahead: int  # images in which the compared run has the higher F1
    behind: int
    equal: int


def rule(baseline: str, compared: str | None) -> str:
    """How pictures are chosen, in words; ``compared`` None = there is one run alone."""
    counts = (
        f"A detection counts from score {MIN_SCORE} on; it is right if it has the class of an object that "
        f"it overlaps with IoU {MIN_IOU} or more, one detection an object. An image is judged by "
        "F1 = 2 right / (2 right + wrong + missed). "
    )
    if compared is None:
        return counts + f"Shown are the images in which {baseline} has the lowest F1."
    return counts + (
        f"First come the images in which {compared} leads {baseline} by most, then, as a third of all that "
        f"are shown, those in which {baseline} leads {compared} by most; of equals, the image with more "
        "objects, then the one with the smaller id."
    )


def compare_pictures(
    runs: Sequence[ReportRun],
    dataset: Dataset,
    *,
    baseline: int,
    compared: int | None,
    count: int,
) -> Comparison:
    """Choose ``count`` images by :func:`rule` and read them.

    Args:
        baseline, compared: indices into ``runs``; None = nothing to compare with, and the images with
            most mistakes are chosen.

    Raises:
        UserError: an image cannot be read.
    """
    found = [by_image(run, dataset) for run in runs]
    examples = []
    for entry in dataset.entries:
        objects = objects_of(entry)
        image = entry["image_id"]
        sure = [[b for b in boxes.get(image, ()) if b.score >= MIN_SCORE] for boxes in found]
        plain = judge(sure[baseline], objects)
        other = judge(sure[compared], objects) if compared is not None else plain
        if compared is None:
            plain = judge(objects, objects)  # without a fault
        judged = {"plain": plain, "era": other}
        examples.append(Example(image, entry["file_name"], objects, judged))
    sizes = {e["image_id"]: (e["width"], e["height"]) for e in dataset.entries}
    chosen = choose(examples, count) if count else []
    pictures = tuple(
        Picture(
            image_id=example.image_id,
            width=sizes[example.image_id][0],
            height=sizes[example.image_id][1],
            objects=example.objects,
            judged=tuple(
                judge(boxes.get(example.image_id, ()), example.objects) for boxes in found
            ),
            lead=example.lead,
            data=data_uri(example.file_name),
        )
        for example in chosen
    )
    leads = [example.lead for example in examples]
    ahead, behind = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    return Comparison(pictures, ahead, behind, len(leads) - ahead - behind)


def by_image(run: ReportRun, dataset: Dataset) -> dict[int, list[Box]]:
    """A run's detections from score :data:`SHOWN_FROM` on, by image id; unknown classes left out."""
    found: dict[int, list[Box]] = {}
    for d in run.detections:
        if d["score"] >= SHOWN_FROM and d["category_id"] in dataset.index:
            box = Box(corners(d["bbox"]), dataset.index[d["category_id"]], d["score"])
            found.setdefault(d["image_id"], []).append(box)
    return found


def objects_of(entry: dict) -> tuple[Box, ...]:
    """Ground truth of an image, crowds left out."""
    return tuple(
        Box(corners(a["bbox"]), a["category_id"])
        for a in entry["annotations"]
        if not a.get("iscrowd")
    )


def corners(xywh: Sequence[float]) -> tuple[float, float, float, float]:
    """[x, y, width, height] as x0, y0, x1, y1."""
    x, y, w, h = xywh
    return x, y, x + w, y + h


def data_uri(path: str) -> str:
    """An image file, upright, at most :data:`SIDE` pixels, written anew as JPEG, as a data URI.

    Raises:
        UserError: it cannot be read.
    """
    try:
        image = Image.fromarray(read_image(path, "RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(
            f"the test image {path} cannot be read ({e}): mend it, or use --pictures 0."
        ) from e
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
