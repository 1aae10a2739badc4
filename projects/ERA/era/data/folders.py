"""Folders of data that is made on first use: written beside their place, whole or not at all.

Two processes may ask for the same folder at once; one makes it, the other waits and finds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from era.errors import UserError

logger = logging.getLogger(__name__)

STAMP = "spec.json"  # what a folder was made from; a folder without it is somebody else's


def place(root: str | Path | None) -> Path:
    """Where data lies: ``root``, or DETECTRON2_DATASETS, or ``datasets``, as they stand at the call."""
    if root is None:
        root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    return Path(root)


def is_current(folder: Path, stamp: str) -> bool:
    """Whether ``folder`` was made from what ``stamp`` says; it is then whole, for it appears by a rename."""
    try:
        return (folder / STAMP).read_text() == stamp
    except (OSError, UnicodeDecodeError):
        return False


@contextlib.contextmanager
def lock(root: Path, name: str) -> Iterator[None]:
    """Wait for, then hold, the one right to write ``root``/``name``; a killed holder frees it."""
    with open(root / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writing(root: Path, name: str, *, what: str) -> Iterator[Path]:
    """The right to write ``root``/``name``, with what killed processes left there cleared away.

    Gives a folder beside it for what is not whole yet; it is gone in the end.

    Args:
        what: how a message names the data.

    Raises:
        UserError: the system refuses a file.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock(root, name):
            try:
                for stale in root.glob(f".{name}.tmp*"):  # of a process that was killed
                    shutil.rmtree(stale)
                yield root / f".{name}.tmp"
            finally:
                for rest in root.glob(f".{name}.tmp*"):
                    shutil.rmtree(rest, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{what} cannot be written below {root} ({error}): make that folder "
            "writable, or set DETECTRON2_DATASETS to one that is"
        ) from error


def replace(fresh: Path, folder: Path) -> None:
    """Move what is whole into its place, inside of :func:`writing`; an older folder there goes."""
    if folder.exists():  # a folder can only be replaced by a rename if it is empty
        os.replace(folder, fresh.parent / f"{fresh.name}-old")
    os.replace(fresh, folder)


def make(
    root: Path,
    name: str,
    stamp: str,
    write: Callable[[Path], None],
    *,
    what: str,
    force: bool = False,
) -> Path:
    """Make the folder ``root``/``name``, in place of an older one, unless it is there.

    Args:
        stamp: what it is made from, kept in it; equal stamps mean equal content.
        write: writes the content into a folder, which it makes.
        what: how a message names the data.
        force: make it anew although it is there.

    Raises:
        UserError: it cannot be written, or the folder holds something else.
    """
    folder = root / name
    with writing(root, name, what=what) as fresh:
        if not force and is_current(folder, stamp):  # made while this process waited
            return folder
        if folder.exists() and any(folder.iterdir()) and not (folder / STAMP).exists():
            raise UserError(
                f"{folder} holds files that are not {what} (it has no {STAMP}): move it away, or "
                "set DETECTRON2_DATASETS to another folder"
            )
        start = time.perf_counter()
        logger.info("making %s in %s ...", what, folder)
        write(fresh)
        (fresh / STAMP).write_text(stamp)
        replace(fresh, folder)
        logger.info("... done in %.1f s", time.perf_counter() - start)
    return folder


def point(name: str, json_file: str, image_root: str, classes: tuple[str, ...]) -> None:
    """Set the metadata of a COCO-format set, also where it named another place before."""
    meta = MetadataCatalog.get(name)
    paths = {"json_file": json_file, "image_root": image_root}
    for key in paths:  # metadata refuses another value for a key it has
        meta.__dict__.pop(key, None)
    meta.set(thing_classes=list(classes), evaluator_type="coco", **paths)


def register(name: str, prepare: Callable[[str], None]) -> None:
    """Put a COCO-format set into Detectron2's catalog that ``prepare(name)`` makes, and points to, when it is loaded."""
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, functools.partial(_load, name, prepare))


def _load(name: str, prepare: Callable[[str], None]) -> list[dict]:
    prepare(name)
    meta = MetadataCatalog.get(name)
    return load_coco_json(meta.json_file, meta.image_root, name)
