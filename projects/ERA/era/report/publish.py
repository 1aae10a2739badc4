"""``tools/report.py --publish``: a trained student in the layout of the Hugging Face Hub, with a model card of the report's figures."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from era.checkpoint.hub import CLASSES, CONFIG, WEIGHTS
from era.checkpoint.safetensors import save_safetensors
from era.checkpoint.writing import check_new_folder, folder_whole
from era.config import student_config
from era.deploy.source import Source, load_source
from era.engine.best import BEST_FILE
from era.environment import versions
from era.errors import UserError
from era.modeling.detectors import family_of
from era.report.page import number
from era.report.scored import Scored, score_runs
from era.report.write import find_dataset
from era.runs.reading import TASKS, TEACHER, read_runs

CARD, LICENCE_WORD = (
    "README.md",
    "a short name of the Hub, such as apache-2.0, cc-by-nc-4.0 or other",
)
STUDENT = ("student", "config.yaml"), ("student", "model_final.pth")  # what a run leaves
METRICS = ("AP", "AP50", "AP75")


def publish(
    folders: Sequence[Path],
    output: Path,
    *,
    licence: str,
    labels: Sequence[str] | None = None,
    teacher: Path | None = None,
    title: str = "",
) -> Path:
    """Write the student of the last run, its config, its classes' names and a model card into a folder that is new or empty.

    Args:
        folders, labels, teacher: as :func:`era.report.write.write_report`; the card's table has all of the runs.
        output: the folder; made whole or not at all.
        licence: of the weights, for the card's head: :data:`LICENCE_WORD`.
        title: of the card; "" = the last run's label.

    Returns:
        The folder.

    Raises:
        UserError: a run that cannot be read or has left no student, no licence, or a folder that is not empty or cannot
            be written.
    """
    if not re.fullmatch(r"[\w.-]+", licence):
        raise UserError(
            f"--license is {licence!r}: expected {LICENCE_WORD}; name the one that you give the weights."
        )
    check_new_folder(output, "--publish")
    runs = read_runs(folders, labels=labels, teacher=teacher)
    dataset, _ = find_dataset(runs[0])
    scored = score_runs(runs, dataset, {})
    last = [s for s in scored if s.run.role != TEACHER][-1]
    config, weights = (last.run.folder.joinpath(*parts) for parts in STUDENT)
    if not config.is_file() or not weights.is_file():
        raise UserError(
            f"{last.run.folder} has left no student ({weights} is missing): let the run end, or name another one last."
        )
    classes = list(dataset.classes) if dataset is not None else None
    source = _source(config, weights, classes)
    with folder_whole(output, "--publish") as made:
        save_safetensors(source.model.state_dict(), str(made / WEIGHTS), what="--publish")
        (made / CONFIG).write_text(_stock_config(source), encoding="utf-8")
        names = [category["name"] for category in source.categories]
        (made / CLASSES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        card = model_card(scored, last, source, licence=licence, title=title)
        (made / CARD).write_text(card, encoding="utf-8")
    return output


def model_card(
    scored: Sequence[Scored], last: Scored, source: Source, *, licence: str, title: str
) -> str:
    """The text of ``README.md``: the Hub's head in YAML, the figures of all runs, and what a user must know."""
    run, solver = last.run, last.run.cfg.SOLVER
    methods = ", ".join(run.methods) or "none (plain training)"
    reference = last.reference
    about = f"{_kind(source)}, trained with {methods}"
    about += f" by {_teacher_of(scored)}." if run.methods else "."
    counted = "" if reference is None else f"Gains are counted from {reference.run.label}."
    tasks = [task for task in TASKS if any(task in s.scores for s in scored)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("era.report"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )  # fmt: skip
    return environment.get_template("card.md").render(
        front=yaml.safe_dump(front_matter(last, licence=licence, title=title), sort_keys=False),
        title=_cell(title or run.label),
        about=_cell(about),
        table=_table(scored, tasks),
        masks="segm" in tasks,
        dataset=_cell(run.dataset),
        counted=_cell(counted),
        facts=[
            ("pictures", f"{source.rules.min_size} pixels at the shorter edge, {source.rules.max_size} at the longer at most"),
            ("channels", source.rules.channel_order),
            ("mean", _numbers(source.cfg.MODEL.PIXEL_MEAN)),
            ("deviation", _numbers(source.cfg.MODEL.PIXEL_STD)),
            ("parameters", f"{sum(p.numel() for p in source.model.parameters()) / 1e6:.1f} million"),
        ],
        classes=_cell(", ".join(category["name"] for category in source.categories)),
        training=[
            ("methods", _cell(methods)),
            ("starts from the teacher's", _cell(run.inherited)),
            ("iterations", f"{run.iterations or solver.MAX_ITER:,d} of {solver.IMS_PER_BATCH} pictures"),
            ("learning rate", f"{solver.BASE_LR:g}, {solver.LR_SCHEDULER_NAME}"),
            ("pictures", _cell(", ".join(run.cfg.DATASETS.TRAIN))),
            *_best(run.folder),
            ("software", _cell(", ".join(f"{name} {v}" for name, v in versions().items()))),
        ],
    )  # fmt: skip


def front_matter(last: Scored, *, licence: str, title: str) -> Mapping[str, Any]:
    """What the Hub reads at the head of a card; its fields are those of the Hub's documentation of model cards."""
    run = last.run
    results = [
        {"type": f"{task}_{name}", "value": round(last.ap(task, name), 2)}
        for task in TASKS
        if task in last.scores
        for name in METRICS
        if math.isfinite(last.ap(task, name))
    ]
    return {
        "license": licence,
        "library_name": "detectron2",
        "pipeline_tag": "object-detection",
        "tags": ["detectron2", "object-detection", "knowledge-distillation", *(m.lower() for m in run.methods)],
        "model-index": [
            {
                "name": title or run.label,
                "results": [
                    {
                        "task": {"type": "object-detection"},
                        "dataset": {"name": run.dataset, "type": run.dataset},
                        "metrics": results,
                    }
                ],
            }
        ],
    }  # fmt: skip


def _source(config: Path, weights: Path, classes: Sequence[str] | None) -> Source:
    """The student as an ordinary model, filled exactly."""
    if classes is None:  # named by the config's data, or refused in a sentence
        return load_source(config_file=str(config), weights=str(weights))
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as names:
        names.write("".join(f"{name}\n" for name in classes))
        names.flush()
        return load_source(config_file=str(config), weights=str(weights), classes_file=names.name)


def _stock_config(source: Source) -> str:
    """The student's config without a place of this machine in it."""
    cfg = student_config(source.cfg)
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "", "./output"
    return cfg.dump()


def _kind(source: Source) -> str:
    backbone = source.cfg.MODEL.BACKBONE.NAME.removeprefix("build_").removesuffix("_backbone")
    return f"{family_of(source.cfg).title(source.cfg)} on {backbone}"


def _teacher_of(scored: Sequence[Scored]) -> str:
    teacher = next((s for s in scored if s.run.role == TEACHER), None)
    return "a teacher" if teacher is None else f"a teacher of {number(teacher.ap('bbox'))} AP"


def _table(scored: Sequence[Scored], tasks: Sequence[str]) -> str:
    names = [(task, name) for task in tasks for name in METRICS]
    head = ["run", *(name if task == "bbox" else f"{name}, masks" for task, name in names), "gain"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for s in scored:
        gain = number(s.gain("bbox"), "+.1f")
        rows.append([_cell(s.run.label), *(number(s.ap(task, name)) for task, name in names), gain])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _best(folder: Path) -> list[tuple[str, str]]:
    """Which evaluation the student is of, where that is not the last one (``TEST.LEAVE_BEST``)."""
    path = folder / STUDENT[0][0] / BEST_FILE
    if not path.is_file():
        return []
    try:
        best = json.loads(path.read_text(encoding="utf-8"))
        words = f"{best['metric']} {best['value']:.1f} after {best['iterations']:,d} iterations"
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} cannot be read ({e}): expected what training wrote; remove it, or train again."
        ) from e
    return [("the best evaluation, which this is of", _cell(words))]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _cell(text: str) -> str:
    """Any text as words of Markdown: names come from files of anybody."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
