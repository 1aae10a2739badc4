"""What ``tools/train_net.py`` does: set up, check everything that can be checked first, then run."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing.spawn import ProcessExitedException

from era import compat
from era.engine.evaluation import evaluate, evaluate_teacher
from era.engine.preflight import (
    build_for_evaluation,
    check_data,
    preflight,
    setup_config,
)
from era.engine.trainer import Trainer
from era.errors import UserError
from era.modeling.distiller import Distiller

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2

EPILOG = """
examples:
  distil on 8 GPUs:        %(prog)s --config-file configs/era_r101_r50.yaml --num-gpus 8
  the same on one GPU:     %(prog)s --config-file configs/era_r101_r50.yaml SOLVER.ACCUMULATION_STEPS 8
  on the CPU, shortened:   %(prog)s --config-file configs/toy/era.yaml SOLVER.MAX_ITER 20
  go on after a stop:      %(prog)s --config-file ... --resume
  evaluate:                %(prog)s --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

Trailing KEY VALUE pairs override the config; README.md lists this project's keys.
"""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command-line tool's main; a user's mistake becomes one sentence and exit status 2."""
    try:
        sys.exit(main() or 0)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's launcher flags, with this project's examples."""
    parser = default_argument_parser(epilog=EPILOG)
    parser.description = (
        "Train or evaluate: distilled students, teachers and plain baselines, by config."
    )
    return parser


def train_net(argv: list[str] | None = None) -> None:
    """Parse, check, launch.

    Everything that can be wrong is checked here, before a process is spawned or a file is written.

    Raises:
        UserError: one sentence for a user's mistake.
    """
    args = argument_parser().parse_args(argv)
    setup_logger(name="era")
    cfg = setup_config(args)
    preflight(cfg, args)
    try:
        launch(
            run_process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as e:  # a spawned process told its user error and left
        sys.exit(e.exit_code)


def run_process(args: argparse.Namespace) -> dict | None:
    """One process of a run: train, or evaluate only. Called by the launcher in every process.

    Returns:
        The last evaluation's metrics on the main process.
    """
    try:
        cfg = setup_config(args)
        check_data(cfg, for_training=not args.eval_only)  # datasets are registered in every process
        if cfg.MODEL.DEVICE == "cpu":
            # Subnormal gradients, such as early in training, make torchvision's ROIAlign 10 to 20 times slower.
            torch.set_flush_denormal(True)
        default_setup(cfg, args)
        logging.getLogger("era").handlers.clear()  # from here on it writes into the run's log too
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="era")
        if args.eval_only:
            model = build_for_evaluation(cfg, resume=args.resume)
            results = evaluate(cfg, model)
            if cfg.TEST.EVAL_TEACHER and isinstance(model, Distiller):
                results["teacher"] = evaluate_teacher(cfg, model)
            return results
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        return compat.last_evaluation(trainer)
    except UserError as e:
        if comm.get_world_size() == 1:
            raise
        if comm.is_main_process():
            print(f"error: {e}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
