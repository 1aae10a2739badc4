"""Processes of a run that somebody else started: torchrun, or srun of SLURM.

Each of them is told by its environment which one it is. SLURM's variables of a job step are read, which srun sets: in the
script of ``sbatch`` those of the job are there as well, but whoever runs it there runs one process.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import NamedTuple

from era.errors import UserError

CONSOLE = "era"  # the console command, and the package of its subcommands
TORCHRUN, SLURM = "torchrun", "srun"
_TORCHRUN_NEEDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SLURM_NEEDS = ("SLURM_NODEID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
FIRST_PORT, PORTS = 20_000, 10_000  # below those that a system gives away by itself


class Place(NamedTuple):
    """Which process of a run this is.

    Attributes:
        launcher: who started it, :data:`TORCHRUN` or :data:`SLURM`.
        local_rank: on this machine.
        processes: on each machine.
        machines: of the run.
        machine_rank: this machine's.
        url: where all meet, as ``torch.distributed.init_process_group`` takes it.
        is_restart: the launcher has started this run before.
    """

    launcher: str
    local_rank: int
    processes: int
    machines: int
    machine_rank: int
    url: str
    is_restart: bool = False

    @property
    def rank(self) -> int:
        """Of all processes of the run."""
        return self.machine_rank * self.processes + self.local_rank


def place_of(env: Mapping[str, str]) -> Place | None:
    """The place that an environment tells, None if nobody but this program starts processes.

    Raises:
        UserError: processes that are shared out unevenly, or variables that are no numbers.
    """
    if "TORCHELASTIC_RUN_ID" in env and all(name in env for name in _TORCHRUN_NEEDS):
        rank, world, local_rank, processes = (_number(env, name) for name in _TORCHRUN_NEEDS)
        if processes < 1 or world % processes or rank % processes != local_rank:
            raise UserError(
                f"torchrun starts {world} processes, {processes} of them on this machine: expected as many on each; give "
                "all machines the same --nproc-per-node."
            )
        restarts = _number(env, "TORCHELASTIC_RESTART_COUNT", "0")
        return Place(
            TORCHRUN, local_rank, processes, world // processes, rank // processes, "env://", restarts > 0
        )  # fmt: skip
    if _number(env, "SLURM_STEP_NUM_TASKS", "1") > 1 and all(name in env for name in _SLURM_NEEDS):
        tasks = env["SLURM_STEP_TASKS_PER_NODE"]
        each = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", tasks)
        if each is None:
            raise UserError(
                f"srun shares the processes out as {tasks} (SLURM_STEP_TASKS_PER_NODE): expected as many on each "
                "machine; start it with --ntasks-per-node."
            )
        machines = int(each[2] or 1)
        restarts = _number(env, "SLURM_RESTART_COUNT", "0")
        return Place(
            SLURM, _number(env, "SLURM_LOCALID"), int(each[1]), machines, _number(env, "SLURM_NODEID"),
            _slurm_url(env, machines), restarts > 0,
        )  # fmt: skip
    return None


def take_place(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Place | None:
    """The place of this process; ``args`` then says what Detectron2's flags would say of it.

    A run that the launcher has restarted goes on from its last checkpoint, as with ``--resume``.

    Args:
        args: changed in place: ``num_gpus``, ``num_machines``, ``machine_rank``, ``dist_url``, ``resume``.
        parser: of those flags, whose defaults tell what was named.

    Raises:
        UserError: as :func:`place_of`; or flags that contradict the launcher.
    """
    place = place_of(os.environ)
    if place is None:
        return None
    given = {
        "num_gpus": place.processes,
        "num_machines": place.machines,
        "machine_rank": place.machine_rank,
    }
    for name, value in given.items():
        found = getattr(args, name)
        if found not in (value, parser.get_default(name)):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is {found}, but {place.launcher} has started the processes, by which it is {value}: leave {flag} "
                f"out, or start without {place.launcher}."
            )
        setattr(args, name, value)
    named = args.dist_url not in ("auto", parser.get_default("dist_url"))
    args.dist_url = args.dist_url if named else place.url
    args.resume = args.resume or (place.is_restart and not args.eval_only)
    return place._replace(url=args.dist_url)


def command_line(arguments: list[str]) -> str:
    """How this program was started, with other arguments: a line for a shell, with the launcher's name in front."""
    place = place_of(os.environ)
    is_command = sys.argv[0].startswith(f"{CONSOLE} ")  # such as "era train"
    program = ["-m", *sys.argv[0].split()] if is_command else [sys.argv[0]]
    command = [sys.executable, *program, *arguments]
    if place is None:
        return shlex.join(command)
    if place.launcher == SLURM:
        start = ["srun", f"--nodes={place.machines}", f"--ntasks-per-node={place.processes}"]
        return shlex.join([*start, *command])
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={place.processes}"]
    if place.machines == 1:
        return shlex.join([*start, *command[1:]])
    # where they meet is known to the user alone
    return f"{shlex.join([*start, f'--nnodes={place.machines}'])} ... {shlex.join(command[1:])}"


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: ``n07`` of ``n[07-09,12],m3``; "" if it cannot be read."""
    found = re.match(r"([\w.-]*)(?:\[(\w+)[^\]]*\])?([\w.-]*)", nodes)
    return "".join(part or "" for part in found.groups())


def _slurm_url(env: Mapping[str, str], machines: int) -> str:
    """One address for all processes of the step: by ``MASTER_ADDR`` and ``MASTER_PORT`` where they are set."""
    host = env.get("MASTER_ADDR") or "127.0.0.1"
    if machines > 1 and "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
        host = first_host(nodes)
        if not host:
            raise UserError(
                f"srun names no machine that can be read (SLURM_STEP_NODELIST is {nodes!r}): set MASTER_ADDR to the first one."
            )
    step = _number(env, "SLURM_JOB_ID", "0") * 31 + _number(env, "SLURM_STEP_ID", "0")
    port = _number(env, "MASTER_PORT", str(FIRST_PORT + step % PORTS))
    return f"tcp://{host}:{port}"


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env[name] if default is None else env.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{name} of the environment is {text!r}: expected a whole number."
        ) from None
