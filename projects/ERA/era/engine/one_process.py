"""What one process of ``tools/train_net.py`` does once it has met the others: train or evaluate, and say how that ended."""

from __future__ import annotations

import argparse
import errno
import logging
import re
import signal
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from era import compat
from era.checkpoint.writing import cannot_be_written
from era.data.pictures import UnreadablePicture
from era.engine.evaluation import evaluate, evaluate_teacher
from era.engine.preflight import build_for_evaluation, check_data, setup_config
from era.engine.stopping import how_to_go_on, name_of
from era.engine.trainer import Trainer
from era.errors import UserError
from era.modeling.distiller import Distiller

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
EXIT_FAILED = 1
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or a user's part of it


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
    except RuntimeError as e:
        if not (number := _loader_signal(e)):
            raise
        who = f"a process of the data loader of rank {comm.get_rank()}"
        print(f"error: {killed_sentence(who, number)}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except FloatingPointError as e:  # in all processes together, or in this one alone
        if getattr(e, "is_told", True):
            reason = " ".join(str(e).split())
            print(
                f"error: training diverged: {reason}; nothing was saved after that: go on with --resume from "
                "the last checkpoint, or start again with a lower SOLVER.BASE_LR, a longer "
                "SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED True.",
                file=sys.stderr,
            )
        together = getattr(e, "together", False)
    # The error is gone here, and with its frames the model, which holds the process group.
    if dist.is_initialized() and together:
        compat.leave_process_group()  # not before each has kept what it keeps
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


def _loader_signal(error: BaseException | None) -> int:
    """The signal that ended a process of torch's data loader, by the error about it; 0 for other errors."""
    names = {signal.strsignal(number): number for number in signal.Signals}
    while error is not None:
        found = re.match(r"DataLoader worker \(pid \d+\) is killed by signal: ([^.]*)", str(error))
        if found:
            return int(names.get(found[1], 0))
        error = error.__cause__ or error.__context__
    return 0


def has_lost_another(error: BaseException) -> bool:
    """Whether an error follows from the end of another process, about which the launcher tells."""
    return isinstance(error, RuntimeError) and "by peer" in str(error)


def _is_told(error: BaseException) -> bool:
    return (
        has_lost_another(error)
        or isinstance(error, (FloatingPointError, UserError))
        or _loader_signal(error) > 0
    )


def _without_traceback(record: logging.LogRecord) -> bool:
    # Detectron2 logs every end of training with its traceback; of what is told otherwise the log gets the sentence.
    if record.exc_info and _is_told(record.exc_info[1]):
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


def killed_sentence(who: str, number: int) -> str:
    """That a process of the run was killed by a signal, why that mostly is, and how to go on."""
    causes = {
        signal.SIGKILL: "mostly by the system for want of memory, which `dmesg` tells: lower DATALOADER.NUM_WORKERS or "
        "SOLVER.IMS_PER_BATCH",
        signal.SIGBUS: "mostly because /dev/shm is full: make it larger or lower DATALOADER.NUM_WORKERS",
    }
    cause = causes.get(number, "which is a fault in native code, or somebody sent it")
    return (
        f"{who} was killed by {name_of(number)}, {cause}. The other processes of this machine are ended and what was "
        f"saved is whole. {how_to_go_on()}"
    )
