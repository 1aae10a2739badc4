"""Which validation images to show: detections counted right and wrong, image by image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

MIN_SCORE = 0.5  # detections below are not shown
MIN_IOU = 0.5  # overlap from which on a detection of the right class is right

RULE = (
    f"A detection counts from score {MIN_SCORE} on; it is right if it has the class of an object that "
    f"it overlaps with IoU {MIN_IOU} or more, one detection an object. An image is judged by F1 = 2 "
    "right / (2 right + wrong + missed). First come the images in which ERA leads the plain student by "
    "most, then, as a third of all that are shown, those in which the plain student leads ERA by most; "
    "of equals, the image with more objects, then the one with the smaller id."
)


@dataclass(frozen=True)
class Box:
    """A detection, or an object of the ground truth (score 1)."""

    corners: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the image
    category: int  # index into the dataset's class names
    score: float = 1.0


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
    """One validation image: its objects, and every model's detections by the run's name."""

    image_id: int
    file_name: str
    objects: tuple[Box, ...]
    judged: dict[str, Judged]

    @property
    def lead(self) -> float:
        """F1 of ERA minus F1 of the plain student, -1 to 1."""
        return self.judged["era"].f1 - self.judged["plain"].f1


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    ax0, ay0, ax1, ay1 = a.corners
    bx0, by0, bx1, by1 = b.corners
    inter = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter
    return inter / union if union > 0 else 0.0


def judge(boxes: Sequence[Box], objects: Sequence[Box]) -> Judged:
    """Match detections to objects greedily, the surest first, as COCO's evaluation does."""
    free = list(objects)
    ordered = sorted(boxes, key=lambda box: -box.score)
    right = []
    for box in ordered:
        fits = [o for o in free if o.category == box.category and iou(box, o) >= MIN_IOU]
        if fits:
            free.remove(max(fits, key=lambda o: iou(box, o)))
        right.append(bool(fits))
    return Judged(tuple(ordered), tuple(right), tuple(free))


def read_examples(dataset: str, folders: dict[str, Path]) -> tuple[list[Example], list[str]]:
    """Every image of a dataset with the detections that the runs' AP was computed from.

    Args:
        dataset: registered name.
        folders: run's folder by run's name.

    Returns:
        The images, and the dataset's class names.
    """
    entries = DatasetCatalog.get(dataset)  # loading it sets the metadata
    meta = MetadataCatalog.get(dataset)
    found = {name: _read_detections(folder, meta) for name, folder in folders.items()}
    examples = []
    for entry in entries:
        objects = tuple(
            Box(_corners(a["bbox"]), a["category_id"])
            for a in entry["annotations"]
            if not a.get("iscrowd")
        )
        key = entry["image_id"]
        judged = {name: judge(boxes.get(key, []), objects) for name, boxes in found.items()}
        examples.append(Example(key, entry["file_name"], objects, judged))
    return examples, list(meta.thing_classes)


def _read_detections(folder: Path, meta) -> dict[int, list[Box]]:
    path = folder / "inference" / "coco_instances_results.json"
    index = getattr(meta, "thing_dataset_id_to_contiguous_id", {})
    by_image: dict[int, list[Box]] = {}
    # Detectron2 writes no file if there is no detection at all.
    for d in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
        if d["score"] >= MIN_SCORE:
            category = index.get(d["category_id"], d["category_id"])
            box = Box(_corners(d["bbox"]), category, d["score"])
            by_image.setdefault(d["image_id"], []).append(box)
    return by_image


def _corners(xywh: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, w, h = xywh
    return x, y, x + w, y + h


def choose(examples: Sequence[Example], count: int) -> list[Example]:
    """``count`` images by :data:`RULE`; fewer if fewer differ, but at least one if there is any."""

    def surest(sign: int) -> list[Example]:
        led = [e for e in examples if sign * e.lead > 0]
        return sorted(led, key=lambda e: (-sign * e.lead, -len(e.objects), e.image_id))

    ahead, behind = surest(1), surest(-1)
    losses = behind[: max(count // 3, count - len(ahead))]
    chosen = ahead[: count - len(losses)] + losses
    return chosen or sorted(examples, key=lambda e: (-len(e.objects), e.image_id))[:1]


def summary(examples: Sequence[Example]) -> str:
    """In how many images ERA leads, the plain student leads, and neither does."""
    leads = np.array([e.lead for e in examples])
    return (
        f"Of all {len(leads)} validation images, the ERA student has the higher F1 in "
        f"{int((leads > 0).sum())}, the plain student in {int((leads < 0).sum())}; in "
        f"{int((leads == 0).sum())} they are equal."
    )
