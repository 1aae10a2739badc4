"""The data of runs: made before them, and the test set that they are compared on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from detectron2.data import DatasetCatalog, MetadataCatalog

from era.engine.preflight import check_data
from era.errors import UserError
from era.runs.plan import Run
from era.runs.reading import RunRecord


@dataclass(frozen=True)
class Dataset:
    """Detectron2's entries, class names, and the annotation file's path ("" if there is none)."""

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


def registered_dataset(name: str) -> Dataset:
    """A dataset that is registered and whose files have been checked."""
    entries = DatasetCatalog.get(name)  # loading it sets the metadata
    meta = MetadataCatalog.get(name)
    classes = list(meta.thing_classes)
    index = meta.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(classes))}
    return Dataset(name, entries, classes, dict(index), meta.get("json_file", ""))


def read_dataset(run: RunRecord) -> Dataset:
    """The test set that a run's config names, checked as before a training.

    Raises:
        UserError: it is not there, or not as it should be.
    """
    cfg = run.cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = (run.dataset,)
    check_data(cfg, for_training=False)
    meta = MetadataCatalog.get(run.dataset)
    if not meta.get("json_file") or meta.get("evaluator_type") == "lvis":
        raise UserError(
            f"the dataset {run.dataset!r} has no annotation file in COCO format: the pictures and AP "
            "computed afresh need one."
        )
    return registered_dataset(run.dataset)


def prepare_data(runs: Iterable[Run]) -> None:
    """Make and check the data of all runs, each combination of datasets once, before any of them is started.

    Raises:
        UserError: see :func:`era.engine.preflight.check_data`.
    """
    for run in {run.config.DATASETS.dump(): run for run in runs}.values():
        check_data(run.config, for_training=True)
