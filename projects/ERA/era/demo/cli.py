"""``tools/demo.py``: parse, train side by side, measure, and write what was found."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from era import __version__
from era.demo import figures, pictures, table
from era.demo import report as report_page
from era.demo.runs import make_runs
from era.engine.preflight import check_data
from era.errors import UserError
from era.runs import measure
from era.runs.execute import State, execute
from era.runs.plan import Run, prepare_folder
from era.runs.progress import Screen, duration

DESCRIPTION = """\
See distillation at work on a small generated dataset, on two CPU cores.

Trains a teacher, then a small student in four ways: plain, with ERA, and both again with the RPN and
ROI heads started from the teacher's weights ("inherited"). Every training is a run of
tools/train_net.py with a config of configs/toy/. Ends with one table and a folder of results.
"""
EPILOG = """\
examples:
  the whole demo:                  %(prog)s
  does it run here at all:         %(prog)s --fast
  is it luck? another seed:        %(prog)s --seed 2 --output output/demo_seed2
  go on after Ctrl-C or a crash:   %(prog)s --reuse
  another setting for every run:   %(prog)s SOLVER.MAX_ITER 400
  the same through make:           make demo ARGS="--seed 2 --output output/demo_seed2"

what it leaves in --output:
  table.md, results.json           the table, and everything in it for programs
  losses.png, residuals.png, ap.png
  pictures/                        detections side by side; README.md there says how they were chosen
  deployed/, report.html           the ERA student exported, and all of it on one page
  teacher/, plain/, era/, ...      the runs, each with its log (train.log), metrics.json, checkpoint,
                                   and student/: an ordinary Detectron2 model
"""
FAST = ("SOLVER.MAX_ITER", "40", "SOLVER.WARMUP_ITERS", "10")
INTERRUPTED = 130  # exit status


def argument_parser() -> argparse.ArgumentParser:
    """The demo's options."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/demo"),
        metavar="DIR",
        help="folder for everything; an earlier demo there is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="trainings at a time (default: 2 if there are two CPU cores, 1 on a GPU)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="random seed (default: the configs')")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="keep the runs in --output that are complete and would be done the same way again",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="40 iterations a run, to see that all of it works; its numbers mean nothing",
    )
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="config overrides for every run, after the options",
    )
    return parser


def main(argv: Sequence[str] | None = None, *, root: Path) -> int:
    """Run the demo.

    Args:
        root: top of the repository, where ``configs`` and ``tools`` are.

    Returns:
        Exit status.

    Raises:
        UserError: options that do not fit, a folder that is not the demo's, a run that failed.
    """
    args = argument_parser().parse_intermixed_args(argv)
    began = time.monotonic()
    output = args.output.expanduser().resolve()
    os.chdir(root)  # the configs name one another, and the datasets, from there
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    jobs = args.jobs if args.jobs is not None else default_jobs(cores)
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}: expected at least 1.")
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed is {args.seed}: expected 0 or more.")
    runs = make_runs(output, overrides(args), seed=args.seed)
    lock = prepare_folder(output, reuse=args.reuse)
    signal.signal(signal.SIGTERM, _interrupt)
    screen = Screen()
    try:
        screen.say(
            f"{len(runs)} runs, {jobs} at a time, each on {max(1, cores // jobs)} CPU thread(s); "
            f"logs and results: {output}"
        )
        check_data(runs[0].config, for_training=True)  # makes the toy data, once, before all runs
        states = execute(runs, jobs=jobs, cores=cores, screen=screen, reuse=args.reuse)
        screen.say("Timing the models and drawing figures and pictures ...")
        rows = finish(runs, states, output, args=args, jobs=jobs, cores=cores)
    except KeyboardInterrupt:
        screen.close()
        print(
            f"\ninterrupted; what is complete stays in {output}, and --reuse goes on from there.",
            file=sys.stderr,
        )
        return INTERRUPTED
    finally:
        lock.close()
    report(rows, output, seconds=time.monotonic() - began, fast=args.fast)
    return 0


