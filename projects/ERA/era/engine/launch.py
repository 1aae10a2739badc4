"""What ``tools/train_net.py`` does: set up, check everything that can be checked first, then run."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from era import compat
from era.checkpoint.writing import cannot_be_written
from era.data.pictures import UnreadablePicture
from era.engine.evaluation import evaluate, evaluate_teacher
from era.engine.preflight import (
    build_for_evaluation,
    check_data,
    preflight,
    setup_config,
)
from era.engine.trainer import Trainer
from era.errors import UserError
from era.methods.listing import methods_table
from era.modeling.distiller import Distiller

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_FAILED = 1
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or a user's part of it
PORT_ATTEMPTS = 5

EPILOG = """
examples:
  distil on 8 GPUs:        %(prog)s --config-file configs/era_r101_r50.yaml --num-gpus 8
  the same on one GPU:     %(prog)s --config-file configs/era_r101_r50.yaml SOLVER.ACCUMULATION_STEPS 8
  on the CPU, shortened:   %(prog)s --config-file configs/toy/era.yaml SOLVER.MAX_ITER 20
  go on after a stop:      %(prog)s --config-file ... --resume
  evaluate:                %(prog)s --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
  what can be distilled:   %(prog)s --list-methods

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
    parser.add_argument(
        "--list-methods",
        action=ListMethods,
        nargs=0,
        help="print the distillation methods for MODEL.DISTILLER.METHODS: idea, needs, paper",
    )
    return parser


class ListMethods(argparse.Action):
    """Prints the methods and ends the program, as ``--help`` does."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """See :func:`era.methods.listing.methods_table`."""
        print(methods_table())
        parser.exit()


def train_net(argv: list[str] | None = None) -> None:
    """Parse, check, launch.

    Everything that can be wrong is checked here, before a process is spawned or a file is written.

    Raises:
        UserError: one sentence for a user's mistake.
        SystemExit: training diverged, or a spawned process failed; the sentence is on standard error.
    """
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.num_machines == 1 and args.dist_url == parser.get_default("dist_url"):
        args.dist_url = "auto"  # Detectron2's own default is one port for all runs of a user
    setup_logger(name="era")
    cfg = setup_config(args)
    preflight(cfg, args)
    launch_processes(run_process, args)


def launch_processes(
    function: Callable[[argparse.Namespace], object], args: argparse.Namespace
) -> None:
    """Run ``function(args)`` in this machine's processes of a run; with one in all, right here.

    Args:
        function: at the module level of an importable module, for the processes import it.
        args: of :func:`argument_parser`. With ``dist_url`` "auto" the processes of one machine meet at a
            free port, at another one if somebody takes it first.

    Raises:
        UserError: the processes cannot meet at ``dist_url``.
        SystemExit: a process left with a status, having told why.
    """
    if args.dist_url == "auto" and args.num_machines > 1:
        raise UserError(
            f"--dist-url is auto with --num-machines {args.num_machines}: expected the same "
            "tcp://HOST:PORT of machine 0 on all of them; name it."
        )
    for attempt in range(1, PORT_ATTEMPTS + 1):
        try:
            launch(
                function,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
            return
        except ProcessExitedException as e:
            if not e.signal_name:  # it told what is wrong and left
                sys.exit(e.exit_code)
            print(
                f"error: process {e.error_index} of the run was killed by {e.signal_name}: go on with "
                "--resume (SIGKILL often means that memory ran out).",
                file=sys.stderr,
            )
            sys.exit(EXIT_FAILED)
        except ProcessRaisedException as e:
            if "init_process_group" not in e.msg:
                raise
            is_taken = "EADDRINUSE" in e.msg
            if args.dist_url == "auto" and is_taken and attempt < PORT_ATTEMPTS:
                logger.info("Somebody else has taken the port: trying another one.")
                continue
            reason = "the port is in use" if is_taken else e.msg.strip().splitlines()[-1][:200]
            raise UserError(
                f"the processes cannot meet at --dist-url {args.dist_url} ({reason}): expected "
                "tcp://HOST:PORT, a free port of machine 0 that all machines reach; name another, or "
                "leave --dist-url out on a single machine."
            ) from e


def run_process(args: argparse.Namespace) -> dict | None:
    """One process of a run: train, or evaluate only. Called by the launcher in every process.

    Returns:
        The last evaluation's metrics on the main process.

    Raises:
        UserError: in a run of one process; one of several prints it.
        SystemExit: training diverged, or a user's mistake in a run of several processes.
    """
    try:
        with _full_disk_in_one_sentence():
            results = _train_or_evaluate(args)
        if dist.is_initialized():
            compat.leave_process_group()
        return results
    except UserError as e:
        if comm.get_world_size() == 1:
            raise
        if comm.is_main_process() or isinstance(e, UnreadablePicture):
            print(f"error: {e}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except FloatingPointError as e:  # of Detectron2, or of StepTrainer; maybe in this process alone
        reason = " ".join(str(e).split())
        print(
            f"error: training diverged ({reason}); nothing was saved after that: go on with --resume from "
            "the last checkpoint, or start again with a lower SOLVER.BASE_LR, a longer "
            "SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED True.",
            file=sys.stderr,
        )
        sys.exit(EXIT_FAILED)


@contextmanager
def _full_disk_in_one_sentence():
    """Whatever a full disk kept from being written, a UserError; the first that was, for others follow.

    What the log cannot take is dropped without a traceback each.
    """
    logged, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            raise
        earlier = e.__context__
        while earlier is not None and not isinstance(earlier, UserError):
            earlier = earlier.__context__
        raise (earlier or cannot_be_written(e.filename or "a file of OUTPUT_DIR", e)) from e
    finally:
        logging.raiseExceptions = logged


def _without_traceback(record: logging.LogRecord) -> bool:
    # Detectron2 logs what ends training with its traceback; the log gets the sentence alone where there is one.
    if record.exc_info and isinstance(record.exc_info[1], (FloatingPointError, UserError)):
        record.msg, record.exc_info = f"{record.msg} {record.exc_info[1]}", None
    return True


def _train_or_evaluate(args: argparse.Namespace) -> dict | None:
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
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    return compat.last_evaluation(trainer)
