"""The pictures that the report shows: which, and what is drawn on them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from era.errors import UserError
from era.report.overlay import TRUTH, Mark, name_size, place_tags
from era.report.scored import Scored
from era.runs import compare
from era.runs.compare import MIN_SCORE, Box, Example
from era.runs.dataset import Dataset
from era_runtime.errors import DeploymentError
from era_runtime.pictures import read_picture

SHOWN_FROM = 0.2  # score from which on detections are in the report, for the slider
SIDE = 640  # longest side of a picture in the report, pixels
QUALITY = 88  # of its JPEG


@dataclass(frozen=True)
class Picture:
    """One test image with everything that can be drawn on it, in pixels of the original image."""

    image_id: int
    width: int
    height: int
    classes: tuple[str, ...]  # of its objects, sorted, each once
    objects: int
    counts: tuple[tuple[int, int], ...]  # right and wrong detections of every run, at MIN_SCORE
    lead: float  # F1 of the compared run minus F1 of the baseline, -1 to 1
    data: str  # the image itself, a data URI
    marks: tuple[Mark, ...]
    name_size: float  # font size of the names


@dataclass(frozen=True)
class Gallery:
    """The chosen pictures in groups with a title, and how they were chosen."""

    summary: str
    rule: str
    groups: tuple[tuple[str, tuple[Picture, ...]], ...]
    shown: frozenset[int]  # runs whose boxes are shown at the start
    paired: bool  # two runs are compared
    has_masks: bool
    score_from: float = SHOWN_FROM
    score_start: float = MIN_SCORE


def make_gallery(
    scored: Sequence[Scored],
    dataset: Dataset,
    *,
    baseline: int,
    compared: int | None,
    count: int,
) -> Gallery:
    """Choose ``count`` images by :func:`era.runs.compare.rule` and read them.

    Args:
        baseline, compared: indices into ``scored``; None = nothing to compare with, and the images with
            most mistakes are chosen.

    Raises:
        UserError: an image or a mask cannot be read.
    """
    found = {
        f"m{i}": compare.boxes_by_image(s.run.detections, dataset, SHOWN_FROM)
        for i, s in enumerate(scored)
    }
    has_masks = any(box.mask for by_image in found.values() for b in by_image.values() for box in b)
    names = [f"m{baseline}", f"m{compared}" if compared is not None else None]
    examples = compare.make_examples(dataset, found, baseline=names[0], compared=names[1])
    shown = frozenset({baseline} if compared is None else {baseline, compared})
    sizes = {e["image_id"]: (e["width"], e["height"]) for e in dataset.entries}
    pictures = []
    for example in compare.choose(examples, count):
        boxes = {name: by_image.get(example.image_id, ()) for name, by_image in found.items()}
        width, height = sizes[example.image_id]
        if not has_masks:  # of the ground truth alone, they would only hide the picture
            example = replace(
                example, objects=tuple(replace(o, mask=None) for o in example.objects)
            )
        marks = make_marks(example, boxes, dataset.classes, scored, width, height)
        place_tags(marks, width, height, first={f"m{i}" for i in shown})
        pictures.append(
            Picture(
                image_id=example.image_id,
                width=width,
                height=height,
                classes=tuple(sorted({dataset.classes[box.category] for box in example.objects})),
                objects=len(example.objects),
                counts=tuple(
                    (sum(j.right), len(j.right) - sum(j.right)) for j in example.judged.values()
                ),
                lead=example.lead,
                data=data_uri(example.file_name),
                marks=tuple(marks),
                name_size=name_size(width, height),
            )
        )
    first, second = (scored[i].run.label if i is not None else None for i in (baseline, compared))
    groups = [("", pictures)]
    summary = "There is one run alone, so these are the images in which it does worst."
    if second is not None:
        summary = compare.summary(examples, first, second)
        groups = [
            (f"{second} does better than {first}", [p for p in pictures if p.lead > 0]),
            (f"{second} does worse than {first}", [p for p in pictures if p.lead < 0]),
            (f"{second} does as well as {first}", [p for p in pictures if p.lead == 0]),
        ]
    return Gallery(
        summary=summary,
        rule=compare.rule(first, second),
        groups=tuple((title, tuple(group)) for title, group in groups if group),
        shown=shown,
        paired=second is not None,
        has_masks=has_masks,
    )


def make_marks(
    example: Example,
    boxes: dict[str, Sequence[Box]],
    classes: Sequence[str],
    scored: Sequence[Scored],
    width: int,
    height: int,
) -> list[Mark]:
    """The ground truth, then every run's detections, the surest on top.

    Raises:
        UserError: a mask is no mask of this image.
    """
    try:
        marks = [
            Mark.of(box, TRUTH, TRUTH, True, classes[box.category], width, height)
            for box in example.objects
        ]
        for (name, found), s in zip(boxes.items(), scored, strict=True):
            judged = compare.judge(found, example.objects)
            for box, right in list(zip(judged.boxes, judged.right, strict=True))[::-1]:
                text = f"{classes[box.category]} {box.score:.2f}"
                marks.append(Mark.of(box, name, s.look, right, text, width, height))
    except ValueError as e:
        raise UserError(
            f"a mask in image {example.image_id} cannot be drawn ({e}): evaluate the runs again on the test "
            "set as it is now, or use --pictures 0."
        ) from e
    return marks


def data_uri(path: str) -> str:
    """An image file, upright, at most :data:`SIDE` pixels, written anew as JPEG, as a data URI.

    Raises:
        UserError: it cannot be read.
    """
    try:
        image = read_picture(path).convert("RGB")
    except DeploymentError as e:
        raise UserError(f"{e}: mend it, or use --pictures 0.") from e
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
