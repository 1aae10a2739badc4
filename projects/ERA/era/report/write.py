"""``write_report``: from runs' folders to one HTML file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from era.errors import UserError
from era.report import page, tables
from era.report.deployed import EAGER, quartiles, read_deployed
from era.report.examples import compare_pictures
from era.report.gallery import gallery
from era.report.page import Section
from era.report.scores import Dataset, read_dataset, scores
from era.report.tables import Scored
from era.runs.measure import Measurement
from era.runs.reading import BASELINE, DISTILLED, TEACHER, ReportRun, read_runs

PICTURES = 12
COLOURS = 6  # of the style sheet, c0 to c5
DASHES = ("", "7 4", "2 3", "9 3 2 3")
INHERITED = "7 4"  # where the heads started from the teacher's
TEACHER_DASH = "2 3"


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
    scored = score(runs, dataset, costs or {})
    compared = tables.compared_index(scored)
    models = read_deployed([Path(folder) for folder in deployed], latency)
    eager = (latency or {}).get(EAGER)
    first, second = scored[0], scored[compared] if compared is not None else None
    pair = (first, second) if second is not None else None
    gallery_html = missing(absent) if absent else ""
    if dataset is not None and pictures:
        comparison = compare_pictures(runs, dataset, baseline=0, compared=compared, count=pictures)
        gallery_html = gallery(comparison, scored, dataset.classes, baseline=0, compared=compared)
    objects = dataset.objects if dataset is not None else None
    detail = tables.by_size(scored) + tables.by_class(scored, pair, objects)
    sections = [
        Section("result", "Result", "", page.result(scored, compared, notes, caution)),
        Section("detail", "AP by object size and class", "", detail),
        Section("training", "Training", "", page.training(scored)),
        Section(
            "pictures",
            "Pictures",
            "Those in which the outcome changed most, in both directions." if pair else "",
            gallery_html,
        ),
        Section(
            "deployment",
            "Exported models",
            "Latency: one image a call, one thread, the formats taking turns on one machine."
            if latency
            else "",
            tables.deployment(models, quartiles(eager) if eager else None) if models else "",
        ),
        Section("runs", "How the runs were made", "", tables.settings(scored)),
    ]
    return write_whole(output, page.page(title, subtitle(runs, dataset), sections, runs=len(runs)))


def find_dataset(run: ReportRun) -> tuple[Dataset | None, str]:
    """The test set, or None and why it cannot be read: a report without pictures is better than none."""
    try:
        return read_dataset(run), ""
    except UserError as e:
        return None, str(e)


def missing(reason: str) -> str:
    """What stands in the place of the pictures if there are none."""
    return (
        f'<p class="warning">No pictures, because the test set cannot be read: {escape(reason)}</p>'
    )


def score(
    runs: Sequence[ReportRun], dataset: Dataset | None, costs: Mapping[str, Measurement]
) -> list[Scored]:
    """Every run with its metrics, a look of its own, and the run that its gain is counted from.

    A distilled run's gain is over the student that inherited the same and was not distilled, if there
    is one, else over the baseline; a plain run's over the baseline.
    """
    found: list[Scored] = []
    students = [run for run in runs if run.role != TEACHER]
    for run in runs:
        if run.role == TEACHER:
            look, dash, reference = "ct", TEACHER_DASH, None
        else:
            index = students.index(run)
            look = f"c{index % COLOURS}"
            dash = DASHES[index // COLOURS % len(DASHES)] or (INHERITED if run.inherits else "")
            alike = [s for s in found if not s.run.methods and s.run.inherits == run.inherits]
            options = alike if run.role == DISTILLED and alike else found
            reference = options[0] if options and run.role != BASELINE else None
        found.append(Scored(run, scores(run, dataset), look, dash, reference, costs.get(run.label)))
    return found


def subtitle(runs: Sequence[ReportRun], dataset: Dataset | None) -> str:
    """On which data, in a few words."""
    about = f"Tested on {runs[0].dataset}"
    if dataset is None:
        return about
    counted = sum(dataset.objects.values())
    return (
        f"{about}: {len(dataset.entries):,d} images, {counted:,d} objects, "
        f"{len(dataset.classes)} classes"
    )


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
