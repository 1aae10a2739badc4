"""What the demo trains: its runs, their command lines, and the folder that they write to."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from era.config import load_config
from era.engine.trainer import STUDENT_FOLDER
from era.errors import UserError

MARKER = ".era-demo"  # lies in every folder that the demo made itself
STAMP = "demo_run.json"  # lies in every run's folder once that run is complete
LOG = "train.log"  # what a run would have written to the screen

# Keys that the demo sets itself, and what to use instead of overriding them.

# Everything that the demo writes, so that it replaces nothing else.
RUN_NAMES = ("teacher", "plain", "era", "era_alpha1", "plain_init", "era_init")
PRODUCTS = (
    "table.md",
    "results.json",
    "report.html",
    "losses.png",
    "residuals.png",
    "ap.png",
    "pictures",
    "deployed",
)

NOTHING, HEADS = "nothing", "RPN and ROI heads"


@dataclass(frozen=True)
class Run:
    """One process of the demo: a training, or the evaluation of a trained model."""

    name: str  # also its folder's name
    label: str  # in tables and figures
    config_file: str
    opts: tuple[str, ...]  # KEY, VALUE, KEY, VALUE, ...
    folder: Path
    iterations: int  # optimiser steps; 0 = evaluation only
    cost: float  # prior: time of a step relative to the plain student's
    inherited: str = NOTHING  # weights of the teacher that the student started from
    depends_on: str | None = None  # the run whose model it needs
    command: tuple[str, ...] = field(default=(), repr=False)

    @property
    def log(self) -> Path:
        """Where the process's own output goes."""
        return self.folder / LOG

    @property
    def config(self) -> CfgNode:
        """The resolved config."""
        return load_config(self.config_file, self.opts)


def prepare_folder(output: Path, *, reuse: bool) -> IO[str]:
    """Make the demo's folder, or clear away what an earlier demo wrote there.

    Args:
        reuse: keep the runs of the earlier demo, see :func:`is_finished`.

    Returns:
        The marker file, locked; the folder is this process's own until it is closed.

    Raises:
        UserError: the folder is somebody else's, in use by another demo, or cannot be written.
    """
    marker = output / MARKER
    try:
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output} is a file: name a folder.")
        if output.is_dir() and any(output.iterdir()) and not marker.is_file():
            raise UserError(
                f"--output {output} holds files that no demo wrote (there is no {MARKER} in it), so "
                "nothing in it is replaced: name a new or an empty folder."
            )
        output.mkdir(parents=True, exist_ok=True)
        lock = open(marker, "a", encoding="utf-8")  # noqa: SIM115 -- held until the demo ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            lock.close()
            raise UserError(
                f"another demo is writing to {output}: wait for it, or name another --output."
            ) from e
        for name in PRODUCTS if reuse else RUN_NAMES + PRODUCTS:
            remove(output / name)
    except OSError as e:
        raise UserError(
            f"--output {output} cannot be written ({e.strerror}: {e.filename}): name a folder that "
            "you may write to."
        ) from e
    return lock


def remove(path: Path) -> None:
    """Delete a file or folder if it is there; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def identity(run: Run, folder_of: dict[str, Path]) -> dict:
    """What a run's result follows from: command, whole config, data, and the run it builds upon."""
    cfg = run.config
    needed = folder_of[run.depends_on] / STAMP if run.depends_on else None
    return {
        "command": list(run.command),
        "config_sha256": _sha256(cfg.dump().encode()),
        "data": {name: _age(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)},
        "after_sha256": _sha256(needed.read_bytes()) if needed and needed.is_file() else None,
    }


def is_finished(run: Run, folder_of: dict[str, Path]) -> bool:
    """Whether the run's folder holds the complete result of exactly this run."""
    try:
        stamp = json.loads((run.folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    has_model = run.iterations == 0 or (run.folder / STUDENT_FOLDER / "model_final.pth").is_file()
    return has_model and stamp.get("identity") == identity(run, folder_of)


def mark_finished(run: Run, folder_of: dict[str, Path], seconds: float) -> None:
    """Note that a run is complete, and how long it took."""
    stamp = {"identity": identity(run, folder_of), "seconds": round(seconds, 3)}
    partial = run.folder / (STAMP + ".partial")
    partial.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    os.replace(partial, run.folder / STAMP)


def _age(dataset: str) -> list[int] | None:
    """Size and time of a registered dataset's annotation file, which change when data is made anew."""
    path = MetadataCatalog.get(dataset).get("json_file")
    if not path or not os.path.isfile(path):
        return None
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
