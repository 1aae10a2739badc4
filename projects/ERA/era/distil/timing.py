"""How long everything will take: a few steps of each training are really taken, by what the doctor does for one."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode

from era.distil import choices
from era.distil.annotations import Data, write_data
from era.distil.configs import (
    DISTILLED,
    TEACHER,
    Choices,
    make_configs,
    settle,
    time_config,
    with_iterations,
    write_config,
)
from era.distil.pretrained import Start
from era.distil.request import Request
from era.doctor.case import Case
from era.doctor.cli import read_options
from era.doctor.steps import take_steps
from era.engine.preflight import build_for_training, setup_config
from era.environment import usable_cores
from era.errors import UserError

STEPS = 2  # that count, after one that warms up
START = {"cuda": 30.0, "cpu": 15.0}  # seconds until a run takes its first step
EVALUATE, EXPORT, REPORT = "evaluate", "export", "report"  # steps after the trainings
SECONDS_EXPORT = 20.0  # of a format
SECONDS_REPORT = 20.0
MOST_WORKERS = 4  # of a data loader
GIB = 2**30
NO_MEMORY = ("out of memory", "SIGKILL", "can't allocate")
ROUNDS = 3  # until schedule and number of evaluations agree


@dataclass(frozen=True)
class Times:
    """Seconds of a training step and of a test picture, the latter of the model that is trained."""

    step: float
    picture: float


@dataclass(frozen=True)
class Measured:
    """What was measured and chosen by it."""

    chosen: Choices
    times: dict[str, Times]  # by training
    seconds: dict[str, float]  # foreseen, by training and by what follows

    def as_dict(self) -> dict:
        """In plain values."""
        return {"times": {k: asdict(v) for k, v in self.times.items()}, "seconds": self.seconds}


def measure(request: Request, data: Data, start: Start, began: float) -> Measured:
    """Choose, take steps of every training in a temporary folder, and choose the schedule by them.

    Where a step needs more memory than there is, half as many pictures are tried.

    Args:
        start: of the student.
        began: when the command was given, by ``time.monotonic``; the time since then is part of ``--time``.

    Raises:
        UserError: a training cannot take a step, weights do not fit, or the time that is given is too short.
    """
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if request.num_gpus else None
    cores = usable_cores() // request.processes
    workers = min(MOST_WORKERS, cores - 1) if request.num_gpus or cores > 2 else 0
    chosen = settle(request, data, start, memory_gib=memory, workers=max(0, workers))
    while True:
        with tempfile.TemporaryDirectory(prefix="era_distil_") as name:
            times = _take_steps(request, data, chosen, Path(name))
        if times is not None:
            break
        fewer = chosen.batch // request.processes // 2 * request.processes
        if not fewer:
            raise UserError(
                f"one picture of {chosen.size[0]} x {chosen.size[1]} pixels a device needs more memory than there is: "
                "choose a smaller --student or --teacher."
            )
        chosen = settle(
            request, data, start, memory_gib=memory, workers=chosen.workers, batch=fewer
        )
    spent = time.monotonic() - began
    chosen, seconds = schedule(request, data, chosen, times, spent=spent)
    return Measured(chosen, times, seconds)


def schedule(
    request: Request, data: Data, chosen: Choices, times: dict[str, Times], *, spent: float = 0.0
) -> tuple[Choices, dict[str, float]]:
    """Iterations and evaluations by the times that were measured, and seconds of everything.

    Args:
        spent: seconds of the given time that are gone.

    Raises:
        UserError: the time that is given is too short.
    """
    usual, iterations = chosen.iterations, chosen.iterations
    for _ in range(ROUNDS):
        counts = {
            n: _asked_evaluations(request, n, iterations[n]) or choices.evaluations(iterations[n], times[n].step, _evaluation(request, data, times[n]))
            for n in usual
        }  # fmt: skip
        found = with_iterations(chosen, dict(iterations), counts)
        seconds = foreseen(request, data, found, times)
        if request.seconds is None:
            break
        steps = sum(iterations[n] * times[n].step for n in usual)
        iterations = dict(zip(usual, choices.in_time(
            list(usual.values()), [times[n].step for n in usual], sum(seconds.values()) - steps + spent,
            request.seconds,
        ), strict=True))  # fmt: skip
    return found, seconds


def foreseen(
    request: Request, data: Data, chosen: Choices, times: dict[str, Times]
) -> dict[str, float]:
    """Seconds of every training, the evaluation of what they leave, the exports and the report."""
    start = START[request.device]
    found, judged = {}, 0.0
    for name in chosen.trainings:
        one = times[name]
        each = _evaluation(request, data, one)
        found[name] = start + chosen.iterations[name] * one.step + chosen.evaluations[name] * each
        if name != TEACHER:
            judged += start + each / 2
        if name == DISTILLED:  # the teacher beside it, once
            found[name] += data.val.pictures * times.get(TEACHER, one).picture
    found[EVALUATE] = judged
    if request.formats:
        found[EXPORT] = SECONDS_EXPORT * len(request.formats)
    found[REPORT] = SECONDS_REPORT
    return found


def _asked_evaluations(request: Request, training: str, iterations: int) -> int:
    """How often a training evaluates by the overrides; 0 where they do not say."""
    period = int(request.override("TEST.EVAL_PERIOD", teacher=training == TEACHER) or 0)
    return -(-iterations // period) if period else 0


def _evaluation(request: Request, data: Data, times: Times) -> float:
    """Seconds of one in training: detections, and the losses again as long."""
    return 2 * data.val.pictures * times.picture / request.processes


def _take_steps(
    request: Request, data: Data, chosen: Choices, folder: Path
) -> dict[str, Times] | None:
    """Times by training; None where memory runs out."""
    write_data(data, folder)
    chosen.start.write(folder)
    configs = make_configs(request, data, chosen, folder)
    for name, cfg in configs.items():
        write_config(cfg, folder / f"{name}.yaml")
    if chosen.fine_tune:
        check_fills(configs[TEACHER], request.teacher_weights)
    found = {}
    for name, cfg in configs.items():
        file = folder / f"time_{name}.yaml"
        write_config(time_config(cfg, chosen.fine_tune), file)
        args = read_options(["--config-file", str(file), "--num-gpus", str(request.processes), "--steps", str(STEPS)])  # fmt: skip
        case = Case(args, setup_config(args))
        measured = take_steps(case, 1, on_gpu=case.on_gpu)
        if problem := measured.get("problem"):
            if any(word in problem for word in NO_MEMORY):
                return None
            raise UserError(_in_options(f"{name} cannot be trained: {problem}"))
        picture = measured["test_seconds"] or 0.0
        found[name] = Times(statistics.median(measured["seconds"]), picture)
    return found


def check_fills(cfg: CfgNode, weights: str) -> None:
    """The weights are those of the config that is fine-tuned, whatever its classes.

    Raises:
        UserError: they fill less than half of the model.
    """
    frozen = cfg.clone()
    frozen.freeze()
    level = logging.getLogger("era").level
    logging.getLogger("era").setLevel(logging.ERROR)
    try:
        model, wrong = build_for_training(frozen, resume=False)
    finally:
        logging.getLogger("era").setLevel(level)
    total = len(model.state_dict())
    filled = total - len(wrong.missing_keys) if wrong is not None else 0
    if filled < total / 2:
        raise UserError(
            f"--teacher-weights {weights} fills {filled} of {total} tensors of --teacher: expected the weights of that "
            "very detector, of whatever classes; name them."
        )


def _in_options(sentence: str) -> str:
    """A sentence about a config that nobody wrote, in the words of the command line."""
    return sentence.replace("MODEL.TEACHER.WEIGHTS", "--teacher-weights").replace("MODEL.TEACHER.CONFIG_FILE", "--teacher")  # fmt: skip
