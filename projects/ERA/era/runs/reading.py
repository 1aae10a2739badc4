"""Reading runs back: what is in an ``OUTPUT_DIR`` of ``tools/train_net.py``, checked, as plain values.

A folder may be somebody else's: nothing in it is trusted to have its form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from detectron2.config import CfgNode

from era.config import INHERIT_NOTHING, get_era_cfg, merge_config
from era.errors import UserError
from era.registry import is_distiller
from era.runs.metrics import read_metrics, step_seconds, steps_done

RESULTS = Path("inference", "coco_instances_results.json")
# Of an evaluation by itself of the student that TEST.LEAVE_BEST left, in the folder of its run.
BEST_FOLDER = "best"
TEACHER_RESULTS = Path("inference", "teacher", "coco_instances_results.json")  # TEST.EVAL_TEACHER

BASELINE, PLAIN, DISTILLED, TEACHER = "baseline", "plain", "distilled", "teacher"  # roles
TASKS = ("bbox", "segm")  # what AP is of: boxes, masks


@dataclass(frozen=True)
class RunRecord:
    """One run as it is found on the disk. AP in points of 100."""

    folder: Path
    label: str
    role: str  # one of the four above
    cfg: CfgNode = field(repr=False)
    metrics: list[dict] = field(repr=False)  # finite numbers alone, each with "iteration"
    # Of the last evaluation, by task ("bbox", "segm"): "AP", "APs", "AP-disk" and so on.
    recorded: dict[str, dict[str, float]] = field(repr=False)
    detections: list[dict] = field(repr=False)  # as in COCO's results files, their form checked

    @property
    def dataset(self) -> str:
        """Registered name of the test set; of several, the last, whose detections are kept."""
        return self.cfg.DATASETS.TEST[-1]

    @property
    def inherited(self) -> str:
        """Which weights of the teacher the student started from: "none", "heads" or "fpn_and_heads"."""
        return self.cfg.MODEL.DISTILLER.INIT_STUDENT if self._is_distilled else INHERIT_NOTHING

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the distillation methods, none of a plain run or a teacher."""
        return tuple(self.cfg.MODEL.DISTILLER.METHODS) if self._is_distilled else ()

    @property
    def _is_distilled(self) -> bool:
        """A teacher's run may stand in a student's folder, with the student's config."""
        return self.role != TEACHER and is_distiller(self.cfg)

    @property
    def iterations(self) -> int | None:
        """Optimiser steps of the training; None where only an evaluation is in the folder."""
        return steps_done(self.metrics) or None

    @property
    def step_seconds(self) -> float | None:
        """Median time of a training step in seconds, if known."""
        return step_seconds(self.metrics)


def read_runs(
    folders: Sequence[Path], *, labels: Sequence[str] | None = None, teacher: Path | None = None
) -> list[RunRecord]:
    """Read all runs: the first is the baseline; the teacher, if there is one, comes last.

    Without ``teacher``, the evaluation of the teacher that a distilled run made (TEST.EVAL_TEACHER)
    stands in for it.

    Args:
        folders: ``OUTPUT_DIR`` of every run.
        labels: a name a run; default: the folders' names.
        teacher: ``OUTPUT_DIR`` of the teacher's own run.

    Raises:
        UserError: no run; as many labels as runs are not given; a folder named twice; a run that lacks
            something, see :func:`read_run`; runs evaluated on different data.
    """
    if not folders:
        raise UserError("no run is named: give the OUTPUT_DIR of at least one.")
    every = [*folders, *([teacher] if teacher is not None else [])]
    resolved = [folder.resolve() for folder in every]
    if len(set(resolved)) < len(resolved):
        twice = next(f for f, r in zip(every, resolved, strict=True) if resolved.count(r) > 1)
        raise UserError(f"the run {twice} is named twice: name each run once.")
    if labels is not None and len(labels) != len(folders):
        raise UserError(
            f"--labels has {len(labels)} names for {len(folders)} run(s): give one a run, in their order "
            "(the teacher needs none)."
        )
    names = list(labels) if labels is not None else default_labels(folders)
    runs = []
    for index, (folder, label) in enumerate(zip(folders, names, strict=True)):
        run = read_run(folder, label)
        role = DISTILLED if run.methods else PLAIN
        runs.append(replace(run, role=BASELINE if index == 0 else role))
    if teacher is not None:
        runs.append(replace(read_run(teacher, "Teacher"), role=TEACHER))
    else:
        runs += recorded_teacher(runs)
    for run in runs[1:]:
        if run.dataset != runs[0].dataset:
            raise UserError(
                f"{run.folder} was evaluated on {run.dataset!r} and {runs[0].folder} on "
                f"{runs[0].dataset!r}: a report compares runs on one dataset; make one report each."
            )
    return runs


