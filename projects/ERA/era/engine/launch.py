"""What ``tools/train_net.py`` does: set up, check everything that can be checked first, then run."""

from __future__ import annotations

import argparse
import errno
import logging
import re
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

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
from era.engine.processes import Launch, Outcome, is_stop, run_processes, stopped_sentence
from era.engine.stopping import (
    EXIT_SIGNAL,
    STOP_SIGNALS,
    Stopped,
    how_to_go_on,
    name_of,
    stop_signals,
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

Ctrl-C, SIGTERM and SIGUSR1 finish the step at work, write a checkpoint and print the command that goes on.

exit status:
  0     done
  1     failed, as after a loss that is not finite (tools/replay_step.py shows why) or a process that was killed
  2     a mistake in the command, the config or the data, told in one sentence
  128+n asked to stop by signal n: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1; go on with --resume

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
        "--stop-signals",
        default=STOP_SIGNALS,
        metavar="NAMES",
        help="signals that ask to stop as Ctrl-C does, such as the one of sbatch --signal; comma-separated "
        "(default %(default)s)",
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
        SystemExit: training diverged, was asked to stop, or a spawned process failed; the sentence is on standard
            error.
    """
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.num_machines == 1 and args.dist_url == parser.get_default("dist_url"):
        args.dist_url = "auto"  # Detectron2's own default is one port for all runs of a user
    setup_logger(name="era")
    try:
        with stop_signals(args.stop_signals):
            cfg = setup_config(args)
            preflight(cfg, args)
            launch_processes(run_process, args)
    except Stopped as e:
        print(e, file=sys.stderr)
        sys.exit(e.status)


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
    if args.num_gpus * args.num_machines == 1:
        function(args)
        return
    how = Launch(
        args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args.stop_signals
    )
    for attempt in range(1, PORT_ATTEMPTS + 1):
        outcome = run_processes(function, (args,), how)
        is_taken = "init_process_group" in outcome.traceback and "EADDRINUSE" in outcome.traceback
        if args.dist_url == "auto" and is_taken and attempt < PORT_ATTEMPTS:
            logger.info("Somebody else has taken the port: trying another one.")
            continue
        _leave_as(outcome, args, is_taken=is_taken)
        return


def _leave_as(outcome: Outcome, args: argparse.Namespace, *, is_taken: bool) -> None:
    """End this program as the processes of the run ended; return if they are done."""
    first, traceback = outcome.first, outcome.traceback
    if outcome.at_once or (outcome.asked and traceback):
        print(stopped_sentence(outcome), file=sys.stderr)
        sys.exit(EXIT_SIGNAL + outcome.asked)
    if first is None:
        stopped = [code for code in outcome.codes if is_stop(code)]
        if stopped and args.machine_rank == 0 and not is_stop(outcome.codes[0]):
            print(stopped_sentence(outcome), file=sys.stderr)
        if stopped:
            sys.exit(stopped[0])
        return
    code = outcome.codes[first]
    rank = args.machine_rank * args.num_gpus + first
    if code < 0:
        print(
            f"error: {_killed(f'process {rank} of the run (rank {rank})', -code)}", file=sys.stderr
        )
        sys.exit(EXIT_FAILED)
    if not traceback:  # it told what is wrong and left
        sys.exit(code)
    raised = ProcessRaisedException(
        f"\n\n-- Process {rank} terminated with the following error:\n{traceback}", first, -1
    )
    if "init_process_group" not in traceback:
        raise raised
    reason = "the port is in use" if is_taken else traceback.strip().splitlines()[-1][:200]
    raise UserError(
        f"the processes cannot meet at --dist-url {args.dist_url} ({reason}): expected "
        "tcp://HOST:PORT, a free port of machine 0 that all machines reach; name another, or "
        "leave --dist-url out on a single machine."
    ) from raised


def _killed(who: str, number: int) -> str:
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
        print(f"error: {_killed(who, number)}", file=sys.stderr)
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


def _is_told(error: BaseException) -> bool:
    lost_another = isinstance(error, RuntimeError) and "by peer" in str(error)  # the launcher tells
    return (
        lost_another
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
