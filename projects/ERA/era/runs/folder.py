"""The folder of a plan's runs: whose it is, and which runs in it are complete."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from detectron2.data import MetadataCatalog

from era.engine.trainer import STUDENT_FOLDER
from era.errors import UserError
from era.runs.plan import Run

MARKER = ".era-runs"  # lies in every folder that was made for the runs of a plan
STAMP = "finished.json"  # lies in every run's folder once that run is complete


def prepare_folder(
    output: Path, *, runs: Sequence[Run], products: Sequence[str], reuse: bool
) -> IO[str]:
    """Make the folder of a plan's runs, or clear away what an earlier call wrote there.

    Args:
        runs: those of the plan; nothing else but the products is replaced.
        products: names of the files and folders that follow from the runs.
        reuse: keep the runs, see :func:`is_finished`.

    Returns:
        The marker file, locked; the folder is this process's own until it is closed.

    Raises:
        UserError: the folder is somebody else's, in use by another process, or cannot be written.
    """
    marker = output / MARKER
    try:
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output} is a file: name a folder.")
        if output.is_dir() and any(output.iterdir()) and not marker.is_file():
            raise UserError(
                f"--output {output} holds files that no earlier call wrote (there is no {MARKER} in it), "
                "so nothing in it is replaced: name a new or an empty folder."
            )
        output.mkdir(parents=True, exist_ok=True)
        lock = open(marker, "a", encoding="utf-8")  # noqa: SIM115 -- held until the caller ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            lock.close()
            raise UserError(
                f"another process is writing to {output}: wait for it, or name another --output."
            ) from e
        for path in [] if reuse else [run.folder for run in runs]:
            remove(path)
        for name in products:
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


def identity(run: Run, folder_of: Mapping[str, Path]) -> dict:
    """What a run's result follows from: command, whole config, data, and the runs it builds upon."""
    cfg = run.config
    return {
        "command": list(run.command),
        "config_sha256": _sha256(cfg.dump().encode()),
        "data": {name: _age(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)},
        "after_sha256": {name: _stamp_sha256(folder_of[name]) for name in run.depends_on},
    }


def is_finished(run: Run, folder_of: Mapping[str, Path]) -> bool:
    """Whether the run's folder holds the complete result of exactly this run."""
    try:
        found = json.loads((run.folder / STAMP).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    has_model = run.iterations == 0 or (run.folder / STUDENT_FOLDER / "model_final.pth").is_file()
    return has_model and found == identity(run, folder_of)


def mark_finished(run: Run, folder_of: Mapping[str, Path], seconds: float) -> None:
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


def _stamp_sha256(folder: Path) -> str | None:
    path = folder / STAMP
    return _sha256(path.read_bytes()) if path.is_file() else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