def read_run(folder: Path, label: str) -> RunRecord:
    """Read one run's folder.

    A folder without metrics.json is accepted if it holds detections: that is what ``--eval-only``
    leaves. An evaluation of the best student in :data:`BEST_FOLDER` is taken instead of the last of the training.

    Raises:
        UserError: no such folder, no config, neither metrics nor detections, or unusable ones.
    """
    if not folder.is_dir():
        raise UserError(
            f"the run {folder} is not a folder: name the OUTPUT_DIR of a run of tools/train_net.py."
        )
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"{folder} holds no config.yaml: expected the OUTPUT_DIR of a run of tools/train_net.py."
        )
    cfg = read_config(config)
    if not cfg.DATASETS.TEST:
        raise UserError(f"{config} names no DATASETS.TEST: a report is about a test set; name one.")
    metrics = clean_metrics(read_metrics(folder))
    if not metrics and not (folder / RESULTS).is_file():
        raise UserError(
            f"{folder} holds no metrics.json with anything in it and no {RESULTS}: let the run train, or "
            "evaluate it with tools/train_net.py --eval-only."
        )
    best = folder / BEST_FOLDER / RESULTS
    recorded, results = recorded_ap(metrics, cfg), folder / RESULTS
    if best.is_file():  # its AP follows from the detections
        recorded, results = {}, best
    return RunRecord(folder, label, PLAIN, cfg, metrics, recorded, read_detections(results))


def read_config(path: Path) -> CfgNode:
    """The config of a run, whose methods may be unknown here: ``MODEL.<NAME>`` is taken as it is.

    Raises:
        UserError: it cannot be read, or has keys that no version of this project or of Detectron2 has.
    """
    cfg = get_era_cfg()
    cfg.MODEL.set_new_allowed(True)
    for part in cfg.MODEL.values():
        if isinstance(part, CfgNode):
            part.set_new_allowed(False)
    merge_config(cfg, str(path), [], what="the run's config", opts_what="the run's config")
    return cfg


def recorded_teacher(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The teacher as the first run knows it that evaluated it beside its student; else nothing."""
    for run in runs:
        if (run.folder / TEACHER_RESULTS).is_file():
            return [
                replace(
                    run,
                    label="Teacher",
                    role=TEACHER,
                    metrics=[],
                    recorded=recorded_ap(run.metrics, run.cfg, prefix="teacher/"),
                    detections=read_detections(run.folder / TEACHER_RESULTS),
                )
            ]
    return []


def default_labels(folders: Sequence[Path]) -> list[str]:
    """Folder names, with their parent's where two are the same."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        for folder, name in zip(folders, names, strict=True)
    ]


def clean_metrics(lines: list) -> list[dict]:
    """Lines that are objects with an iteration, and of these the finite numbers alone."""
    found = []
    for line in lines:
        if isinstance(line, dict) and type(line.get("iteration")) is int:
            found.append({k: v for k, v in line.items() if is_number(v)})
    return found


def recorded_ap(
    metrics: Sequence[dict], cfg: CfgNode, *, prefix: str = ""
) -> dict[str, dict[str, float]]:
    """The last evaluation's metrics by task and name: "bbox" -> "AP", "AP50", ..., ``AP-<class>``.

    Args:
        prefix: "teacher/" for the teacher's.

    Returns:
        The tasks that were evaluated; empty if there was no evaluation.
    """
    found = {}
    for task in TASKS:
        start = f"{prefix}{scalar_prefix(cfg)}{task}/"
        lines = [line for line in metrics if f"{start}AP" in line]
        if lines:
            found[task] = {
                k[len(start) :]: float(v) for k, v in lines[-1].items() if k.startswith(start)
            }
    return found


def scalar_prefix(cfg: CfgNode) -> str:
    """What comes before "bbox/AP" in metrics.json: with several test sets, the last one's name."""
    names = cfg.DATASETS.TEST
    return "" if len(names) == 1 else f"{names[-1]}/"


def read_detections(path: Path) -> list[dict]:
    """Detections of a COCO results file.

    Raises:
        UserError: there is none, or it is not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(
            f"{path} cannot be read ({e.strerror}): the report needs a run's detections; evaluate it with "
            "tools/train_net.py --eval-only."
        ) from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON ({e}): evaluate the run again.") from e
    wrong = (
        next((i for i, d in enumerate(found) if not is_detection(d)), None)
        if isinstance(found, list)
        else 0
    )
    if wrong is not None:
        raise UserError(
            f"{path} is no list of COCO detections (see entry {wrong}): expected objects with image_id, "
            "category_id, bbox [x, y, width, height], score and, if any, an RLE segmentation; evaluate the "
            "run again."
        )
    return found


def is_detection(value) -> bool:
    """Whether a value has the form of a detection in COCO's results format, with finite numbers.

    A mask's run lengths are checked where the image's size is known: :mod:`era.data.rle`.
    """
    return (
        isinstance(value, dict)
        and type(value.get("image_id")) is int
        and type(value.get("category_id")) is int
        and is_number(value.get("score"))
        and isinstance(value.get("bbox"), list)
        and len(value["bbox"]) == 4
        and all(map(is_number, value["bbox"]))
        and ("segmentation" not in value or is_rle(value["segmentation"]))
    )


def is_rle(value) -> bool:
    """Whether a value has the form of a mask in run lengths."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("size"), list)
        and [type(side) for side in value["size"]] == [int, int]
        and isinstance(value.get("counts"), (str, list))
    )


def is_number(value) -> bool:
    """Whether a value is a finite int or float, and no bool."""
    return type(value) in (int, float) and math.isfinite(value)
