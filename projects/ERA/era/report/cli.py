"""``tools/report.py``: parse, measure latency if asked for, write the report."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from era.errors import UserError
from era.report.deployed import EAGER, measure
from era.report.publish import LICENCE_WORD, publish
from era.report.write import PICTURES, write_report

DESCRIPTION = """\
Write one HTML file about one or several runs: headline table, AP by class and object size, training
curves, the pictures in which distillation changed the outcome most, with boxes and masks that can be
switched on and off, and size and latency of exported models. The file needs no network and no
server: open it, or send it to somebody.
"""
EPILOG = """\
examples:
  plain against distilled: %(prog)s output/plain output/distilled --teacher output/teacher
  with names of your own:  %(prog)s runs/a runs/b --labels "Plain R50" "Distilled R50" --output r50.html
  with exported models:    %(prog)s output/plain output/distilled --deployed onnx openvino --latency 50
  one run alone:           %(prog)s output/distilled
  as a model of the Hub:   %(prog)s output/plain output/distilled --publish my-r18 --license apache-2.0

what it reads:
  of each run             config.yaml, metrics.json, inference/coco_instances_results.json; so the run
                          must have been evaluated, which every training with a DATASETS.TEST ends with
  of its config           DATASETS.TEST, for the pictures (from DETECTRON2_DATASETS, as in training);
                          where the data is not at hand the report says so and has no pictures
  the teacher             --teacher RUN, or what TEST.EVAL_TEACHER left in a distilled run

The first run is the baseline. Pictures compare it with the first distilled run after it. Gains are counted
from the baseline; those of a distilled run that started from weights of the teacher from a plain run
that started from the same ones, where there is one.
"""


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of ``tools/report.py``."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="OUTPUT_DIR of a run; first the baseline"
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="a name a run (default: the folders' names)"
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="RUN", help="OUTPUT_DIR of the teacher's run"
    )
    parser.add_argument(
        "--deployed",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="deployment folders that tools/export.py made",
    )
    parser.add_argument(
        "--latency",
        type=int,
        default=0,
        metavar="N",
        help="time N calls of every deployment folder, and of eager where its checkpoint is still there",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="FOLDER",
        help="also write the last run's student there as the Hugging Face Hub lays detectors out: model card with these figures, "
        "config, weights in safetensors; hf://FOLDER reads it back",
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="NAME",
        help=f"with --publish, of the weights: {LICENCE_WORD}",
    )
    parser.add_argument("--title", default="Distillation report", help="default: %(default)s")
    parser.add_argument(
        "--pictures",
        type=int,
        default=PICTURES,
        metavar="N",
        help="at most so many; a third of them are losses of distillation (default: %(default)s)",
    )
    return parser


def report_main(argv: Sequence[str] | None = None) -> None:
    """``tools/report.py``.

    Raises:
        UserError: one sentence for a user's mistake.
    """
    args = argument_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if args.latency < 0:
        raise UserError(f"--latency is {args.latency}: expected a number of calls, or 0 for none.")
    if args.latency and not args.deployed:
        raise UserError("--latency has nothing to time without --deployed: name a folder there.")
    if bool(args.publish) != bool(args.license):
        raise UserError(
            f"--publish FOLDER and --license NAME belong together: name both, the licence as {LICENCE_WORD}."
        )
    times = None
    if args.latency:
        times = measure(args.deployed, args.latency, eager=eager_of(args.deployed[0]))
    path = write_report(
        args.runs,
        args.output,
        labels=args.labels,
        teacher=args.teacher,
        deployed=args.deployed,
        latency=times,
        title=args.title,
        pictures=args.pictures,
    )
    timed = (
        f", eager {'beside' if EAGER in times else 'not found for'} the exports" if times else ""
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB{timed}")
    if args.publish:
        folder = publish(
            args.runs, args.publish, licence=args.license, labels=args.labels, teacher=args.teacher
        )
        print(
            f"{folder}: a model card, a config and weights; hf://{folder} stands for them wherever weights are named"
        )


def eager_of(folder: Path):
    """Eager as the folder's manifest names its source, if that is still there and the same; else None.

    Raises:
        UserError: the folder is no deployment folder.
    """
    from era.deploy.evaluate import argument_parser as evaluate_arguments
    from era.deploy.evaluate import eager_predictor
    from era_runtime import DeploymentError
    from era_runtime.manifest import read_manifest

    try:
        manifest = read_manifest(folder)
    except DeploymentError as e:
        raise UserError(str(e)) from e
    return eager_predictor(evaluate_arguments().parse_args([str(folder)]), manifest)
