"""Studies of several seeds: what ``tools/study.py`` does.

A plan of ``studies/`` says what is trained; every variant is trained from every seed. A study goes on where it
was stopped, also on another machine if the plan keeps ``results``, and past a run that fails.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from era import environment
from era.errors import UserError
from era.runs.dataset import prepare_data
from era.runs.execute import State, execute, interruptible
from era.runs.folder import is_finished, prepare_folder
from era.runs.identity import identities
from era.runs.placement import check_gpus, usable_gpus
from era.runs.plan import Run, make_runs
from era.runs.results import Result, make_result, read_results, write_result
from era.runs.schema import Plan, read_plan, with_chosen
from era.runs.series import method_charts
from era.study import equal_time, tuning
from era.study.figures import write_charts, write_curves
from era.study.page import page, table
from era.study.summary import Entry, summarise

PRODUCTS = ("table.md", "results.json", "curves.svg", "charts.svg")
FAILED = 1  # exit status
CPU_JOBS = 2  # runs at a time on a machine without a GPU


def argument_parser() -> argparse.ArgumentParser:
    """Options of ``tools/study.py``."""
    parser = argparse.ArgumentParser(
        description="Train variants from several seeds and compare their AP, as a plan says. The same command "
        "goes on after a stop: complete runs are kept, unless what they follow from has changed. A run that fails "
        "is named, the others go on, and the exit status is 1.",
        epilog="studies/demo.yaml explains the entries of a plan. A study of the generated data takes from "
        "half an hour to hours on two cores. Its folder then holds table.md, results.json, curves.svg (AP over iterations and over time), "
        "charts.svg (where the charts of the methods end) and the runs; a plan with the entry results keeps a small file of every complete run there, with which "
        "another machine goes on.",
    )
    parser.add_argument(
        "study", help="a name in studies/, such as full, or the path of a YAML file"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these of the study, by the names "
                        "of its runs (with schedules: NAME_SCHEDULE), and what they need; default all")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the plan's")
    parser.add_argument("--output", type=Path, help="folder; default output/study/<study>")
    parser.add_argument("--teacher", type=Path, help="a trained teacher's model_final.pth to use")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: as many as there are GPUs that this "
                        "process may use (CUDA_VISIBLE_DEVICES), each run on its own; without a GPU 2")  # fmt: skip
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="train everything again")
    again.add_argument(
        "--reuse", "--resume", action="store_true", help="keep complete runs: the default"
    )
    return parser


def main(argv: Sequence[str] | None = None, *, root: Path) -> int:
    """Run a study; the :data:`PRODUCTS` in its folder, the table on the screen.

    Args:
        root: top of the repository.

    Returns:
        Exit status: 1 if a run failed.

    Raises:
        UserError: options or a plan that do not fit, a folder that is not the study's, a result that is none.
    """
    args = argument_parser().parse_args(argv)
    plan = read_plan(find_plan(args.study, root))
    output = (args.output or root / "output" / "study" / plan.name).expanduser().resolve()
    given = given_teacher(plan, args.teacher)
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}: expected at least 1.")
    gpus = usable_gpus()
    jobs = args.jobs or len(gpus) or CPU_JOBS
    if args.seeds and (min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds)):
        raise UserError(f"--seeds is {args.seeds}: expected different numbers from 0 on.")
    os.chdir(root)
    make = partial(make_runs, output=output, only=args.variants, given=given)
    runs = make(plan, seeds=args.seeds or ())
    tries = []
    if plan.tuning:
        tries = make(tuning.tries_plan(plan), only=tuning.wanted(plan, args.variants))
    every = list({run.name: run for run in (*tries, *runs)}.values())  # teachers are in both
    check_gpus(every, gpus)
    if gpus:
        print(f"{jobs} runs at a time on the GPUs {', '.join(gpus)}", flush=True)
    train = partial(run_all, jobs=jobs, gpus=gpus, fresh=args.fresh)
    with (
        prepare_folder(output, runs=every, products=PRODUCTS, reuse=not args.fresh),
        interruptible(output, how="the same command goes on"),
    ):
        prepare_data(every)
        choices, problems, waiting = [], {}, {}
        if tries:
            tuning.check_split(plan, runs)
            print(f"first {len(tries)} runs to choose from, then {len(runs)} to compare; the time that remains is "
                  "that of the part at work", flush=True)  # fmt: skip
            results, problems = train(plan, tries)
            choices, missing = tuning.choose(plan, tries, results)
            plan = with_chosen(plan, {choice.student: choice.overrides for choice in choices})
            runs, waiting = make(plan, seeds=args.seeds or ()), tuning.blocked(plan, missing)
        results, failed = train(plan, [run for run in runs if run.variant not in waiting])
        problems |= failed
        problems |= {run.name: waiting[run.variant] for run in runs if run.variant in waiting}
        entries = summarise(plan, runs, results)
        write_products(plan, entries, choices, problems, output)
    print(f"\n{table(entries)}\n\nMore of it, and how it was counted: {output / 'table.md'}")
    return tell_missing(len(every), problems)


def run_all(
    plan: Plan, runs: Sequence[Run], *, jobs: int, gpus: Sequence[str], fresh: bool
) -> tuple[dict[str, Result], dict[str, str]]:
    """Execute what is not complete, keeping results as they come where the plan says so.

    Returns:
        The results, and why runs failed or were skipped, by name of the run.

    Raises:
        UserError: a file in the plan's folder of results that is none.
    """
    results: dict[str, Result] = {}
    if plan.results and not fresh:
        results, outdated = read_results(plan.results, runs, identities(runs))
        count = sum(not run.is_part for run in runs)
        print(f"{len(results)} of {count} results are in {plan.results}", flush=True)
        for name in outdated:
            print(
                f"{plan.results / name}.json is of other settings: {name} is to be run", flush=True
            )
        for name in lacking_charts(runs, results):
            del results[name]  # made again, from its folder
    known = {name: result.iterations for name, result in results.items()}
    needed = {name for run in runs for name in run.depends_on}
    known |= {run.name: run.iterations for run in runs if run.is_part and run.name in needed}

    def keep(state: State) -> None:
        if state.run.is_part:  # asked for by itself: it leaves no AP
            return
        result = make_result(
            state.run,
            state.identity,
            seconds=state.seconds,
            peak=state.peak_mib,
            commit=state.commit,
        )
        if plan.results:
            write_result(plan.results, result)
        results[state.run.name] = result

    states = execute(
        runs,
        jobs=jobs,
        cores=environment.usable_cores(),
        gpus=gpus,
        reuse=True,  # what is to be done afresh was cleared away at the start
        known=known,
        go_on=True,
        on_finished=keep,
    )
    return results, {name: state.problem for name, state in states.items() if state.problem}


def lacking_charts(runs: Sequence[Run], results: Mapping[str, Result]) -> list[str]:
    """Names of results without their methods' charts, as earlier versions kept them, whose runs' folders are here."""
    folder_of = {run.name: run.folder for run in runs}
    return [
        run.name
        for run in runs
        if run.name in results
        and method_charts(run.methods)
        and not results[run.name].charts
        and is_finished(run, results[run.name].identity, folder_of)
    ]


def write_products(
    plan: Plan,
    entries: Sequence[Entry],
    choices: Sequence[tuning.Choice],
    problems: Mapping[str, str],
    output: Path,
) -> None:
    """Write the :data:`PRODUCTS` into the study's folder; a figure with nothing in it is left out.

    Args:
        problems: why runs are missing, by their names.
    """
    text = page(plan, entries, problems, choices)
    (output / "table.md").write_text(text, encoding="utf-8")
    write_curves(entries, output / "curves.svg")
    write_charts(entries, output / "charts.svg")
    found = {
        "plan": str(plan.file),
        "versions": environment.versions(),
        "machine": environment.machine(),
        "variants": [entry.as_dict() for entry in entries],
        "equal_time": equal_time.as_dict(entries),
        "tuning": [choice.as_dict() for choice in choices],
        "missing": problems,
    }
    (output / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def tell_missing(count: int, problems: Mapping[str, str]) -> int:
    """Say what failed; the exit status."""
    if not problems:
        return 0
    print(f"\n{len(problems)} of {count} runs are missing:")
    for name, why in problems.items():
        print(f"  {name}: {why}")
    return FAILED


def find_plan(study: str, root: Path) -> Path:
    """The plan's file, by a name in ``studies/`` or a path.

    Raises:
        UserError: it is neither.
    """
    named = root / "studies" / f"{study}.yaml"
    for path in (named, Path(study).expanduser()):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in named.parent.glob("*.yaml")))
    raise UserError(
        f"there is no study {study!r}: name one of {known}, or the path of a YAML file."
    )


def given_teacher(plan: Plan, weights: Path | None) -> dict[str, Path]:
    """The checkpoint that ``--teacher`` names, by the name of the plan's teacher.

    Raises:
        UserError: it is no file, or it is not clear which teacher it is.
    """
    if weights is None:
        return {}
    weights = weights.expanduser().resolve()
    if not weights.is_file():
        raise UserError(
            f"--teacher {weights} is no file: name a trained teacher's model_final.pth."
        )
    if len(plan.teachers) != 1:
        raise UserError(
            f"--teacher is for a plan that trains one: {plan.file} trains {len(plan.teachers)}; leave the "
            "option out."
        )
    return {plan.teachers[0].name: weights}
