"""``tools/benchmark.py``: parse, measure, print, write."""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import multiprocessing
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode

from era.benchmark import report
from era.benchmark.grow import grow
from era.benchmark.measure import measure, profile_rows, progress, reports, resident_growth
from era.benchmark.rows import (
    COMPILE,
    FLOOR,
    INFERENCE,
    TEACHER,
    Bench,
    base_of,
    other_methods,
    plan,
    run_name,
)
from era.config import load_config, validate_config
from era.errors import UserError
from era.registry import forget_parts, is_distiller, methods_of, set_alpha

DESCRIPTION = """\
What a distillation step costs, beside the floor of any distillation: one plain student step and one
teacher forward without gradient (backbone and FPN, whose maps every feature method needs).

Random weights, synthetic images, real anchors: it needs no data and no download. Rows take turns, and a
ratio is the median of the ratios of single rounds, so that a machine that gets slower favours nobody.
"""
EPILOG = """\
examples:
  the table at 800x1344:           %(prog)s
  on a GPU, half precision:        %(prog)s --device cuda --precision float16
  small and soon:                  %(prog)s --height 320 --width 480 --repeats 3
  some rows (and the floor):       %(prog)s --rows "era" --rows "*all proposals"
  another run's methods:           %(prog)s --config-file my_run.yaml
  every method, a row each:        %(prog)s --all-methods
  growth with size and batch:      %(prog)s --grow
  where the time goes:             %(prog)s --profile profile.txt

Beside the config's methods together there are rows of each method's own: settings changed one at a time.
Trailing KEY VALUE pairs override the config, e.g. MODEL.DISTILLER.METHODS "('PKD',)".
"""
PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIZES = ("320x480", "480x800", "800x1344")


@dataclass(frozen=True)
class Options:
    """The command line with its defaults filled in; sizes in pixels, images a training step."""

    config_file: str
    opts: tuple[str, ...]
    device: str
    precision: str
    height: int
    width: int
    images: int
    warmup: int
    repeats: int
    threads: int
    all_methods: bool


def argument_parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", default="configs/era_r101_r50.yaml", help="default: %(default)s")
    add("--height", type=int, default=800, help="of the images, pixels (default: %(default)s)")
    add("--width", type=int, default=1344, help="of the images, pixels (default: %(default)s)")
    add("--images", type=int, help="a training step (default: 2 on a GPU, 1 on a CPU); "
        "inference takes 1")  # fmt: skip
    add("--device", default="", help="cpu or cuda (default: cuda if there is one)")
    add(
        "--precision", default="float32", help="float32, float16 or bfloat16 (default: %(default)s)"
    )
    add("--warmup", type=int, help="rounds that do not count (default: 5 on a GPU, 1 on a CPU)")
    add("--repeats", type=int, help="rounds that count (default: 20 on a GPU, 5 on a CPU)")
    add("--rows", action="append", metavar="PATTERN", help="only rows whose name matches, as in file "
        "names (* ?); may be repeated; the rows that ratios refer to are added")  # fmt: skip
    add("--threads", type=int, default=0, help="of torch on the CPU (default: torch's own choice)")
    add("--memory", action="store_true", help="on a CPU, measure peak memory too: growth of the "
        "resident set of a process of its own for every row; slow")  # fmt: skip
    add("--all-methods", action="store_true", help="also a row of every other method, alone, with the settings "
        "that the config gives it")  # fmt: skip
    add("--compile", action="store_true", help="also the rows with torch.compile, whose first step takes "
        "minutes; needs a C++ compiler")  # fmt: skip
    add("--grow", action="store_true", help="also tables over image size and batch")
    add("--grow-sizes", default=",".join(SIZES), metavar="HxW,...", help="default: %(default)s")
    add(
        "--profile",
        metavar="FILE",
        help="write a torch profile of one floor step and one of the run's methods",
    )
    add("--json", metavar="FILE", help="write everything that was measured")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print a table.

    Raises:
        UserError: an option or the config is wrong; nothing was measured then.
    """
    quiet()
    args = argument_parser().parse_args(argv)
    options = read_options(args)
    sizes = [read_size(text) for text in args.grow_sizes.split(",")]
    for flag, path in {"--json": args.json, "--profile": args.profile}.items():
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{flag} is {path}, whose folder does not exist: make it first.")
    if args.compile and not any(
        map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))
    ):
        raise UserError(
            "--compile needs a C++ compiler, and neither CXX, c++, g++ nor clang++ is here: install one."
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    cfg = prepare_config(options)
    device = torch.device(options.device)
    about = report.machine(device)

    progress("building student and teacher", None)
    bench = Bench(cfg, amp_dtype=PRECISIONS[options.precision])
    inputs = bench.batch(options.height, options.width, options.images)
    planned = plan(bench, inputs)
    if options.all_methods:
        other_methods(bench, inputs, planned)
    names = choose([n for n in planned.makers if args.compile or COMPILE not in n], args.rows)
    bases = [base_of(name) for name in names]
    names = [n for n in planned.makers if n in names or n in bases]
    settings = {
        **asdict(options),
        "command": shlex.join(["tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        "methods": {name: dict(cfg.MODEL[name.upper()]) for name in cfg.MODEL.DISTILLER.METHODS},
    }
    result = {
        "schema": 2,
        "machine": about,
        "settings": settings,
        "notes": planned.notes,
    }
    print(report.header(about, settings, result["notes"]), "\n", sep="", flush=True)

    times = measure(
        planned.make(names), device, warmup=options.warmup, repeats=options.repeats, title="rows"
    )
    if args.memory and device.type == "cpu":
        for row in times:
            progress(f"memory: {row.name}", None)
            row.peak_mib = row_memory(options, row.name)
        progress("", None)
    result["rows"] = reports(times, device)
    print(report.markdown(result["rows"], base="base"))
    print(
        f"\nBase of the ratios: `{FLOOR}`; of the inference rows, `{INFERENCE}`; of the teacher's "
        f"switches, `{TEACHER}`.",
        flush=True,
    )
    if args.profile:
        rows = planned.make([FLOOR, run_name(cfg)])
        Path(args.profile).write_text(profile_rows(rows, device), encoding="utf-8")
    if args.grow:
        result["grow"] = grow(
            bench,
            (options.height, options.width, options.images),
            sizes,
            warmup=options.warmup,
            repeats=options.repeats,
        )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def quiet() -> None:
    """Leave out what is known and meant: random weights, and torch's word about Detectron2's code."""
    for name in ("era.modeling.teacher", "era.methods.shared"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="torch.meshgrid|Warning: Profiler clears events")


def read_options(args: argparse.Namespace) -> Options:
    """Defaults that depend on the device, and checks.

    Raises:
        UserError: one sentence about the first wrong option.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is {device!r}: expected cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU here: use --device cpu.")
    if args.precision not in PRECISIONS:
        raise UserError(
            f"--precision is {args.precision!r}: expected one of {', '.join(PRECISIONS)}."
        )
    on_gpu = device == "cuda"
    defaults = {
        "images": 2 if on_gpu else 1,
        "warmup": 5 if on_gpu else 1,
        "repeats": 20 if on_gpu else 5,
    }
    numbers = {name: getattr(args, name) for name in ("height", "width", "threads", *defaults)}
    numbers.update({n: d for n, d in defaults.items() if numbers[n] is None})
    least = {"height": 64, "width": 64, "images": 1, "warmup": 0, "repeats": 1, "threads": 0}
    for name, value in numbers.items():
        if value < least[name]:
            raise UserError(f"--{name} is {value}: expected at least {least[name]}.")
    fixed = (args.config_file, tuple(args.opts), device, args.precision)
    return Options(*fixed, **numbers, all_methods=args.all_methods)


