"""AP by class and by object size: as the run recorded it, else computed from its detections."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from era.engine.preflight import check_data
from era.errors import UserError
from era.runs.reading import ReportRun

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# COCO's names for sizes, by the area of the object in pixels of the original image.
SIZES = {
    "APs": "small, below 32² px",
    "APm": "medium, 32² to 96² px",
    "APl": "large, above 96² px",
}
CLASS = "AP-"  # what comes before a class name in the metrics


@dataclass(frozen=True)
class Dataset:
    """The test set: Detectron2's entries, class names, and the annotation file's path."""

    name: str
    entries: list[dict]
    classes: list[str]
    index: dict[int, int]  # category id of the annotation file -> index of the class
    json_file: str

    @property
    def objects(self) -> dict[str, int]:
        """How many objects each class has, crowds left out."""
        counts = dict.fromkeys(self.classes, 0)
        for entry in self.entries:
            for found in entry["annotations"]:
                if not found.get("iscrowd"):
                    counts[self.classes[found["category_id"]]] += 1
        return counts


def read_dataset(run: ReportRun) -> Dataset:
    """The test set that a run's config names, checked as before a training.

    Raises:
        UserError: it is not there, or not as it should be.
    """
    cfg = run.cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = (run.dataset,)
    check_data(cfg, for_training=False)
    meta = MetadataCatalog.get(run.dataset)
    json_file = meta.get("json_file")
    if not json_file or meta.get("evaluator_type") == "lvis":
        raise UserError(
            f"the dataset {run.dataset!r} has no annotation file in COCO format: the pictures and AP "
            "computed afresh need one."
        )
    entries = DatasetCatalog.get(run.dataset)  # loading it sets the metadata
    classes = list(meta.thing_classes)
    index = meta.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(classes))}
    return Dataset(run.dataset, entries, classes, dict(index), json_file)


def scores(run: ReportRun, dataset: Dataset | None) -> dict[str, float]:
    """All metrics of a run by name, in points of 100, with "AP-<class>" for every class.

    Raises:
        UserError: the run recorded none, and there is no dataset to compute them on.
    """
    if run.recorded:
        return run.recorded
    if dataset is None:
        raise UserError(
            f"{run.folder} recorded no AP and its dataset {run.dataset!r} cannot be read to compute it: "
            "set DETECTRON2_DATASETS to the folder that holds it."
        )
    return computed(run.detections, dataset)


def computed(detections: Sequence[dict], dataset: Dataset) -> dict[str, float]:
    """COCO box metrics of detections, overall and by class, in points of 100.

    Raises:
        UserError: the detections are not of this dataset.
    """
    names = {category: dataset.classes[i] for category, i in dataset.index.items()}
    if not detections:  # pycocotools refuses an empty list
        return dict.fromkeys([*METRICS, *(CLASS + name for name in dataset.classes)], 0.0)
    images = {entry["image_id"] for entry in dataset.entries}
    if any(d["image_id"] not in images or d["category_id"] not in names for d in detections):
        raise UserError(
            f"detections name images or categories that {dataset.json_file} does not have: were they made "
            f"on another {dataset.name!r}? Evaluate the run again."
        )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(dataset.json_file)
        evaluation = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools says -1 where there is no such object.
    stats = zip(METRICS, evaluation.stats[: len(METRICS)], strict=True)
    found = {name: 100 * float(v) for name, v in stats if v >= 0}
    precision = evaluation.eval["precision"]  # (IoU, recall, class, area, detections an image)
    for position, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, position, 0, -1]
        values = values[values > -1]
        if values.size:
            found[CLASS + names[category]] = 100 * float(np.mean(values))
    return found
