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

from era.engine.hooks import STUDENT_FOLDER
from era.errors import UserError
from era.runs.plan import FINAL, Run

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


def is_finished(run: Run, identity: str, folder_of: Mapping[str, Path]) -> bool:
    """Whether the run's folder holds the complete result of exactly this run.

    The runs that it builds upon must be those that it was made with, as far as they are there.

    Args:
        identity: see :mod:`era.runs.identity`.
        folder_of: folders by name of run.
    """
    stamp = read_stamp(run.folder)
    models = run.folder if run.is_part else run.folder / STUDENT_FOLDER  # a part leaves no student
    has_model = run.iterations == 0 or (models / FINAL).is_file()
    if (
        not has_model
        or stamp.get("identity") != identity
        or not isinstance(stamp.get("after"), dict)
    ):
        return False
    now = {name: _stamp_sha256(folder_of[name]) for name in run.depends_on}
    return all(sha is None or sha == stamp["after"].get(name) for name, sha in now.items())


def mark_finished(
    run: Run,
    identity: str,
    folder_of: Mapping[str, Path],
    *,
    seconds: float,
    peak: float | None,
    commit: str,
) -> None:
    """Note that a run is complete, how long it took, how much memory, in MiB, and by which code."""
    stamp = {
        "identity": identity,
        "after": {name: _stamp_sha256(folder_of[name]) for name in run.depends_on},
        "seconds": round(seconds, 3),
        "peak_mib": peak,
        "commit": commit,
    }
    partial = run.folder / (STAMP + ".partial")
    partial.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    os.replace(partial, run.folder / STAMP)


def read_stamp(folder: Path) -> dict:
    """What :func:`mark_finished` noted in a run's folder; empty if it noted nothing."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _stamp_sha256(folder: Path) -> str | None:
    path = folder / STAMP
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