def read_size(text: str) -> tuple[int, int]:
    """Height and width in pixels from ``HxW``.

    Raises:
        UserError: it is not that.
    """
    parts = text.strip().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) >= 64 for p in parts):
        raise UserError(f"--grow-sizes has {text!r}: expected HxW of at least 64x64 pixels.")
    return int(parts[0]), int(parts[1])


def prepare_config(options: Options) -> CfgNode:
    """The distiller's config with random weights and learning rate 0.

    Raises:
        UserError: the config cannot be read or describes no distiller.
    """
    cfg = load_config(options.config_file, options.opts)
    if not is_distiller(cfg) or not cfg.MODEL.DISTILLER.METHODS:
        raise UserError(
            f"--config-file {options.config_file} describes a {cfg.MODEL.META_ARCHITECTURE} with "
            f"MODEL.DISTILLER.METHODS {list(cfg.MODEL.DISTILLER.METHODS)}: expected a Distiller with a method "
            "and a teacher, such as configs/era_r101_r50.yaml."
        )
    cfg.MODEL.DEVICE = options.device
    cfg.MODEL.WEIGHTS = cfg.MODEL.TEACHER.WEIGHTS = ""
    cfg.MODEL.TEACHER.ALLOW_RANDOM = True
    forget_parts(cfg)
    if any(method.alpha_key for method in methods_of(cfg).values()):
        set_alpha(cfg, 0.0)
    cfg.SOLVER.BASE_LR = 0.0
    validate_config(cfg)
    return cfg


def choose(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """The names that match a pattern, all of them if there is none.

    Raises:
        UserError: a pattern matches nothing.
    """
    if not patterns:
        return list(names)
    chosen = set()
    for pattern in patterns:
        found = [n for n in names if fnmatch.fnmatchcase(n.lower(), pattern.lower())]
        if not found:
            raise UserError(
                f"--rows is {pattern!r}, which matches no row: expected a pattern for one of "
                f"{'; '.join(names)}."
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def row_memory(options: Options, name: str) -> float:
    """Peak growth of the resident set, MiB, of a fresh process that builds one row and does 2 steps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_row_memory_here, (options, name))


def _row_memory_here(options: Options, name: str) -> float:
    quiet()
    if options.threads:
        torch.set_num_threads(options.threads)
    cfg = prepare_config(options)

    def build():
        bench = Bench(cfg, amp_dtype=PRECISIONS[options.precision])
        inputs = bench.batch(options.height, options.width, options.images)
        planned = plan(bench, inputs)
        if options.all_methods:
            other_methods(bench, inputs, planned)
        return planned.makers[name]()

    return resident_growth(build)
