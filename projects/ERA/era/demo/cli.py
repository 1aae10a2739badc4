"""``tools/demo.py``: parse, train side by side, measure, and write what was found."""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from era import environment
from era.demo import figures, pictures, table
from era.demo.report import write_demo_report
from era.errors import UserError
from era.runs import measure
from era.runs.dataset import prepare_data
from era.runs.execute import State, execute, interruptible
from era.runs.folder import prepare_folder
from era.runs.plan import check_overrides, make_runs
from era.runs.schema import Plan, read_plan

PLAN = "studies/demo.yaml"
DESCRIPTION = """\
See distillation at work on generated pictures, on two CPU cores in at most 15 minutes.

The case is few labels and a strong teacher: a teacher is trained on 1,600 labelled pictures, and a small
student on the first 200 of them, three times: plain, distilled with ERA for as many iterations, and plain for
as long as ERA took. Every training is a run of tools/train_net.py with a config of configs/toy/;
studies/demo.yaml lists them. Ends with one table and a folder of results.
"""
EPILOG = """\
examples:
  the whole demo:                  %(prog)s
  does it run here at all:         %(prog)s --fast
  is it luck? another seed:        %(prog)s --seed 2 --output output/demo_seed2
  go on after Ctrl-C or a crash:   %(prog)s --reuse
  another setting for every run:   %(prog)s SOLVER.BASE_LR 0.02
  the same through make:           make demo ARGS="--seed 2 --output output/demo_seed2"

what it leaves in --output:
  table.md, results.json           the table, and all of it for programs
  environment.txt                  software and devices, for the report of a fault
  losses.png, charts.png, ap.png
  pictures/                        detections side by side; README.md there says how they were chosen
  deployed/, report.html           the distilled student exported, and all of it on one page
  teacher/, plain/, ...            the runs, each with its log (train.log), metrics.json, checkpoint,
                                   and student/: an ordinary Detectron2 model
"""
FAST = ("SOLVER.MAX_ITER", "40", "SOLVER.WARMUP_ITERS", "10")
SMOKE = "SMOKE RUN (--fast): a few iterations only, so the numbers mean nothing."
PRODUCTS = (
    "table.md",
    "results.json",
    "environment.txt",
    "report.html",
    "losses.png",
    "charts.png",
    "ap.png",
    "pictures",
    "deployed",
)


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
        help="40 iterations a run (for the one at equal time what takes as long), to see that all of it works; "
        "its numbers mean nothing",
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
    cores = environment.usable_cores()
    jobs = args.jobs if args.jobs is not None else default_jobs(cores)
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}: expected at least 1.")
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed is {args.seed}: expected 0 or more.")
    plan = read_plan(Path(PLAN))
    runs = make_runs(plan, output, opts=overrides(plan, args))
    with (
        prepare_folder(output, runs=runs, products=PRODUCTS, reuse=args.reuse),
        interruptible(output),
    ):
        print(
            f"{len(runs)} runs, {jobs} at a time, each on {max(1, cores // jobs)} CPU thread(s); "
            f"logs and results: {output}",
            flush=True,
        )
        prepare_data(runs)
        states = execute(runs, jobs=jobs, cores=cores, reuse=args.reuse)
        print("Timing the models and drawing figures and pictures ...", flush=True)
        rows, sentences = finish(plan, states, output, args=args, jobs=jobs)
    show(
        rows,
        sentences,
        output,
        compared=next(iter(plan.compare)),
        seconds=time.monotonic() - began,
        fast=args.fast,
    )
    return 0


def overrides(plan: Plan, args: argparse.Namespace) -> list[str]:
    """Overrides for every run: those of ``--fast`` and ``--seed``, then the user's.

    Raises:
        UserError: they are not pairs, or name a key that the plan sets itself.
    """
    check_overrides(plan, args.opts)
    seed = () if args.seed is None else ("SEED", str(args.seed))
    return [*seed, *(FAST if args.fast else ()), *args.opts]


def default_jobs(cores: int) -> int:
    """One on a GPU, else two where there are two cores."""
    return 1 if torch.cuda.is_available() else min(2, cores)


