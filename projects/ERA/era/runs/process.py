"""The process of a run: started in a folder of its own, watched, stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from era.runs.folder import remove
from era.runs.placement import VISIBLE
from era.runs.plan import Run

CHECKPOINT = "last_checkpoint"  # fvcore's: names the file to resume from
STOP_SECONDS = 10.0  # a child that was asked to stop is killed after that
# Linux ends a child with its parent, however that ended, if the child asks for it: a run of a study that was
# killed would otherwise go on and write into the folder of the run that takes its place.
FOLLOW = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def start_process(run: Run, threads: int, gpus: Sequence[str] | None = None) -> subprocess.Popen:
    """Start a run in an empty folder, its output in its log. On Linux it ends with this process.

    Args:
        threads: of each process, unless the user's own OMP_NUM_THREADS says otherwise.
        gpus: those that it sees; None = those that this process sees.
    """
    remove(run.folder)  # Detectron2 would append to the metrics of an earlier run
    run.folder.mkdir(parents=True)
    return _start(run, run.command, threads, gpus)


def go_on_process(run: Run, threads: int, gpus: Sequence[str] | None = None) -> subprocess.Popen:
    """Start a run where an earlier process of it stopped: at its last checkpoint, if it left one, else as
    :func:`start_process`; arguments as there."""
    command = go_on_command(run)
    if command == run.command:
        return start_process(run, threads, gpus)
    return _start(run, command, threads, gpus)


def go_on_command(run: Run) -> tuple[str, ...]:
    """A run's command, with ``--resume`` where its folder holds a checkpoint of a training."""
    if not run.iterations or not (run.folder / CHECKPOINT).is_file():
        return run.command
    place = run.command.index("--config-file")
    return (*run.command[:place], "--resume", *run.command[place:])


def _start(
    run: Run, command: Sequence[str], threads: int, gpus: Sequence[str] | None
) -> subprocess.Popen:
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if gpus is not None:
        environment[VISIBLE] = ",".join(gpus)
    follow = (sys.executable, "-S", "-c", FOLLOW, str(os.getpid()))
    with open(run.log, "a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        return subprocess.Popen(
            (*(follow if sys.platform == "linux" else ()), *command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ask processes that still run to stop, wait, and kill those that do not."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def peak_memory(pid: int) -> float | None:
    """Most resident memory of a living process so far, in MiB; None where the system tells none.

    Linux's VmHWM, and not ``ru_maxrss`` of ``wait4``: that one counts what the parent held at the fork.
    """
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    return None
