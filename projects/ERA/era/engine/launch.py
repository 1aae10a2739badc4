"""What ``tools/train_net.py`` does: set up, check everything that can be checked first, then start the processes or be one."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch.distributed as dist
from detectron2.engine import default_argument_parser
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

from era.engine.launchers import TORCHRUN, Place, take_place
from era.engine.one_process import (
    EXIT_FAILED,
    EXIT_USER_ERROR,
    has_lost_another,
    killed_sentence,
    run_process,
)
from era.engine.preflight import preflight, setup_config
from era.engine.processes import (
    GRACE_SECONDS,
    Launch,
    Outcome,
    end_with,
    is_stop,
    run_processes,
    stopped_sentence,
    take_part,
)
from era.engine.stopping import EXIT_SIGNAL, STOP_SIGNALS, Stopped, how_to_go_on, stop_signals
from era.errors import UserError
from era.methods.listing import methods_table

logger = logging.getLogger(__name__)

PORT_ATTEMPTS = 5

EPILOG = """
examples:
  distil on 8 GPUs:        %(prog)s --config-file configs/era_r101_r50.yaml --num-gpus 8
  by torchrun, or SLURM:   torchrun --nproc-per-node 8 %(prog)s --config-file ...     (srun python %(prog)s ...)
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

Trailing KEY VALUE pairs override the config; docs/config.md lists this project's keys.
"""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command-line tool's main; a user's mistake becomes one sentence and exit status 2."""
    try:
        sys.exit(main() or 0)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # whoever read the output has enough of it, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


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
    start(parser.parse_args(argv), parser)


def start(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """As :func:`train_net`, of arguments that are parsed.

    Args:
        parser: whose they are.
    """
    place = take_place(args, parser)
    if place is None and args.num_machines == 1 and args.dist_url == parser.get_default("dist_url"):
        args.dist_url = "auto"  # Detectron2's own default is one port for all runs of a user
    setup_logger(name="era", distributed_rank=place.rank if place else 0)
    try:
        with stop_signals(args.stop_signals, in_worker=place is not None):
            with _told_by_the_first(place):
                cfg = setup_config(args)
                preflight(cfg, args)
            if place is None or args.num_gpus * args.num_machines == 1:
                launch_processes(run_process, args)
            else:
                join_processes(run_process, args, place)
    except Stopped as e:
        if place is None or place.rank == 0:
            print(e, file=sys.stderr)
        sys.exit(e.status)


@contextmanager
def _told_by_the_first(place: Place | None):
    """A mistake that all processes of this machine meet is told by its first one, which then has the others ended."""
    try:
        yield
    except UserError as e:
        if place is None or place.local_rank == 0:
            raise
        try:
            time.sleep(GRACE_SECONDS)
        except Stopped:
            sys.exit(EXIT_USER_ERROR)
        raise UserError(f"rank {place.rank}: {e}") from e


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


def join_processes(
    function: Callable[[argparse.Namespace], object], args: argparse.Namespace, place: Place
) -> None:
    """Run ``function(args)`` as one of the processes that torchrun or srun started.

    Args:
        args: as :func:`~era.engine.launchers.take_place` left them.

    Raises:
        UserError: the processes cannot meet.
        SystemExit: asked to stop, or another process is lost; told on standard error.
    """
    if place.launcher == TORCHRUN:  # what srun starts is SLURM's to end
        end_with(os.getppid())
    how = Launch(
        args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args.stop_signals
    )
    try:
        take_part(place.local_rank, function, (args,), how)
        return
    except RuntimeError as e:
        if not has_lost_another(e):
            if dist.is_initialized():
                raise
            raise _cannot_meet(place.url, str(e).strip().splitlines()[0][:200]) from e
    # The error is gone here, and with its frames the model.
    print(
        f"error: rank {place.rank} ends, because another process of the run has ended: {place.launcher} tells which. What was "
        f"saved is whole. {how_to_go_on()}",
        file=sys.stderr,
    )
    sys.exit(EXIT_FAILED)


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
            f"error: {killed_sentence(f'process {rank} of the run (rank {rank})', -code)}",
            file=sys.stderr,
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
    raise _cannot_meet(args.dist_url, reason) from raised


def _cannot_meet(url: str, reason: str) -> UserError:
    return UserError(
        f"the processes cannot meet at --dist-url {url} ({reason}): expected tcp://HOST:PORT, a free port of machine 0 "
        "that all machines reach; name another, or leave --dist-url out on a single machine."
    )
