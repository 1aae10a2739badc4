"""Runs with their AP: what is compared with what, and how each is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from era.config import INHERIT_NOTHING
from era.data.coco_ap import CLASS, coco_metrics
from era.errors import UserError
from era.report.looks import DASHES, INHERITED_DASH, RUN_LOOKS, TEACHER_DASH, TEACHER_LOOK
from era.runs.dataset import Dataset
from era.runs.measure import Measurement
from era.runs.reading import BASELINE, DISTILLED, TASKS, TEACHER, RunRecord


@dataclass(frozen=True)
class Scored:
    """A run, its metrics, how it is drawn, and the run that its gain is counted from."""

    run: RunRecord
    scores: Mapping[str, Mapping[str, float]]  # by task ("bbox", "segm") and name, points
    look: str  # class of the style sheet
    dash: str
    reference: Scored | None = None
    cost: Measurement | None = None

    def ap(self, task: str, name: str = "AP") -> float:
        """A metric in points; NaN if the run has it not."""
        return self.scores.get(task, {}).get(name, math.nan)

    def gain(self, task: str) -> float:
        """AP above the reference, in points; NaN without one."""
        return self.ap(task) - self.reference.ap(task) if self.reference else math.nan


def score_runs(
    runs: Sequence[RunRecord], dataset: Dataset | None, costs: Mapping[str, Measurement]
) -> list[Scored]:
    """Every run with its metrics, a look of its own, and the run that its gain is counted from.

    A distilled run's gain is over the student that inherited the same and was not distilled, if there
    is one, else over the baseline; a plain run's over the baseline.

    Raises:
        UserError: see :func:`run_scores`.
    """
    found: list[Scored] = []
    students = [run for run in runs if run.role != TEACHER]
    for run in runs:
        if run.role == TEACHER:
            look, dash, reference = TEACHER_LOOK, TEACHER_DASH, None
        else:
            index = students.index(run)
            look = RUN_LOOKS[index % len(RUN_LOOKS)]
            dash = DASHES[index // len(RUN_LOOKS) % len(DASHES)]
            dash = dash or (INHERITED_DASH if run.inherited != INHERIT_NOTHING else "")
            alike = [s for s in found if not s.run.methods and s.run.inherited == run.inherited]
            options = alike if run.role == DISTILLED and alike else found
            reference = options[0] if options and run.role != BASELINE else None
        scores = run_scores(run, dataset)
        found.append(Scored(run, scores, look, dash, reference, costs.get(run.label)))
    return found


def run_scores(run: RunRecord, dataset: Dataset | None) -> dict[str, dict[str, float]]:
    """All metrics of a run by task and name: as it recorded them, else from its detections.

    Raises:
        UserError: the run recorded none, and there is no dataset to compute them on, or another one.
    """
    if run.recorded:
        return run.recorded
    if dataset is None:
        raise UserError(
            f"{run.folder} recorded no AP and its dataset {run.dataset!r} cannot be read to compute it: "
            "set DETECTRON2_DATASETS to the folder that holds it."
        )
    has_masks = run.detections and all("segmentation" in d for d in run.detections)
    names = {category: dataset.classes[i] for category, i in dataset.index.items()}
    return {
        task: coco_metrics(dataset.json_file, run.detections, iou_type=task, class_names=names)
        for task in TASKS
        if task == "bbox" or has_masks
    }


def compared_index(scored: Sequence[Scored]) -> int | None:
    """The run to hold against the first: the first distilled one after it, else the second student."""
    students = [i for i, s in enumerate(scored) if i > 0 and s.run.role != TEACHER]
    distilled = [i for i in students if scored[i].run.role == DISTILLED]
    return next(iter(distilled or students), None)


def gap_closed(first: Scored, second: Scored, teacher: Scored | None, task: str) -> float:
    """Per cent of the way from the first run's AP to the teacher's; NaN where there is none to go."""
    if teacher is None or not teacher.ap(task) > first.ap(task):
        return math.nan
    return 100 * (second.ap(task) - first.ap(task)) / (teacher.ap(task) - first.ap(task))


def class_changes(
    scored: Sequence[Scored], pair: tuple[Scored, Scored] | None, task: str
) -> list[tuple[str, float]]:
    """Class names and the change of AP from the first of the pair to the second, the greatest first.

    Without a pair the changes are NaN and the classes in the order of their names.
    """
    names = {
        name.removeprefix(CLASS)
        for s in scored
        for name in s.scores.get(task, {})
        if name.startswith(CLASS)
    }
    changes = [
        (
            name,
            pair[1].ap(task, CLASS + name) - pair[0].ap(task, CLASS + name) if pair else math.nan,
        )
        for name in names
    ]
    return sorted(changes, key=lambda c: (math.isnan(c[1]), -c[1] if c[1] == c[1] else 0.0, c[0]))
