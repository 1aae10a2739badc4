"""``tools/distil.py``: read, choose, say what will be done, and do it."""

from __future__ import annotations

import logging
import shlex
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from era.checkpoint.writing import write_text_whole
from era.config import load_config
from era.distil.annotations import read_data, write_data
from era.distil.clock import PREPARE, TIME_FILE, Clock, seconds_for
from era.distil.configs import DISTILLED, make_configs, write_config
from era.distil.pretrained import find_start
from era.distil.products import (
    DEPLOYED,
    REPORT_FILE,
    export_student,
    make_runs,
    table,
    write_the_report,
)
from era.distil.request import Request, argument_parser, read_request
from era.distil.state import ENVIRONMENT_FILE, STATE_FILE, Plan, make_plan, read_state, write_state
from era.distil.timing import EVALUATE, EXPORT, REPORT, START, measure
from era.environment import collected, usable_cores
from era.errors import UserError
from era.runs.execute import execute, interruptible
from era.runs.folder import prepare_folder
from era.runs.placement import usable_gpus
from era.runs.plan import Run
from era.runs.process import go_on_process

FAILED = 1
HOW = "the same command goes on"


def main(argv: Sequence[str] | None = None) -> int:
    """Distil; everything is in ``--output`` afterwards, and the results on the screen.

    Returns:
        Exit status: 1 if a format could not be exported.

    Raises:
        UserError: one sentence for whatever is wrong first; before the plan is said nothing was written.
    """
    args = argument_parser().parse_args(argv)
    began = time.monotonic()
    for name in ("detectron2", "fvcore", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # Detectron2's own anchors
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    request = read_request(args)
    plan = read_state(request)
    goes_on = plan is not None
    write = None
    if plan is None:
        plan, write = _prepare(request, began)
    print(plan.told(request.output), flush=True)
    if args.dry_run:
        print("Nothing was written (--dry-run).")
        return 0
    if goes_on:
        print(f"Going on in {request.output}.", flush=True)
    with (
        prepare_folder(request.output, runs=(), products=(), reuse=True),
        interruptible(request.output, how=HOW),
    ):
        if write is not None:
            if (request.output / STATE_FILE).exists():
                raise UserError(
                    f"another process has begun a distillation in --output {request.output}: expected a new folder; name "
                    "another, or give the command again to go on with that one."
                )
            write()
        with Clock(request.output / TIME_FILE) as clock:
            clock.add(PREPARE, time.monotonic() - began)
            runs, problems = carry_out(plan, request, clock)
    _finish(runs, problems, request.output)
    print(plan.compared(clock.seconds, request.output))
    return FAILED if problems else 0


def _prepare(request: Request, began: float):
    """The plan of a new folder, and what writes it there."""
    print("Looking at the data and the pictures ...", flush=True)
    data = read_data(request.data, request.val, request.seed)
    start = find_start(request)
    if start.conversion is not None:
        print(f"The student's weights, {start.about}:\n{start.conversion.summary()}", flush=True)
    print("Taking a few steps of every training, to know how long they take ...", flush=True)
    measured = measure(request, data, start, began)
    plan = make_plan(request, data, measured)

    def write() -> None:
        write_data(data, request.output)
        start.write(request.output)
        configs = make_configs(request, data, measured.chosen, request.output)
        for name, cfg in configs.items():
            write_config(cfg, request.output / f"{name}.yaml")
        write_text_whole(collected(), str(request.output / ENVIRONMENT_FILE))
        write_state(plan, request.output)

    return plan, write


def carry_out(plan: Plan, request: Request, clock: Clock):
    """Everything of a plan that is not done yet.

    Args:
        clock: counts the time of every step.

    Returns:
        The runs, and why exports are missing.

    Raises:
        UserError: a training failed.
    """
    output = request.output
    methods = load_config(str(output / f"{DISTILLED}.yaml")).MODEL.DISTILLER.METHODS
    runs = make_runs(plan.trainings, output, request.processes, methods)
    gpus = usable_gpus() if request.num_gpus else ()

    def start(run: Run, threads: int, lent: Sequence[str] | None):
        clock.begin(EVALUATE if run.evaluates else run.name)
        return go_on_process(_in_time(run, plan, request, clock), threads, lent)

    try:
        execute(runs, jobs=1, cores=usable_cores(), gpus=gpus, reuse=True, start=start)
    except UserError as e:
        raise UserError(str(e).replace("--reuse keeps", "the same command keeps")) from e
    clock.begin(EXPORT)
    folders, problems = export_student(output, request.formats, partial(print, flush=True))
    clock.begin(REPORT)
    write_the_report(output, plan.trainings, folders, plan.notes)
    return runs, problems


def _in_time(run: Run, plan: Plan, request: Request, clock: Clock) -> Run:
    """A training whose process is told how much of ``--time`` it has; any other run as it is."""
    if request.seconds is None or run.evaluates:
        return run
    seconds = seconds_for(run.name, request.seconds, plan.planned, clock.snapshot())
    seconds = max(1, int(seconds - START[request.device]))  # it counts when it is set up
    return replace(run, command=(*run.command, "SOLVER.MAX_SECONDS", str(seconds)))


def _finish(runs, problems: Sequence[str], output: Path) -> None:
    print(f"\n{table(runs)}\n\nDone. Everything is in {output}:")
    for name, what in (
        (f"{DISTILLED}/student", "the student, an ordinary Detectron2 model"),
        (DEPLOYED, "the student for other programs"),
        (REPORT_FILE, "all of it on one page; open it in a browser"),
        (STATE_FILE, "what was asked for and chosen"),
    ):
        if (output / name).exists():
            print(f"  {name:<20} {what}")
    made = sorted(path.parent for path in (output / DEPLOYED).glob("*/manifest.json"))
    if made:
        print(f"Detect with it:\n  era predict --model {shlex.quote(str(made[0]))} --output found PICTURES")  # fmt: skip
    for problem in problems:
        print(f"missing: {problem}")
