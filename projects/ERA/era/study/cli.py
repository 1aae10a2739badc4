"""Studies on the toy data with several seeds: what ``tools/study.py`` does.

One teacher is trained once; every variant is then trained from every seed, as real processes of
``tools/train_net.py``, and the table gives every AP, the mean, and the time of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from era.config import load_config
from era.engine.preflight import check_data
from era.errors import UserError
from era.runs.execute import execute
from era.runs.metrics import read_ap, read_metrics, step_seconds
from era.runs.plan import HEADS, NOTHING, Run, prepare_folder
from era.runs.progress import Screen

ERA, PLAIN = "configs/toy/era.yaml", "configs/toy/plain.yaml"
NARROW, ALL = "MODEL.ERA.HIDDEN_CHANNELS", "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE"
NO_TWI = ("MODEL.ERA.TWI.RPN_WEIGHT", "0.0", "MODEL.ERA.TWI.ROI_WEIGHT", "0.0")
NO_BRANCHES = ("MODEL.ERA.NUM_BRANCHES", "0", "MODEL.ERA.SCALES", "[]")

# study: {variant: (label, config, overrides)}
STUDIES = {
    "equal_time": {
        "plain": ("plain student", PLAIN, ()),
        "era": ("ERA", ERA, ()),
        # "plain_equal_time" follows, with as many iterations as ERA's time allows
    },
    "narrow": {  # the same fractions of channels and proposals as 256 and 512 in a COCO model
        "h64_p32": ("64 of 64 hidden channels, 32 of 32 proposals", ERA, (NARROW, "64", ALL, "0")),
        "h16_p32": ("16 of 64, 32 of 32", ERA, (NARROW, "16", ALL, "0")),
        "h8_p32": ("8 of 64, 32 of 32", ERA, (NARROW, "8", ALL, "0")),
        "h16_p16": ("16 of 64, 16 of 32", ERA, (NARROW, "16", ALL, "16")),
        "h16_p8": ("16 of 64, 8 of 32", ERA, (NARROW, "16", ALL, "8")),
    },
    "parts": {
        "mimic": ("feature mimic alone", ERA, (*NO_BRANCHES, *NO_TWI)),
        "twi": ("mimic and TWI on e_0, no MBRNet", ERA, NO_BRANCHES),
        "residual": ("mimic and MBRNet, no TWI", ERA, NO_TWI),
        "era": ("ERA", ERA, ()),
        "era_kd": ("ERA and KD (w_k = 1)", ERA, ("MODEL.ERA.KD_WEIGHT", "1.0")),
        "gn": ("ERA, GroupNorm in the branches", ERA, ("MODEL.ERA.NORM", "GN")),
    },
}


def argument_parser() -> argparse.ArgumentParser:
    """Options of ``tools/study.py``."""
    parser = argparse.ArgumentParser(
        description="Train variants from several seeds on the generated toy data and compare their AP.",
        epilog="A study takes from half an hour to hours on two cores; --reuse goes on after a stop.",
    )
    parser.add_argument("study", choices=sorted(STUDIES), help="which comparison")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these of the study, by the names "
                        "of its folders, e.g. h16_p32 h16_p8; default all")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    parser.add_argument("--output", type=Path, help="folder; default output/study/<study>")
    parser.add_argument("--teacher", type=Path, help="a trained teacher's model_final.pth to use")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; default 2")
    parser.add_argument("--reuse", action="store_true", help="keep complete runs")
    return parser


def choose(name: str, variants: Sequence[str] | None) -> dict[str, tuple]:
    """A study, or some of its variants.

    Raises:
        UserError: the study has no such variant.
    """
    study = STUDIES[name]
    unknown = sorted(set(variants or ()) - set(study))
    if unknown:
        raise UserError(
            f"--variants names {', '.join(unknown)}: the study {name} has {', '.join(study)}."
        )
    return {key: value for key, value in study.items() if not variants or key in variants}


def make_runs(study: dict, seeds: Sequence[int], output: Path, teacher: Path | None) -> list[Run]:
    """The study's runs; a run of the teacher first, unless there is one already."""
    weights = teacher or output / "teacher" / "model_final.pth"
    runs = []
    if teacher is None:
        runs.append(_run("teacher", "teacher", "configs/toy/teacher.yaml", (), output, 2.0))
    for name, (label, config, opts) in study.items():
        for seed in seeds:
            own = ("SEED", str(seed), "MODEL.TEACHER.WEIGHTS", str(weights), *opts)
            after = None if teacher or config == PLAIN else "teacher"
            cost = 1.0 if config == PLAIN else 2.0
            runs.append(_run(f"{name}_seed{seed}", label, config, own, output, cost, after))
    return runs


