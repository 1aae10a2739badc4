"""The trainings as ordinary runs, and what is made of what they leave: exports, the report, a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from era.deploy.export import export
from era.deploy.source import load_source
from era.distil.annotations import FOLDER
from era.distil.configs import DISTILLED, PLAIN, TEACHER
from era.engine.best import BEST_FILE
from era.engine.hooks import STUDENT_FOLDER
from era.errors import UserError
from era.report.deployed import measure
from era.report.write import write_report
from era.runs.folder import remove
from era.runs.metrics import read_ap, read_metrics
from era.runs.plan import FINAL, Run
from era.runs.reading import BEST_FOLDER
from era_runtime import DeploymentError, read_image
from era_runtime.manifest import read_manifest, sha256_file

REPORT_FILE = "report.html"
DEPLOYED = "deployed"  # folder of the exports, one a format
COMPARED = 4  # validation pictures on which an export is compared with eager
CALLS = 30  # of each format, for its latency
LABELS = {PLAIN: "Plain student", DISTILLED: "Distilled student"}


def make_runs(trainings: Sequence[str], output: Path, num_gpus: int, methods: Sequence[str]) -> list[Run]:  # fmt: skip
    """One run a training, and one that evaluates each student that is left, by their configs in the folder.

    Args:
        trainings: names, each after those that it needs.
        num_gpus: processes of a training.
        methods: of the distillation.

    Raises:
        UserError: a config that somebody has changed so that it cannot be read.
    """
    runs = []
    for name in trainings:
        needs = (TEACHER,) if name == DISTILLED and TEACHER in trainings else ()
        runs.append(_run(name, name, output, num_gpus, depends_on=needs, is_teacher=name == TEACHER,
                         weights=tuple(("MODEL.TEACHER.WEIGHTS", need) for need in needs),
                         methods=tuple(methods) if name == DISTILLED else ()))  # fmt: skip
    for name in trainings:
        if name == TEACHER:
            continue
        folder = output / name / BEST_FOLDER
        opts = ("MODEL.WEIGHTS", str(output / name / STUDENT_FOLDER / FINAL), "OUTPUT_DIR", str(folder), "TEST.EVAL_TEACHER", "False")  # fmt: skip
        runs.append(_run(f"{name}_best", name, output, num_gpus, opts, depends_on=(name,), folder=folder,
                         evaluates=name, weights=(("MODEL.WEIGHTS", name),)))  # fmt: skip
    return runs


def _run(
    name: str, config: str, output: Path, num_gpus: int, opts: tuple[str, ...] = (), **more
) -> Run:
    file = str(output / f"{config}.yaml")
    mode = ("--eval-only",) if "evaluates" in more else ()
    mode += ("--num-gpus", str(num_gpus)) if num_gpus > 1 else ()
    command = (sys.executable, "-u", "-m", "era", "train", *mode, "--config-file", file, *opts)
    run = Run(name, LABELS.get(config, "Teacher"), file, opts, iterations=0, num_gpus=num_gpus, command=command,
              **{"folder": output / name, **more})  # fmt: skip
    return run if run.evaluates else replace(run, iterations=run.config.SOLVER.MAX_ITER)


def export_student(
    output: Path, formats: Sequence[str], say: Callable[[str], None]
) -> tuple[list[Path], list[str]]:
    """Export the student to every format that is not there yet.

    Args:
        say: told in a sentence what was made.

    Returns:
        The deployment folders, and why formats are missing.
    """
    folders, problems = [], []
    weights = output / DISTILLED / STUDENT_FOLDER / FINAL
    source, pictures = None, []
    for name in formats:
        folder = output / DEPLOYED / name
        if _is_export_of(folder, weights):
            folders.append(folder)
            continue
        if source is None:
            source = load_source(config_file=str(output / f"{DISTILLED}.yaml"), weights=str(weights))  # fmt: skip
            pictures = _some_pictures(output)
        remove(folder)
        try:
            report = export(source, name, str(folder), parity_images=pictures)
        except UserError as e:
            problems.append(f"{name}: {e}")
            say(f"no {name}: {e}")
        else:
            folders.append(folder)
            say(f"{folder}: {name}, equal to eager on {report.summary()}")
    return folders, problems


def _is_export_of(folder: Path, weights: Path) -> bool:
    try:
        manifest = read_manifest(folder)
    except DeploymentError:
        return False
    return manifest["source"].get("weights_sha256") == sha256_file(weights)


def _some_pictures(output: Path) -> list:
    """A few validation pictures that can be read."""
    content = json.loads((output / FOLDER / "val.json").read_text(encoding="utf-8"))
    found: list = []
    images = _images_folder(output)
    for image in content["images"]:
        try:
            found.append(read_image(str(images / image["file_name"])))
        except DeploymentError:
            continue
        if len(found) == COMPARED:
            break
    return found


def _images_folder(output: Path) -> Path:
    run = make_runs([DISTILLED], output, 1, ())[0]
    return Path(run.config.DATASETS.COCO_FORMAT[1][2])


def write_the_report(
    output: Path, trainings: Sequence[str], deployed: Sequence[Path], notes: Sequence[str]
) -> Path:
    """Write ``report.html`` about the students, their teacher and the exports.

    Raises:
        UserError: see :func:`era.report.write.write_report`.
    """
    students = [name for name in trainings if name != TEACHER]
    about = [f"{LABELS[name]}: {sentence}" for name in students if (sentence := best_of(output / name))]  # fmt: skip
    about += [
        "The best student was chosen on the validation pictures, on which its AP is given too: on other pictures it may be lower.",
        *notes,
    ]  # fmt: skip
    return write_report(
        [output / name for name in students],
        output / REPORT_FILE,
        labels=[LABELS[name] for name in students],
        deployed=deployed,
        latency=measure(deployed, CALLS) if deployed else None,
        notes=about,
    )


def best_of(folder: Path) -> str:
    """Which evaluation the student of a run is of, in words; "" where nothing says so."""
    try:
        best = json.loads((folder / STUDENT_FOLDER / BEST_FILE).read_text(encoding="utf-8"))
        return f"after {best['iterations']:,} of {best['iterations_of_the_run']:,} iterations, the best of its evaluations"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def table(runs: Sequence[Run]) -> str:
    """AP of the teacher and of every student that is left."""
    rows = []
    for run in runs:
        if run.name == DISTILLED:
            lines = [m for m in read_metrics(run.folder) if "teacher/bbox/AP" in m]
            if lines:
                last = lines[-1]
                rows.append(["Teacher", *(last.get(f"teacher/bbox/{n}") for n in ("AP", "AP50", "AP75")), ""])  # fmt: skip
        if run.evaluates:
            ap = read_ap(run)
            which = best_of(run.folder.parent)
            rows.append([run.label, *(ap[n] for n in ("AP", "AP50", "AP75")), which])
    rows.sort(key=lambda row: row[0] != "Teacher")
    return tabulate(rows, headers=["", "AP", "AP50", "AP75", "which"], floatfmt=".1f")
