"""What ``tools/train_net.py`` does: set up, check everything that can be checked first, then run."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing.spawn import ProcessExitedException

from era.checkpoint import SafeCheckpointer
from era.config import load_config, student_config, validate_config
from era.distiller import Distiller
from era.errors import UserError
from era.trainer import (
    Trainer,
    check_data,
    evaluate,
    evaluate_teacher,
    scale_to_world,
    teacher_record,
    wants_inheritance,
)

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2

EPILOG = """
examples:
  distil on 8 GPUs:        %(prog)s --config-file configs/era_r101_r50.yaml --num-gpus 8
  the same on one GPU:     %(prog)s --config-file configs/era_r101_r50.yaml SOLVER.ACCUMULATION_STEPS 8
  on the CPU, shortened:   %(prog)s --config-file configs/toy/era.yaml SOLVER.MAX_ITER 20
  go on after a stop:      %(prog)s --config-file ... --resume
  evaluate:                %(prog)s --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
  another alpha:           ... --eval-only MODEL.WEIGHTS output/model_final.pth MODEL.ERA.ALPHA 1.0

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


def setup_config(args: argparse.Namespace) -> CfgNode:
    """The run's config: file, overrides, the device at hand, scaled to the processes at work.

    Raises:
        UserError: see :mod:`era.config` and :func:`era.trainer.scale_to_world`.
    """
    if args.num_gpus < 1 or args.num_machines < 1:
        raise UserError(
            f"--num-gpus is {args.num_gpus} and --num-machines {args.num_machines}: expected at least 1 "
            "each (on a machine without a GPU, --num-gpus counts CPU processes)."
        )
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No GPU on this machine: running on the CPU (MODEL.DEVICE cpu).")
        cfg.MODEL.DEVICE = "cpu"
    validate_config(cfg)
    world_size = args.num_gpus * args.num_machines
    if not args.eval_only:
        cfg = scale_to_world(cfg, world_size)
        cfg.defrost()
    if cfg.MODEL.DEVICE == "cpu" and world_size > 1:
        for key, norm in {
            "MODEL.ERA.NORM": cfg.MODEL.ERA.NORM,
            "MODEL.RESNETS.NORM": cfg.MODEL.RESNETS.NORM,
            "MODEL.FPN.NORM": cfg.MODEL.FPN.NORM,
        }.items():
            if norm == "SyncBN":
                raise UserError(
                    f"{key} is SyncBN, which torch cannot do in {world_size} CPU processes: use BN or GN, "
                    "or one process."
                )
    cfg.freeze()
    return cfg


def preflight(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check data, output folder, models and their weights before anything is written.

    The models are built once on the CPU and dropped: seconds, for a clear sentence instead of a traceback
    out of a spawned process an hour later.

    Raises:
        UserError: whatever is wrong first.
    """
    if cfg.MODEL.DEVICE != "cpu" and args.num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus is {args.num_gpus}, this machine has {torch.cuda.device_count()}: ask for at "
            "most that."
        )
    check_data(cfg, for_training=not args.eval_only)
    check_writable(cfg.OUTPUT_DIR)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    with _quiet("fvcore", "era"):  # the run itself will say all of it again
        if args.eval_only:
            build_for_evaluation(cfg, resume=args.resume)
        else:
            model = build_model(cfg)
            has_checkpoint = SafeCheckpointer(model, cfg.OUTPUT_DIR).has_checkpoint()
            if not (args.resume and has_checkpoint):
                SafeCheckpointer(model, save_to_disk=False).load(cfg.MODEL.WEIGHTS)


@contextmanager
def _quiet(*names: str):
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def check_writable(folder: str) -> None:
    """A folder in which files can be made; nothing is left behind.

    Raises:
        UserError: it cannot be written.
    """
    parent = os.path.abspath(folder)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    try:
        if not os.path.isdir(parent):
            raise NotADirectoryError(20, "a file of that name is in the way", parent)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        raise UserError(
            f"OUTPUT_DIR {folder} cannot be written ({e.strerror}: {parent}): expected a folder for this "
            "run's files; choose another with OUTPUT_DIR."
        ) from e


def build_for_evaluation(cfg: CfgNode, *, resume: bool) -> torch.nn.Module:
    """The model that ``--eval-only`` evaluates, with its weights.

    At alpha 0 without ``TEST.EVAL_TEACHER`` this is the plain student, and no teacher is needed. With
    ``resume`` the last checkpoint of ``OUTPUT_DIR`` is read instead of ``MODEL.WEIGHTS``.

    Raises:
        UserError: weights that cannot be read, or a distiller's checkpoint of another teacher.
    """
    needs_teacher = cfg.MODEL.META_ARCHITECTURE == "Distiller" and (
        cfg.MODEL.ERA.ALPHA > 0 or cfg.TEST.EVAL_TEACHER
    )
    model = build_model(cfg if needs_teacher else student_config(cfg))
    checkpointer = SafeCheckpointer(
        model, cfg.OUTPUT_DIR, save_to_disk=False, **teacher_record(model)
    )
    path = cfg.MODEL.WEIGHTS
    if resume and checkpointer.has_checkpoint():
        path = checkpointer.get_checkpoint_file()
    checkpointer.load(path)
    if needs_teacher and cfg.MODEL.ERA.ALPHA > 0 and not checkpointer.filled_methods:
        raise UserError(
            f"MODEL.WEIGHTS {path!r} holds no MBRNet: MODEL.ERA.ALPHA {cfg.MODEL.ERA.ALPHA} needs a "
            "checkpoint of a distilled run (OUTPUT_DIR/model_final.pth); name that, or set alpha 0."
        )
    return model


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
        if wants_inheritance(cfg):
            logger.info("The student will inherit the teacher's heads (INIT_STUDENT True).")
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        return getattr(trainer, "_last_eval_results", None)
    except UserError as e:
        if comm.get_world_size() == 1:
            raise
        if comm.is_main_process():
            print(f"error: {e}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
