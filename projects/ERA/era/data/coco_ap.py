"""COCO AP of detections: the one place that calls pycocotools' evaluation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from era.data.rle import checked_rle
from era.errors import UserError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CLASS = "AP-"  # what comes before a class's name
IOU_TYPES = ("bbox", "segm")


def coco_metrics(
    annotation_file: str,
    detections: Sequence[dict],
    *,
    iou_type: str = "bbox",
    class_names: Mapping[int, str] | None = None,
    image_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """COCO's metrics in points of 100, overall and by class.

    Args:
        annotation_file: in COCO format; trusted to be one (see :mod:`era.data.datasets` for checks).
        detections: as in COCO's results files (``image_id``, ``category_id``, ``score``, ``bbox`` [x, y,
            width, height]; ``segmentation`` as RLE for masks); none at all is allowed. Not changed.
        iou_type: "bbox" for boxes, "segm" for masks.
        class_names: by category id; default: the annotation file's.
        image_ids: of the images that count; default: all.

    Returns:
        "AP", "AP50", "AP75", "APs", "APm", "APl" (small, medium and large objects) and ``AP-<class>``. What the
        images have no object of is absent; without detections the rest is 0.

    Raises:
        UserError: a detection names an image or a category that the file does not have, or lacks a
            mask of the image's size where masks are asked for.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type is {iou_type!r}: expected one of {IOU_TYPES}")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO(annotation_file)
        evaluation = COCOeval(
            truth, _results(truth, detections, iou_type, annotation_file), iou_type
        )
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools says -1 where there is no such object.
    stats = zip(METRICS, evaluation.stats[: len(METRICS)], strict=True)
    found = {name: 100 * float(value) for name, value in stats if value >= 0}
    names = class_names or {i: category["name"] for i, category in truth.cats.items()}
    precision = evaluation.eval["precision"]  # (IoU, recall, class, area, detections an image)
    for position, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, position, 0, -1]
        values = values[values > -1]
        if values.size:
            found[CLASS + names[category]] = 100 * float(np.mean(values))
    return found


def _results(truth: COCO, detections: Sequence[dict], iou_type: str, annotation_file: str) -> COCO:
    """pycocotools' index of the detections."""
    if not detections:  # which loadRes refuses
        empty = COCO()
        empty.dataset = {**truth.dataset, "annotations": []}
        empty.createIndex()
        return empty
    copies = []
    for d in detections:
        image = truth.imgs.get(d["image_id"])
        if image is None or d["category_id"] not in truth.cats:
            raise UserError(
                f"detections name image {d['image_id']} and category {d['category_id']}, which "
                f"{annotation_file} does not have both: they were made on other data; evaluate the run "
                "again."
            )
        copy = {key: d[key] for key in ("image_id", "category_id", "score")}
        if iou_type == "bbox":
            copy["bbox"] = d["bbox"]
        else:  # without its box: pycocotools would take the object's size from that
            try:
                copy["segmentation"] = checked_rle(
                    d.get("segmentation"), image["height"], image["width"]
                )
            except ValueError as e:
                raise UserError(
                    f"a detection in image {d['image_id']} has no usable mask ({e}): evaluate the run "
                    "again, with a model that has masks."
                ) from e
        copies.append(copy)
    return truth.loadRes(copies)
