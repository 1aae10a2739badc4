"""``write_report``: from runs' folders to one HTML file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from era.config import student_config
from era.errors import UserError
from era.modeling.detectors import known_family
from era.report.curves import AP_OF, training_charts
from era.report.deployed import EAGER, quartiles, read_deployed
from era.report.examples import make_gallery
from era.report.page import NONE, render
from era.report.scored import class_changes, compared_index, gap_closed, score_runs
from era.runs.dataset import Dataset, read_dataset
from era.runs.measure import Measurement
from era.runs.reading import TASKS, TEACHER, RunRecord, read_runs

PICTURES = 12
# COCO's names for sizes, by the area of the object in pixels of the original image.
SIZES = {
    "APs": "small, below 32² px",
    "APm": "medium, 32² to 96² px",
    "APl": "large, above 96² px",
}
INHERITED = {"none": "nothing", "heads": "heads", "fpn_and_heads": "FPN and heads"}  # in words


@dataclass(frozen=True)
class Section:
    """A section of the page: its template is ``templates/<ident>.html``."""

    ident: str
    title: str


def write_report(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    labels: Sequence[str] | None = None,
    teacher: str | Path | None = None,
    deployed: Sequence[str | Path] = (),
    latency: Mapping[str, Sequence[float]] | None = None,
    title: str = "Distillation report",
    pictures: int = PICTURES,
    notes: Sequence[str] = (),
    caution: str = "",
    costs: Mapping[str, Measurement] | None = None,
) -> Path:
    """Write one self-contained HTML file about one or several runs. The same input gives the same bytes.

    Args:
        folders: ``OUTPUT_DIR`` of every run; the first is the baseline.
        output: the file to write, whole or not at all; an older one is replaced.
        labels: a name a run; default: the folders' names.
        teacher: ``OUTPUT_DIR`` of the teacher's own run.
        deployed: deployment folders that ``tools/export.py`` made.
        latency: milliseconds of every call, by deployment folder as given, and "eager".
        pictures: how many are shown, at most.
        notes: sentences that a reader of the numbers must know.
        caution: what a reader must know before the first number; shown above it.
        costs: parameters and seconds an image, by label ("Teacher" for the teacher).

    Returns:
        Path of the file.

    Raises:
        UserError: a run, dataset or deployment folder that cannot be read, or a file that cannot be
            written.
    """
    output = Path(output)
    if output.is_dir():
        raise UserError(
            f"--output {output} is a folder: name a file, such as {output}/report.html."
        )
    if pictures < 0:
        raise UserError(f"--pictures is {pictures}: expected 0 or more.")
    runs = read_runs(
        [Path(folder) for folder in folders],
        labels=labels,
        teacher=Path(teacher) if teacher is not None else None,
    )
    dataset, absent = find_dataset(runs[0])
    scored = score_runs(runs, dataset, costs or {})
    compared = compared_index(scored)
    pair = (scored[0], scored[compared]) if compared is not None else None
    last = next((s for s in scored if s.run.role == TEACHER), None)
    tasks = [task for task in TASKS if any(task in s.scores for s in scored)]
    gallery = None
    if dataset is not None and pictures:
        gallery = make_gallery(scored, dataset, baseline=0, compared=compared, count=pictures)
    charts = training_charts(scored)
    models = read_deployed([Path(folder) for folder in deployed], latency)
    eager = (latency or {}).get(EAGER)
    eager_ms = quartiles(eager) if eager else None
    timed = eager_ms or next((m.milliseconds for m in models if m.milliseconds), None)
    sections = [
        Section("result", "Result"),
        Section("detail", "AP by object size and class"),
        Section("training", "Training") if charts else None,
        Section("pictures", "Pictures") if gallery or absent else None,
        Section("deployment", "Exported models") if models else None,
        Section("runs", "How the runs were made"),
    ]
    text = render(
        {
            "title": title,
            "subtitle": subtitle(runs, dataset),
            "sections": [section for section in sections if section],
            "scored": scored,
            "pair": pair,
            "teacher": last,
            "closed": gap_closed(*pair, last, "bbox") if pair else None,
            "tasks": tasks,
            "ap_of": AP_OF,
            "inherited": INHERITED,
            "caution": caution,
            "notes": notes,
            "costs": any(s.cost for s in scored),
            "sizes": SIZES,
            "changes": {task: class_changes(scored, pair, task) for task in tasks},
            "objects": dataset.objects if dataset is not None else {},
            "charts": charts,
            "gallery": gallery,
            "absent": absent,
            "models": models,
            "eager_ms": eager_ms,
            "first_ms": timed[1] if timed else None,
            "settings": [settings(run) for run in runs],
        }
    )
    return write_whole(output, text)


def find_dataset(run: RunRecord) -> tuple[Dataset | None, str]:
    """The test set, or None and why it cannot be read: a report without pictures is better than none."""
    try:
        return read_dataset(run), ""
    except UserError as e:
        return None, str(e)


def subtitle(runs: Sequence[RunRecord], dataset: Dataset | None) -> str:
    """On which data, in a few words."""
    about = f"Tested on {runs[0].dataset}"
    if dataset is None:
        return about
    counted = sum(dataset.objects.values())
    return (
        f"{about}: {len(dataset.entries):,d} images, {counted:,d} objects, "
        f"{len(dataset.classes)} classes"
    )


def settings(run: RunRecord) -> list[tuple[str, str]]:
    """Detector, backbone, iterations, images a step, learning rate, schedule and seed, as texts and what is
    said below them."""
    if run.role == TEACHER and not run.metrics:  # known from its student's run alone
        return [(NONE, "")] * 7
    model, solver = run.cfg.MODEL, run.cfg.SOLVER
    student = student_config(run.cfg)
    family = known_family(student)
    detector = student.MODEL.META_ARCHITECTURE if family is None else family.title(student)
    backbone = model.BACKBONE.NAME.removeprefix("build_").removesuffix("_backbone")
    # backbones out of a library have a node of their own with the network's name
    nodes = [model.get(part.upper(), {}) for part in backbone.split("_")]
    size = [node["NAME"] for node in nodes if "NAME" in node]
    size += [f"depth {model.RESNETS.DEPTH}"] if "resnet" in backbone else []
    size += [f"{model.FPN.OUT_CHANNELS} channels"] if "fpn" in backbone else []
    return [
        (detector, ""),
        (backbone, ", ".join(size)),
        (f"{solver.MAX_ITER:,d}", ""),
        (str(solver.IMS_PER_BATCH), ""),
        (f"{solver.BASE_LR:g}", ""),
        (solver.LR_SCHEDULER_NAME, ""),
        (str(run.cfg.SEED) if run.cfg.SEED >= 0 else "random", ""),
    ]


def write_whole(path: Path, text: str) -> Path:
    """Write a text file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)  # mkstemp keeps others out; the file is to be as any other
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as e:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(
            f"--output {path} cannot be written ({e.strerror}): name a file in a folder that you may write "
            "to."
        ) from e
    return path
