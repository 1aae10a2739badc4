"""``tools/soak.py``: a long run of ``tools/train_net.py``, watched from outside, and whether what it holds stays flat."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from era import environment
from era.benchmark.usage import Usage, drift, left_in_shared_memory, members_of, usage_of
from era.config import load_config
from era.errors import UserError
from era.registry import is_distiller
from era.runs.metrics import read_metrics, steps_done
from era.runs.process import FOLLOW, stop
from era.runs.tables import terminal

DESCRIPTION = """\
Train a long run, look all the while at what it holds of the machine (memory, shared memory, file descriptors,
threads, processes), and say whether any of it grows. Then a shorter run of two processes with two loader
processes each. The runs are those of tools/train_net.py, with ten evaluations and ten checkpoints in each; their
teacher is trained for a few steps before.

Flat: the rise over the whole run at the rate of its last half (Theil and Sen's slope) stays, of all processes together,
below 32 MiB of memory and 8 MiB of shared memory, and below one handle, thread and process.
"""
EPILOG = """\
exit status: 0 all of it is flat and both runs ended well; 1 not; 2 a mistake in the command, in one sentence.

Trailing KEY VALUE pairs override the config of the runs, not of the teacher.
"""
# What each must stay below that rises over a run, of all its processes together: some MiB, for the first evaluations
# leave a few in a heap, and not one handle, thread or process more.
BOUNDS = {"memory": 32.0, "shared": 8.0, "handles": 1.0, "threads": 1.0, "processes": 1.0}
UNITS = {"memory": " MiB", "shared": " MiB"}
PERIOD = 20  # steps from one line of metrics.json to the next: a sample is taken when one appears
POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0  # torch's loader processes look every 5 s whether their parent is still there
FEWEST = 4 * PERIOD + 1  # iterations of a run: four samples, the last line not counted
TIMES = 10  # evaluations and checkpoints of a run
SCRIPT = "tools/train_net.py"
LOG = "soak.log"
TABLE = (200, 500, 1000, 2000)  # iterations that the printed table shows, beside the last sample


@dataclass
class Soak:
    """One run that was watched.

    Attributes:
        name: of the run.
        iterations: it was to train.
        status: its exit status, below 0 for the signal that ended it.
        seconds: from its start to its end.
        samples: what it held when so many iterations were done.
        left: what it left behind, in words: processes, names in shared memory.
    """

    name: str
    iterations: int
    status: int = 0
    seconds: float = 0.0
    samples: dict[int, Usage] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def rises(self) -> dict[str, float]:
        """By name of what it holds, the rise over the whole run, see :func:`era.benchmark.usage.drift`."""
        places, values = list(self.samples), list(self.samples.values())
        return {
            name: drift(places, [getattr(v, name) for v in values], self.iterations)
            for name in BOUNDS
        }

    def faults(self) -> list[str]:
        """What is not as it should be, in words; empty if all is flat."""
        found = [f"exit status {self.status}"] if self.status else []
        if len(self.samples) < 4:
            return [*found, f"only {len(self.samples)} samples were taken", *self.left]
        for name, rise in self.rises().items():
            bound = BOUNDS[name]
            if rise >= bound:
                unit = UNITS.get(name, "")
                found.append(f"{name} rises by {rise:.1f}{unit} (expected below {bound:g}{unit})")
        return found + self.left


def watch(name: str, command: Sequence[str], folder: Path, iterations: int) -> Soak:
    """Start a run in a session of its own, take a sample whenever it has written its metrics, and wait for its end.

    Args:
        command: writes ``metrics.json`` into ``folder``, which is made, with the log of the run.
    """
    soak, start, seen = Soak(name, iterations), time.monotonic(), set()
    folder.mkdir(parents=True)
    follow = (sys.executable, "-S", "-c", FOLLOW, str(os.getpid()))  # it ends with this program
    with open(folder / LOG, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            (*follow, *command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                last = steps_done(read_metrics(folder))
                pids = members_of(process.pid)
                seen |= set(pids)
                # The last line comes when parts of the run are gone already.
                if 0 < last < iterations and last not in soak.samples:
                    soak.samples[last] = usage_of(pids)
                    print(
                        f"{name}: {last} of {iterations}, {_words(soak.samples[last])}", flush=True
                    )
        finally:
            stop([process])
    soak.status, soak.seconds = process.returncode, time.monotonic() - start
    deadline = time.monotonic() + GRACE_SECONDS
    while (alive := members_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    soak.left = [f"process {pid} is left" for pid in alive]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    soak.left += [f"{file} is left in /dev/shm" for file in left_in_shared_memory(seen)]
    return soak


def argument_parser() -> argparse.ArgumentParser:
    """The options of the soak."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", default="configs/toy/era.yaml", help="default: %(default)s")
    add(
        "--iterations",
        type=int,
        default=2000,
        help="of one process (default: %(default)s); 0 = no such run",
    )
    add("--iterations-of-two", type=int, default=600, metavar="N",
        help="of two processes (default: %(default)s); 0 = no such run")  # fmt: skip
    add("--teacher-iterations", type=int, default=100, metavar="N",
        help="0 = the config's MODEL.TEACHER.WEIGHTS (default: %(default)s)")  # fmt: skip
    add(
        "--output",
        default="output/soak",
        metavar="FOLDER",
        help="must not be there (default: %(default)s)",
    )
    add("--json", metavar="FILE", help="write every sample")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, judge.

    Returns:
        The exit status, see :data:`EPILOG`.

    Raises:
        UserError: a number that is too small, a folder that is there, a config that cannot be read, or no Linux.
    """
    args = argument_parser().parse_args(argv)
    check(args)
    output, opts = Path(args.output), list(args.opts)
    if args.teacher_iterations:
        opts += ["MODEL.TEACHER.WEIGHTS", train_teacher(args, output / "teacher")]
    soaks = []
    for name, iterations, more in (
        ("one process", args.iterations, []),
        ("two processes", args.iterations_of_two, ["--num-gpus", "2"]),
    ):
        if not iterations:
            continue
        folder = output / name.replace(" ", "_")
        settings = ["SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", iterations // TIMES]
        settings += ["TEST.EVAL_PERIOD", iterations // TIMES]
        settings += ["DATALOADER.NUM_WORKERS", 2] if more else []
        command = train_command(args.config_file, *more, *settings, *opts, "OUTPUT_DIR", folder)
        soaks.append(watch(name, command, folder, iterations))
    about = environment.machine() | environment.versions() | {"commit": environment.commit()}
    if args.json:
        write_json(soaks, about, Path(args.json))
    print(f"\n{table(soaks)}\n")
    wrong = [f"{soak.name}: {fault}" for soak in soaks for fault in soak.faults()]
    print("\n".join(wrong) or "flat: nothing rises beyond its bound, nothing is left behind")
    if wrong:
        print(f"see {LOG} in the folders of {output}")
    return 1 if wrong else 0


def check(args: argparse.Namespace) -> None:
    """What can be known before a run is started.

    Raises:
        UserError: see :func:`main`.
    """
    if not os.path.isdir("/proc/self/fd"):
        raise UserError(
            "the soak reads /proc/<pid>/fd, which this system has not: run it on Linux."
        )
    if not os.path.isfile(SCRIPT):
        raise UserError(
            f"{SCRIPT} is not to be found from {os.getcwd()}: call it from the repository's root."
        )
    for name in ("iterations", "iterations_of_two"):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value and value < FEWEST:
            raise UserError(
                f"{flag} is {value}: expected at least {FEWEST}, for a sample is taken every {PERIOD} and four are "
                "needed; or 0 for no such run."
            )
    if args.teacher_iterations < 0:
        raise UserError(f"--teacher-iterations is {args.teacher_iterations}: expected 0 or more.")
    if os.path.exists(args.output):
        raise UserError(
            f"--output {args.output} is there already: name a new folder, or remove it."
        )
    cfg = load_config(args.config_file, args.opts)
    if args.teacher_iterations and not (is_distiller(cfg) and cfg.MODEL.TEACHER.CONFIG_FILE):
        raise UserError(
            f"--teacher-iterations is {args.teacher_iterations}, and {args.config_file} names no teacher to train "
            "(MODEL.TEACHER.CONFIG_FILE): set it to 0, or name a config of a distiller."
        )


def train_command(config_file: str, *arguments: object) -> list[str]:
    """A run of ``tools/train_net.py`` with this interpreter, without the warnings of its imports."""
    ignored = ("-W", "ignore", "-u", SCRIPT, "--config-file", config_file)
    return [sys.executable, *ignored, *map(str, arguments)]


def train_teacher(args: argparse.Namespace, folder: Path) -> Path:
    """Train the teacher of the config for a few steps.

    Returns:
        Its checkpoint.

    Raises:
        UserError: that failed.
    """
    print(f"teacher: {args.teacher_iterations} iterations", flush=True)
    keys = load_config(args.config_file, args.opts).MODEL.TEACHER
    settings = ["SOLVER.MAX_ITER", args.teacher_iterations, "DATASETS.TEST", "()", *keys.OPTS]
    folder.mkdir(parents=True)
    command = train_command(keys.CONFIG_FILE, *settings, "OUTPUT_DIR", folder)
    with open(folder / LOG, "w", encoding="utf-8") as log:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    if done.returncode:
        raise UserError(
            f"the teacher of {keys.CONFIG_FILE} was not trained (exit status {done.returncode}): see {folder / LOG}."
        )
    return folder / "model_final.pth"


def table(soaks: Sequence[Soak]) -> str:
    """What was held at some places of the runs, and the rise over each run."""
    rows = []
    for soak in soaks:
        shown = [i for i in soak.samples if i in TABLE or i == max(soak.samples)]
        rows += [[soak.name, str(i), *_cells(soak.samples[i])] for i in shown]
        if len(soak.samples) >= 4:
            rises = [f"{rise:+.1f}" for rise in soak.rises().values()]
            rows.append([soak.name, "rise over the run", *rises])
    headings = ("run", "iterations", "memory MiB", "shared MiB", "handles", "threads", "processes")
    return terminal(headings, rows, texts=2)


def write_json(soaks: Sequence[Soak], about: dict, path: Path) -> None:
    """Every sample, the rises and what is wrong, with the machine and the versions."""
    runs = [
        {
            "name": soak.name,
            "iterations": soak.iterations,
            "status": soak.status,
            "minutes": round(soak.seconds / 60, 2),
            "rises": soak.rises() if len(soak.samples) >= 4 else None,
            "faults": soak.faults(),
            "samples": [{"iterations": i, **usage._asdict()} for i, usage in soak.samples.items()],
        }
        for soak in soaks
    ]
    path.write_text(
        json.dumps({**about, "bounds": BOUNDS, "runs": runs}, indent=1) + "\n", encoding="utf-8"
    )


def _cells(usage: Usage) -> list[str]:
    memory, shared, *counts = usage
    return [f"{memory:.1f}", f"{shared:.1f}", *map(str, counts)]


def _words(usage: Usage) -> str:
    return ", ".join(
        f"{name} {cell}" for name, cell in zip(usage._fields, _cells(usage), strict=True)
    )
