"""What the teacher detects on a few test pictures: whether it is the right one for this data."""

from __future__ import annotations

import contextlib
import io
import math

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from era.data.datasets import coco_files
from era.data.pictures import picture_mapper
from era.doctor.case import OK, SKIPPED, WARNING, Case, Finding, plural
from era.engine.evaluation import DetectionEvaluator
from era.modeling.distiller import Distiller

KEY = "DATASETS.TEST"


def check(case: Case) -> Finding:
    """The teacher's AP on ``--teacher-images`` pictures of the first test set, spread evenly."""
    teacher = case.model.teacher if isinstance(case.model, Distiller) else None
    number, least = case.args.teacher_images, case.args.least_ap
    if teacher is None:
        return Finding(SKIPPED, "this run has no teacher")
    if number == 0:
        return Finding(SKIPPED, "--teacher-images is 0")
    if not case.cfg.MODEL.TEACHER.WEIGHTS:
        return Finding(
            WARNING,
            "the teacher has random weights (MODEL.TEACHER.ALLOW_RANDOM True): it can teach nothing",
        )
    if not case.cfg.DATASETS.TEST:
        return Finding(SKIPPED, f"{KEY} is empty, so nothing says what is right")
    name = case.cfg.DATASETS.TEST[0]
    if coco_files(KEY, name) is None:
        return Finding(SKIPPED, f"{name!r} has no annotation file in COCO format")
    records = some_records(name, number)
    teacher.to(case.cfg.MODEL.DEVICE)
    try:
        ap = average_precision(case.cfg, teacher, name, records)
    finally:
        teacher.to("cpu")
    details = {"dataset": name, "pictures": len(records), "AP": ap, "least": least}
    where = f"on {plural(len(records), 'picture')} of {name!r}"
    if ap is None:
        return Finding(
            WARNING,
            f"{where} there is no object, so there is no AP: try more --teacher-images",
            details,
        )
    if ap < least:
        return Finding(
            WARNING,
            f"the teacher has {ap:.1f} AP {where}, below --least-ap {least:g}: is it the right teacher (its classes and "
            "their order, its pictures, INPUT.FORMAT, its weights)?",
            details,
        )
    return Finding(
        OK,
        f"the teacher has {ap:.1f} AP {where}; so few say that it fits, not how good it is",
        details,
    )


def some_records(name: str, number: int) -> list[dict]:
    """At most so many of a set's records, spread evenly."""
    records = DatasetCatalog.get(name)  # which also notes what class a category id means
    return records[:: math.ceil(len(records) / number)]


def average_precision(cfg: CfgNode, model, name: str, records: list[dict]) -> float | None:
    """AP of boxes in points of 100 on these pictures alone; None where they have no object.

    Args:
        records: of :func:`some_records`.
    """
    evaluator = DetectionEvaluator(name, tasks=("bbox",), distributed=False)
    evaluator.reset()
    mapper = picture_mapper(cfg, is_train=False)
    for record in records:
        inputs = [mapper(record)]
        evaluator.process(inputs, model(inputs))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        results = evaluator.evaluate(img_ids=[record["image_id"] for record in records])
    ap = results.get("bbox", {}).get("AP", math.nan)
    return float(ap) if math.isfinite(ap) and ap >= 0 else None
