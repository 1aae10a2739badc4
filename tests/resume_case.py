"""Real runs that are killed at a chosen place, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from detectron2.engine import defaults
from detectron2.utils import comm
from forked import fork_train_net

from era.checkpoint import writing
from era.engine.resume import CLOCK
from era.engine.trainer import Trainer

LIMIT = 120  # seconds that a run may take before it counts as hanging


def die() -> None:
    """End this process as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LIMIT)


class Kill:
    """Where a run's process is killed.

    Args:
        step: before the update of this iteration.
        evaluation: at the beginning of the evaluation after this iteration.
        write: in the middle of writing the file of this name.
        rename: before this name is given to the whole file.
        rank: of the process that is killed; the others are left to the launcher.
    """

    def __init__(self, *, step=None, evaluation=None, write=None, rename=None, rank=0):
        self.step, self.evaluation, self.write, self.rename = step, evaluation, write, rename
        self.rank = rank

    def arm(self) -> None:
        """In the process of the run, which ends with it."""
        here, update, evaluate = self, torch.optim.SGD.step, Trainer.test
        write, replace = writing._Hashed.write, os.replace
        current = {}

        def mine():
            return comm.get_rank() == here.rank

        own_run_step = Trainer.run_step

        def run_step(trainer):
            current["iteration"] = trainer.iter
            own_run_step(trainer)

        def test(trainer, *args):
            if mine() and trainer.iter == here.evaluation:
                die()
            return evaluate(trainer, *args)

        def step(optimizer, *args, **kwargs):
            if mine() and current.get("iteration") == here.step:
                die()
            return update(optimizer, *args, **kwargs)

        def write_part(file, data):
            name = os.path.basename(file.file.name).removesuffix(writing.PARTIAL)
            if name == here.write and file.file.tell() > 20_000:
                file.file.flush()
                die()
            return write(file, data)

        def rename(source, target):
            if os.path.basename(target) == here.rename:
                die()
            return replace(source, target)

        Trainer.run_step, Trainer.test, torch.optim.SGD.step = run_step, test, step
        writing._Hashed.write, os.replace = write_part, rename


def run(args, *, kill: Kill | None = None, draw: int = 5, log: Path) -> int:
    """``train_net.py`` with these arguments in a process of its own, until its end.

    Args:
        draw: what is drawn where no SEED is set.
        log: its output is appended.

    Returns:
        The exit status, below 0 for the signal that ended it.
    """

    def prepare() -> None:
        own_seeding = defaults.seed_all_rng
        defaults.seed_all_rng = lambda seed: own_seeding(draw if seed is None else seed)
        if kill is not None:
            kill.arm()

    pid = fork_train_net(args, log, prepare)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the run of {log} took more than {LIMIT} s")


def lines(folder: Path) -> list[dict]:
    """metrics.json without what a clock measured, and without lines of nothing else."""
    found = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in CLOCK} for line in found]
    return [line for line in kept if line.keys() != {"iteration"}]


def left_behind(folder: Path) -> dict:
    """All that a run left: what is in its checkpoints, the metrics, the marker."""
    found = {
        str(path.relative_to(folder)): torch.load(path, weights_only=True)
        for path in folder.rglob("*.pth")
    }
    for content in found.values():
        if isinstance(content, dict):  # the others are the last evaluation's detections
            content.pop("settings", None)  # OUTPUT_DIR is in it
    found["metrics"] = lines(folder)
    found["last_checkpoint"] = (folder / "last_checkpoint").read_text()
    names = (path.name for path in folder.iterdir())
    found["files"] = sorted(name for name in names if not name.startswith("events"))
    return found


def difference(a, b, where: str = "") -> str | None:
    """Where two of :func:`left_behind` are not equal to the bit, None if they are."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return None if same else where
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        pairs = [(a[key], b[key], f"{where}/{key}") for key in a]
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)}"
        pairs = [(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        same = a == b or (a != a and b != b)  # NaN
        return None if same else f"{where}: {a!r} and {b!r}"
    return next((found for pair in pairs if (found := difference(*pair))), None)