def _run(name, label, config, opts, output, cost, after=None) -> Run:
    folder = output / name
    opts = ("OUTPUT_DIR", str(folder), *opts)
    cfg = load_config(config, opts)
    return Run(
        name=name,
        label=label,
        config_file=config,
        opts=opts,
        folder=folder,
        iterations=cfg.SOLVER.MAX_ITER,
        cost=cost,
        inherited=HEADS if cfg.MODEL.DISTILLER.INIT_STUDENT != "none" else NOTHING,
        depends_on=after,
        command=(sys.executable, "-u", "tools/train_net.py", "--config-file", config, *opts),
    )


def summarise(study: dict, seeds: Sequence[int], runs: Sequence[Run]) -> list[dict]:
    """One entry a variant: AP by seed, their mean and range, ms per step (median), iterations."""
    by_name = {run.name: run for run in runs}
    entries = []
    for name, (label, _, _) in study.items():
        own = [by_name[f"{name}_seed{seed}"] for seed in seeds]
        aps = [read_ap(run)["AP"] for run in own]
        steps = [step_seconds(read_metrics(run.folder)) for run in own]
        entries.append(
            {
                "name": name,
                "label": label,
                "inherited": own[0].inherited,
                "iterations": own[0].iterations,
                "ap": aps,
                "mean": statistics.mean(aps),
                "step_ms": 1000 * statistics.median(s for s in steps if s),
            }
        )
    return entries


def equal_time_variant(entries: Sequence[dict]) -> dict:
    """The plain student with as many iterations as fit into ERA's training time, by measured steps."""
    plain, era = (next(e for e in entries if e["name"] == n) for n in ("plain", "era"))
    iterations = round(era["iterations"] * era["step_ms"] / plain["step_ms"])
    label = (
        f"plain student for ERA's time ({era['step_ms'] / plain['step_ms']:.2f} times the steps)"
    )
    return {"plain_equal_time": (label, PLAIN, ("SOLVER.MAX_ITER", str(iterations)))}


def markdown(entries: Sequence[dict], seeds: Sequence[int]) -> str:
    """The table."""
    head = "| variant | inherited | iterations | ms a step | " + " | ".join(
        f"AP, seed {s}" for s in seeds
    )
    lines = [head + " | mean |", "| --- " * (5 + len(seeds)) + "|"]
    for e in entries:
        aps = " | ".join(f"{ap:.1f}" for ap in e["ap"])
        lines.append(
            f"| {e['label']} | {e['inherited']} | {e['iterations']} | {e['step_ms']:.0f} | {aps} | "
            f"{e['mean']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None, *, root: Path) -> int:
    """Run a study; ``table.md`` and ``results.json`` in its folder, the table on the screen.

    Args:
        root: top of the repository.

    Raises:
        UserError: options that do not fit, a folder that is not the study's, a run that failed.
    """
    args = argument_parser().parse_args(argv)
    output = (args.output or root / "output" / "study" / args.study).expanduser().resolve()
    teacher = args.teacher.expanduser().resolve() if args.teacher else None
    if teacher and not teacher.is_file():
        raise UserError(
            f"--teacher {teacher} is no file: name a trained teacher's model_final.pth."
        )
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}: expected at least 1.")
    study = choose(args.study, args.variants)
    os.chdir(root)
    runs = make_runs(study, args.seeds, output, teacher)
    lock = prepare_folder(output, reuse=args.reuse)
    try:
        cfg = load_config(PLAIN)
        check_data(cfg, for_training=True)  # makes the toy data once, before all runs
        options = {"jobs": args.jobs, "cores": os.cpu_count() or 1, "reuse": args.reuse}
        execute(runs, screen=Screen(), **options)
        entries = summarise(study, args.seeds, runs)
        if {"plain", "era"} <= set(study):
            longer = equal_time_variant(entries)
            more = [
                r for r in make_runs(longer, args.seeds, output, teacher) if r.name != "teacher"
            ]
            execute(more, screen=Screen(), **options)
            entries += summarise(longer, args.seeds, more)
        table = markdown(entries, args.seeds)
        (output / "table.md").write_text(table, encoding="utf-8")
        (output / "results.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    finally:
        lock.close()
    print(table)
    return 0