def finish(
    plan: Plan, states: dict[str, State], output: Path, *, args: argparse.Namespace, jobs: int
) -> tuple[list[table.Row], list[str]]:
    """Measure, and write the table, the figures, the pictures and the report.

    Returns:
        The table's rows, and sentences on what they come to.
    """
    for name in ("detectron2", "fvcore", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # Detectron2's own anchors
    by_name = {name: state.run for name, state in states.items()}
    runs = list(by_name.values())
    rows = table.gather(runs, measure.measure(runs))
    found = table.gains(rows, plan.compare)
    baseline, compared = by_name[found[0].reference], by_name[found[0].run]
    cfg = baseline.config
    sentences = [gain.sentence for gain in found]
    sentences += filter(None, [table.teacher_warning(rows, runs)])
    remarks = notes(plan, jobs=jobs, seed=cfg.SEED, dataset=cfg.DATASETS.TEST[0])
    about = {
        "sentences": sentences,
        "notes": [SMOKE, *remarks] if args.fast else remarks,
        "fast": args.fast,
        "seed": cfg.SEED,
        "jobs": jobs,
        "overrides": list(args.opts),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "run_seconds": {n: s.seconds and round(s.seconds, 1) for n, s in states.items()},
        "reused": [name for name, state in states.items() if state.reused],
    }
    table.write(output, rows, runs, found, about)
    (output / "environment.txt").write_text(environment.collected(), encoding="utf-8")
    figures.write_losses(runs, compared, output / "losses.png")
    figures.write_charts(runs, output / "charts.png")
    figures.write_ap(rows, runs, output / "ap.png")
    shown = [*(run for run in runs if run.is_teacher), baseline, compared]
    pictures.write_pictures(shown, baseline, compared, cfg.DATASETS.TEST[0], output / "pictures")
    write_demo_report(
        sorted(runs, key=lambda run: run.variant != plan.baseline),  # the baseline first
        rows,
        output,
        title=plan.title,
        deployed=compared.name,
        notes=[*sentences, *remarks],
        caution=SMOKE if args.fast else "",
    )
    return rows, sentences


def notes(plan: Plan, *, jobs: int, seed: int, dataset: str) -> list[str]:
    """What a reader of the table must know."""
    return [
        f"AP is COCO box AP in points on {dataset}, of the model after its last iteration; one seed "
        f"({seed}). Another seed gives other numbers: try --seed.",
        *plan.notes,
        f"ms per training step: median, on this machine, with up to {jobs} run(s) at a time; "
        "compare rows with care. Minutes of training steps: iterations times that, so without evaluations "
        "and, for a student, without its teacher's training.",
        "Equal training time: the iterations follow from the steps that were measured; times that differ by at "
        f"most {100 * table.ALIKE:.0f} % count as equal.",
        "ms per image: median, batch of one, one thread, models taking turns, nothing else running.",
    ]


def show(
    rows: Sequence[table.Row],
    sentences: Sequence[str],
    output: Path,
    *,
    compared: str,
    seconds: float,
    fast: bool,
) -> None:
    """The end of the demo on the screen.

    Args:
        compared: name of the distilled run whose student is shown and exported.
    """
    print(f"\n{table.terminal_table(rows)}\n")
    if fast:
        print(f"{SMOKE}\n")
    for sentence in sentences:
        print(sentence)
    print(f"\nDone in {tqdm.format_interval(seconds)}. Everything is in {output}:")
    for name, what in (
        ("table.md", "this table, with how to read it; results.json holds it for programs"),
        ("losses.png", "how the losses fall"),
        ("charts.png", "what the methods tell of themselves"),
        ("ap.png", "AP at a glance"),
        (
            "pictures/",
            "detections of the teacher, the plain and the distilled student side by side",
        ),
        (
            "deployed/",
            "the distilled student as TorchScript, ONNX and OpenVINO, each checked against eager",
        ),
        ("report.html", "all of it on one page; open it in a browser"),
        (f"{compared}/student/", "the distilled student, an ordinary Detectron2 model"),
    ):
        if (output / name).exists():  # without the deployment runtimes nothing is exported
            print(f"  {name:<14} {what}")
