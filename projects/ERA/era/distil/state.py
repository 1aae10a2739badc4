"""The plan of a distillation: said at the start, and kept in its folder so that the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from era.checkpoint.writing import write_text_whole
from era.distil import choices
from era.distil.annotations import FOLDER, Data
from era.distil.configs import DISTILLED, PLAIN, TEACHER, Choices, make_configs
from era.distil.pretrained import FOLDER as STUDENT_WEIGHTS
from era.distil.request import Request
from era.distil.timing import EVALUATE, EXPORT, REPORT, Measured
from era.engine.preflight import check_writable
from era.engine.time_limit import read_shortened
from era.errors import UserError
from era.runs.folder import MARKER
from era_runtime.manifest import sha256_file

STATE_FILE = "distil.json"
ENVIRONMENT_FILE = "environment.txt"
SCHEMA = 2
OWN = {
    MARKER,
    ENVIRONMENT_FILE,
    FOLDER,
    STUDENT_WEIGHTS,
    *(f"{name}.yaml" for name in (TEACHER, PLAIN, DISTILLED)),
}  # written before it


@dataclass(frozen=True)
class Plan:
    """What is to be done, in plain values.

    Attributes:
        request: what was asked for, see :meth:`Request.as_dict`.
        sources: SHA-256 of the annotation files, by path.
        settings: what was chosen, its value and why, for people.
        steps: name, what it does, and seconds foreseen, of everything in order.
        notes: sentences on the data.
    """

    request: dict
    sources: dict[str, str]
    settings: list[list[str]]
    steps: list[list]
    notes: list[str]

    @property
    def trainings(self) -> list[str]:
        """Their names, in order."""
        return [name for name, *_ in self.steps if name in (TEACHER, PLAIN, DISTILLED)]

    @property
    def planned(self) -> dict[str, float]:
        """Seconds foreseen, by step."""
        return {name: seconds for name, _, seconds in self.steps}

    def compared(self, took: Mapping[str, float], output: Path) -> str:
        """What is said at the end: the seconds of every step as they were foreseen and as they were, and which schedules were
        shortened."""
        rows = []
        for name in dict.fromkeys([*took, *self.planned]):
            found = read_shortened(output / name) if name in self.trainings else None
            note = (
                f"shortened to {found[0]:,} of {found[1]:,} steps, to be in time" if found else ""
            )
            planned = choices.in_words(self.planned[name]) if name in self.planned else ""
            rows.append([name, planned, choices.in_words(took.get(name, 0.0)), note])
        limit = self.request["seconds"]
        given = "" if limit is None else f" of the {choices.in_words(limit)} of --time"
        total = choices.in_words(sum(took.values()))
        return f"\n{tabulate(rows, headers=['', 'planned', 'took', ''], tablefmt='plain')}\nIt took {total}{given}."

    def told(self, output: Path) -> str:
        """What is said at the start."""
        settings = tabulate(self.settings, tablefmt="plain")
        rows = [
            [f"{i}.", name, what, f"about {choices.in_words(seconds)}"]
            for i, (name, what, seconds) in enumerate(self.steps, start=1)
        ]
        total = choices.in_words(sum(seconds for *_, seconds in self.steps))
        notes = "".join(f"note: {note}\n" for note in self.notes)
        return (
            f"{settings}\n{notes}\nWhat will be done in {output}, about {total} by the steps that were tried on this machine:\n"
            f"{tabulate(rows, tablefmt='plain', maxcolwidths=[None, None, 78, None])}\n"
        )


def make_plan(request: Request, data: Data, measured: Measured) -> Plan:
    """The plan of what was chosen and measured."""
    chosen = measured.chosen
    configs = make_configs(request, data, chosen, request.output)
    formats = ", ".join(request.formats)
    what = {
        TEACHER: f"fine-tune {request.teacher}",
        PLAIN: f"{request.student} without a teacher, to compare with",
        DISTILLED: f"distil {request.student} by {', '.join(configs[DISTILLED].MODEL.DISTILLER.METHODS)}",
        EVALUATE: "detect on the validation pictures with the best student",
        EXPORT: f"{formats}, each compared with eager",
        REPORT: "report.html",
    }
    for name, cfg in configs.items():
        what[name] += f": {cfg.SOLVER.MAX_ITER:,} steps, {chosen.evaluations[name]} evaluations"
    steps = [[name, what[name], round(s, 1)] for name, s in measured.seconds.items()]
    return Plan(request.as_dict(), data.sources, _settings(request, data, chosen, configs), steps, data.notes())  # fmt: skip


def _settings(request: Request, data: Data, chosen: Choices, configs: dict) -> list[list[str]]:
    cfg, why = configs[DISTILLED], chosen.why
    split = f"{data.train.pictures} to train on, {data.val.pictures} to validate with"
    names = ", ".join(data.train.classes)
    sizes = sorted(set(cfg.INPUT.MIN_SIZE_TRAIN))
    rates = ", ".join(f"{name} {c.SOLVER.BASE_LR:g}" for name, c in configs.items())
    waits = " or ".join(dict.fromkeys(str(c.TEST.PATIENCE) for c in configs.values()))
    start = chosen.start.about
    rows = [
        ["pictures", split, f"drawn with the seed {data.seed}, written to {FOLDER}/split.json" if data.seed is not None else "as given"],
        ["classes", f"{len(data.train.classes)}: {names[:60]}{'...' * (len(names) > 60)}", "of the annotations"],
        ["teacher", request.teacher, f"{'fine-tuned' if chosen.fine_tune else 'taken as it is'}: {why['teacher']}"],
        ["student", request.student, f"from {start}, its heads from the teacher's" if cfg.MODEL.DISTILLER.INIT_STUDENT != "none" else f"from {start}"],
        ["picture size", f"{chosen.size[0]}, at most {chosen.size[1]} pixels", f"pictures and objects of the data, on {request.device}; in training {', '.join(map(str, sizes))}"],
    ]  # fmt: skip
    if chosen.anchors is not None:
        rows.append(["anchors", chosen.anchors.in_words(), why["anchors"]])
    if request.teacher_config().MODEL.MASK_ON:
        rows.append(["masks", "trained" if chosen.masks else "left out", why["masks"]])
    rows += [
        ["batch", f"{cfg.SOLVER.IMS_PER_BATCH} pictures", f"{request.processes} {'GPU(s)' if request.num_gpus else 'process on the CPU'}"],
        ["learning rate", rates, "in proportion to the batch, along a cosine"],
        ["schedule", ", ".join(f"{n} {c.SOLVER.MAX_ITER:,}" for n, c in configs.items()), "what the time allows" if request.seconds else "by the number of pictures; --time sets it"],
        ["kept", "the best by AP, of averaged weights", f"a training ends early after {waits} evaluations without a better one"],
    ]  # fmt: skip
    return rows


def write_state(plan: Plan, output: Path) -> None:
    """Into the folder, whole or not at all; from then on the same command goes on with it."""
    text = json.dumps({"schema": SCHEMA, **asdict(plan)}, indent=1) + "\n"
    write_text_whole(text, str(output / STATE_FILE))


def read_state(request: Request) -> Plan | None:
    """The plan that an earlier call of the same command left in the folder; None where it is new or empty.

    Raises:
        UserError: the folder is somebody else's, of another request or other data, or cannot be written.
    """
    output = request.output
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: expected a folder; name one.")
    check_writable(str(output), key="--output", what="the results")
    if not output.is_dir() or not any(output.iterdir()):
        return None
    file = output / STATE_FILE
    if not file.is_file():
        if foreign := sorted(p.name for p in output.iterdir() if p.name not in OWN):
            raise UserError(
                f"--output {output} holds files of something else ({foreign[0]}, and no {STATE_FILE}): expected a new or empty "
                "folder, or that of the same command; name another."
            )
        return None  # of a call that was stopped before it began
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.pop("schema") != SCHEMA:
            raise ValueError("it is of another version")
        plan = Plan(**found)
        changed = _changed(plan.request, request.as_dict())
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as e:
        raise UserError(
            f"{file} cannot be read ({' '.join(str(e).split())[:100]}): expected what distil wrote there; name another --output."
        ) from e
    if changed:
        raise UserError(
            f"--output {output} holds another distillation ({changed}): expected the same command to go on with it; name "
            "another --output."
        )
    for path, sha in plan.sources.items():
        if sha256_file(path) != sha:
            raise UserError(
                f"{path} has changed since {output} was begun: expected the same data to go on with it; name another --output."
            )
    return plan


def _changed(before: dict, now: dict) -> str:
    """The first entry of a request that differs, in words; "" if none does."""
    for key, value in now.items():
        if before.get(key) != value:
            return f"{key} was {_shown(before.get(key))} and is {_shown(value)}"
    return ""


def _shown(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)
