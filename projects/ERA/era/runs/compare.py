"""Two runs image by image: detections counted right and wrong, and the images that differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from era.runs.dataset import Dataset, registered_dataset
from era.runs.reading import RESULTS, read_detections

MIN_SCORE = 0.5  # from which on a detection counts
MIN_IOU = 0.5  # overlap from which on a detection of the right class is right


@dataclass(frozen=True)
class Box:
    """A detection, or an object of the ground truth (score 1)."""

    corners: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the image
    category: int  # index into the dataset's class names
    score: float = 1.0
    mask: dict | list | None = field(default=None, compare=False, repr=False)  # RLE or polygons


@dataclass(frozen=True)
class Judged:
    """A model's detections on one image, held against the ground truth."""

    boxes: tuple[Box, ...]
    right: tuple[bool, ...]  # for every box
    missed: tuple[Box, ...]  # objects that no right detection has

    @property
    def f1(self) -> float:
        """2 right / (2 right + wrong + missed); 1 where there is nothing and nothing was found."""
        hits = sum(self.right)
        rest = len(self.boxes) - hits + len(self.missed)
        return 2 * hits / (2 * hits + rest) if hits or rest else 1.0


@dataclass(frozen=True)
class Example:
    """One image: its objects, and every run's detections from :data:`MIN_SCORE` on, by the run's name."""

    image_id: int
    file_name: str
    objects: tuple[Box, ...]
    judged: dict[str, Judged]
    lead: float  # F1 of the compared run minus F1 of the baseline; of one run alone, its F1 minus 1


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    ax0, ay0, ax1, ay1 = a.corners
    bx0, by0, bx1, by1 = b.corners
    inter = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter
    return inter / union if union > 0 else 0.0


def judge(boxes: Sequence[Box], objects: Sequence[Box]) -> Judged:
    """Match detections to objects by their boxes, greedily, the surest first, as COCO's evaluation does."""
    free = list(objects)
    ordered = sorted(boxes, key=lambda box: -box.score)
    right = []
    for box in ordered:
        fits = [o for o in free if o.category == box.category and iou(box, o) >= MIN_IOU]
        if fits:
            free.remove(max(fits, key=lambda o: iou(box, o)))
        right.append(bool(fits))
    return Judged(tuple(ordered), tuple(right), tuple(free))


def read_examples(
    dataset: str, folders: Mapping[str, Path], *, baseline: str, compared: str
) -> tuple[list[Example], list[str]]:
    """Every image of a dataset with the detections that the runs' AP was computed from.

    Args:
        dataset: registered name.
        folders: run's folder by run's name.
        baseline, compared: names of the two runs that are held against one another.

    Returns:
        The images, and the dataset's class names.

    Raises:
        UserError: a file of detections that cannot be read.
    """
    data = registered_dataset(dataset)
    found = {
        name: boxes_by_image(read_detections(folder / RESULTS), data, MIN_SCORE)
        for name, folder in folders.items()
    }
    return make_examples(data, found, baseline=baseline, compared=compared), data.classes


def make_examples(
    dataset: Dataset,
    found: Mapping[str, Mapping[int, Sequence[Box]]],
    *,
    baseline: str,
    compared: str | None,
) -> list[Example]:
    """Every image of a dataset with the runs' detections from :data:`MIN_SCORE` on.

    Args:
        found: boxes by image id, by the run's name.
        compared: the run held against the baseline; None = there is none.
    """
    examples = []
    for entry in dataset.entries:
        objects, image = objects_of(entry), entry["image_id"]
        judged = {
            name: judge([b for b in boxes.get(image, ()) if b.score >= MIN_SCORE], objects)
            for name, boxes in found.items()
        }
        first = judged[baseline].f1
        lead = judged[compared].f1 - first if compared is not None else first - 1
        examples.append(Example(image, entry["file_name"], objects, judged, lead))
    return examples


def boxes_by_image(
    detections: Sequence[dict], dataset: Dataset, min_score: float
) -> dict[int, list[Box]]:
    """Detections from a score on, by image id; those of unknown classes are left out."""
    found: dict[int, list[Box]] = {}
    for d in detections:
        category = dataset.index.get(d["category_id"])
        if d["score"] >= min_score and category is not None:
            box = Box(corners(d["bbox"]), category, d["score"], d.get("segmentation"))
            found.setdefault(d["image_id"], []).append(box)
    return found


def objects_of(entry: dict) -> tuple[Box, ...]:
    """Ground truth of an image, crowds left out."""
    return tuple(
        Box(corners(a["bbox"]), a["category_id"], mask=a.get("segmentation"))
        for a in entry["annotations"]
        if not a.get("iscrowd")
    )


def corners(xywh: Sequence[float]) -> tuple[float, float, float, float]:
    """[x, y, width, height] as x0, y0, x1, y1."""
    x, y, w, h = xywh
    return x, y, x + w, y + h


def choose(examples: Sequence[Example], count: int) -> list[Example]:
    """``count`` images by :func:`rule`; fewer if fewer differ, but at least one if there is any."""

    def surest(sign: int) -> list[Example]:
        led = [e for e in examples if sign * e.lead > 0]
        return sorted(led, key=lambda e: (-sign * e.lead, -len(e.objects), e.image_id))

    ahead, behind = surest(1), surest(-1)
    losses = behind[: max(count // 3, count - len(ahead))]
    chosen = ahead[: count - len(losses)] + losses
    return chosen or sorted(examples, key=lambda e: (-len(e.objects), e.image_id))[:1]


def rule(baseline: str, compared: str | None) -> str:
    """How images are chosen, in words; ``compared`` None = there is one run alone."""
    counts = (
        f"A detection counts from score {MIN_SCORE} on; it is right if it has the class of an object that "
        f"its box overlaps with IoU {MIN_IOU} or more, one detection an object. An image is judged by "
        "F1 = 2 right / (2 right + wrong + missed). "
    )
    if compared is None:
        return counts + f"Shown are the images in which {baseline} has the lowest F1."
    return counts + (
        f"First come the images in which {compared} leads {baseline} by most, then, as a third of all that "
        f"are shown, those in which {baseline} leads {compared} by most; of equals, the image with more "
        "objects, then the one with the smaller id."
    )


def summary(examples: Sequence[Example], baseline: str, compared: str) -> str:
    """In how many images one leads, the other leads, and neither does."""
    ahead = sum(e.lead > 0 for e in examples)
    behind = sum(e.lead < 0 for e in examples)
    return (
        f"Of all {len(examples):,d} test images, {compared} has the higher F1 in {ahead:,d}, {baseline} in "
        f"{behind:,d}; in {len(examples) - ahead - behind:,d} they are equal."
    )
