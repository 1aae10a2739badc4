"""Studies of several seeds: what ``tools/study.py`` does.

A plan of ``studies/`` says what is trained; every variant is trained from every seed, and the table gives
every AP, the mean, the gain over the variant that it is compared with, and the time of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from era import environment
from era.engine.preflight import check_data
from era.errors import UserError
from era.runs import tables
from era.runs.execute import execute, interruptible
from era.runs.folder import prepare_folder
from era.runs.metrics import read_ap, read_metrics, step_seconds
from era.runs.plan import Run, make_runs
from era.runs.schema import Plan, read_plan

PRODUCTS = ("table.md", "results.json")


def argument_parser() -> argparse.ArgumentParser:
    """Options of ``tools/study.py``."""
    parser = argparse.ArgumentParser(
        description="Train variants from several seeds and compare their AP, as a plan says.",
        epilog="studies/demo.yaml explains the entries of a plan. A study takes from half an hour to hours "
        "on two cores; --reuse goes on after a stop.",
    )
    parser.add_argument(
        "study", help="a name in studies/, such as parts, or the path of a YAML file"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these of the study, by the names "
                        "of its runs, and what they need; default all")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the plan's")
    parser.add_argument("--output", type=Path, help="folder; default output/study/<study>")
    parser.add_argument("--teacher", type=Path, help="a trained teacher's model_final.pth to use")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; default 2")
    parser.add_argument("--reuse", action="store_true", help="keep complete runs")
    return parser


@dataclass(frozen=True)
class Entry:
    """Results of one variant. AP in points of 100."""

    name: str
    label: str
    inherited: str
    iterations: int  # optimiser steps; 0 = evaluation only
    seeds: tuple[int | None, ...]
    ap: tuple[float, ...]  # by seed
    mean: float
    gain: float | None  # over the mean of the variant that it is compared with, if there is one
    step_ms: float | None  # median of the runs' medians


def summarise(plan: Plan, runs: Sequence[Run]) -> list[Entry]:
    """One entry a variant that is no teacher, in the plan's order.

    Raises:
        UserError: a run left no evaluation.
    """
    by_variant: dict[str, list[Run]] = {}
    for run in runs:
        if not run.is_teacher:
            by_variant.setdefault(run.variant, []).append(run)
    ap = {name: [read_ap(run)["AP"] for run in own] for name, own in by_variant.items()}
    mean = {name: statistics.mean(values) for name, values in ap.items()}
    entries = []
    for name, own in by_variant.items():
        steps = [step_seconds(read_metrics(run.folder)) for run in own]
        measured = [1000 * seconds for seconds in steps if seconds is not None]
        reference = mean.get(plan.compare.get(name, ""))
        entries.append(
            Entry(
                name=name,
                label=own[0].label,
                inherited=own[0].inherited,
                iterations=own[0].iterations,
                seeds=tuple(run.seed for run in own),
                ap=tuple(ap[name]),
                mean=mean[name],
                gain=None if reference is None else mean[name] - reference,
                step_ms=statistics.median(measured) if measured else None,
            )
        )
    return entries


def table(plan: Plan, entries: Sequence[Entry]) -> str:
    """The entries as a Markdown table."""
    labels = {entry.name: entry.label for entry in entries}
    seeds = [f"AP, seed {seed}" if seed is not None else "AP" for seed in entries[0].seeds]
    headings = ["variant", "inherited", "iterations", "ms a step", *seeds, "mean", "gain", "over"]
    rows = []
    for entry in entries:
        reference = labels.get(plan.compare.get(entry.name, ""), "")
        rows.append(
            [
                *(entry.label, entry.inherited, str(entry.iterations)),
                tables.number(entry.step_ms, ".0f"),
                *(tables.number(ap, ".1f") for ap in (*entry.ap, entry.mean)),
                tables.number(entry.gain, "+.1f"),
                reference,
            ]
        )
    return tables.markdown(headings, rows, texts=2)


def main(argv: Sequence[str] | None = None, *, root: Path) -> int:
    """Run a study; ``table.md`` and ``results.json`` in its folder, the table on the screen.

    Args:
        root: top of the repository.

    Returns:
        Exit status.

    Raises:
        UserError: options or a plan that do not fit, a folder that is not the study's, a run that failed.
    """
    args = argument_parser().parse_args(argv)
    plan = read_plan(find_plan(args.study, root))
    output = (args.output or root / "output" / "study" / plan.name).expanduser().resolve()
    given = given_teacher(plan, args.teacher)
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}: expected at least 1.")
    if args.seeds and (min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds)):
        raise UserError(f"--seeds is {args.seeds}: expected different numbers from 0 on.")
    os.chdir(root)
    runs = make_runs(plan, output, seeds=args.seeds or (), only=args.variants, given=given)
    with (
        prepare_folder(output, runs=runs, products=PRODUCTS, reuse=args.reuse),
        interruptible(output),
    ):
        check_data(runs[0].config, for_training=True)  # makes the toy data once, before all runs
        states = execute(runs, jobs=args.jobs, cores=environment.usable_cores(), reuse=args.reuse)
        entries = summarise(plan, [state.run for state in states.values()])
        text = table(plan, entries)
        (output / "table.md").write_text(f"# {plan.title}\n\n{text}\n", encoding="utf-8")
        results = {
            "plan": str(plan.file),
            "versions": environment.versions(),
            "machine": environment.machine(),
            "variants": [asdict(entry) for entry in entries],
        }
        (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(text)
    return 0


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