def overrides(args: argparse.Namespace) -> list[str]:
    """Overrides for every run: those of ``--fast``, then the user's.

    Raises:
        UserError: they are not pairs.
    """
    opts = list(args.opts)
    if len(opts) % 2:
        raise UserError(
            f"the overrides {' '.join(opts)!r} are not pairs: give KEY VALUE KEY VALUE ..., options "
            "such as --fast before them."
        )
    return [*(FAST if args.fast else ()), *opts]


def default_jobs(cores: int) -> int:
    """One on a GPU, else two where there are two cores."""
    return 1 if torch.cuda.is_available() else min(2, cores)


def finish(
    runs: Sequence[Run],
    states: dict[str, State],
    output: Path,
    *,
    args: argparse.Namespace,
    jobs: int,
    cores: int,
) -> list[table.Row]:
    """Measure, and write the table, the figures and the pictures."""
    for name in ("detectron2", "fvcore", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # Detectron2's own anchors
    rows = table.gather(runs, measure.measure(runs))
    cfg = runs[0].config
    about = {
        "notes": notes(jobs=jobs, seed=cfg.SEED, dataset=cfg.DATASETS.TEST[0], fast=args.fast),
        "fast": args.fast,
        "seed": cfg.SEED,
        "jobs": jobs,
        "overrides": list(args.opts),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "platform": platform.platform(),
            "cpu_cores": cores,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions(),
        "run_seconds": {n: s.seconds and round(s.seconds, 1) for n, s in states.items()},
        "reused": [name for name, state in states.items() if state.reused],
    }
    table.write(output, rows, runs, about)
    figures.write_losses(runs, output / "losses.png")
    figures.write_residuals(runs, output / "residuals.png")
    figures.write_ap(rows, output / "ap.png")
    pictures.write_pictures(runs, cfg.DATASETS.TEST[0], output / "pictures")
    report_page.write_demo_report(runs, rows, about["notes"], output)
    return rows


def notes(*, jobs: int, seed: int, dataset: str, fast: bool) -> list[str]:
    """What a reader of the table must know."""
    found = [
        f"AP is COCO box AP in points on {dataset}, of the model after its last iteration; one seed "
        f"({seed}). Another seed gives other numbers: try --seed.",
        "Inherited: the student's RPN and ROI heads started from the teacher's weights. That moves AP "
        "by itself, so compare only rows that inherited the same.",
        "At alpha 1 the ERA student's backbone is followed by MBRNet and the teacher's heads; all "
        "other rows are ordinary detectors, with nothing of ERA in them.",
        f"ms per training step: median, on this machine, with up to {jobs} run(s) at a time; "
        "compare rows with care.",
        "ms per image: median, batch of one, one thread, models taking turns, nothing else running.",
        "The comparison is at equal iterations, on a schedule too short for the plain student to level "
        "off: what it shows is faster learning.",
    ]
    if fast:
        found.insert(0, "SMOKE RUN (--fast): a few iterations only, so the numbers mean nothing.")
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version(), "era": __version__}
    for name in ("torch", "torchvision", "detectron2", "numpy", "pycocotools"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def report(rows: Sequence[table.Row], output: Path, *, seconds: float, fast: bool) -> None:
    """The end of the demo on the screen."""
    print(f"\n{table.terminal_table(rows)}\n")
    if fast:
        print("SMOKE RUN (--fast): a few iterations only, so these numbers mean nothing.\n")
    for gain in table.gains(rows):
        print(gain["sentence"])
    print(f"\nDone in {duration(seconds)}. Everything is in {output}:")
    for name, what in (
        ("table.md", "this table, with how to read it; results.json holds it for programs"),
        ("losses.png", "how the losses fall"),
        ("residuals.png", "how far the student still is from the teacher after every branch"),
        ("ap.png", "AP at a glance"),
        ("pictures/", "detections of teacher, plain and ERA student side by side"),
        (
            "deployed/",
            "the ERA student as TorchScript, ONNX and OpenVINO, each checked against eager",
        ),
        ("report.html", "all of it on one page; open it in a browser"),
        ("era/student/", "the ERA student, an ordinary Detectron2 model, ready for use"),
    ):
        if (output / name).exists():  # without the deployment runtimes nothing is exported
            print(f"  {name:<14} {what}")


def _interrupt(*_) -> None:
    raise KeyboardInterrupt
