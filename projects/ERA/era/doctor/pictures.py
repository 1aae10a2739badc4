"""Every picture of a run's datasets, opened and decoded; what was found whole is not decoded again."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from detectron2.config import CfgNode

from era.data.datasets import UNLABELED_KEY
from era.data.pictures import size_problem
from era.data.unlabeled import pictures
from era.doctor.case import OK, WARNING, WRONG, Case, Finding, plural
from era.engine.preflight import check_writable
from era.environment import usable_cores
from era.errors import UserError
from era.runs.progress import Progress
from era_runtime.errors import DeploymentError
from era_runtime.pictures import read_picture

JOURNAL = "doctor/pictures.jsonl"  # below OUTPUT_DIR
SHOWN = 10  # bad pictures that are named on the terminal; --json has all
AT_A_TIME = 1024  # pictures handed to the threads at once


class Journal:
    """The files that were decoded and found whole: path, bytes, time of change in ns, width and height, a line each.

    A file of another size or time is another file. A line that was cut off by a kill is passed over.

    Args:
        path: of the journal; made with its folder when the first line is written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, list] = {}
        self._file = None
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(
                f"the journal {path} cannot be read ({error.strerror}): expected a file of this tool; name another "
                "with --journal."
            ) from error
        for line in text.splitlines():
            try:
                name, *rest = json.loads(line)
            except (ValueError, TypeError):
                continue
            if len(rest) == 4:
                self._known[name] = rest

    def size(self, path: str) -> tuple[int, int] | None:
        """Width and height of a file that is unchanged since it was found whole."""
        known = self._known.get(path)
        if known is None:
            return None
        try:
            stat = os.stat(path)
        except OSError:
            return None
        return tuple(known[2:]) if known[:2] == [stat.st_size, stat.st_mtime_ns] else None

    def add(self, path: str, stat: os.stat_result, size: tuple[int, int]) -> None:
        """Note that it is whole."""
        if self._file is None:
            check_writable(str(self.path.parent), key="--journal", what="the doctor's journal")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)  # a line at a time
        self._file.write(json.dumps([path, stat.st_size, stat.st_mtime_ns, *size]) + "\n")

    def close(self) -> None:
        """Nothing is lost without it."""
        if self._file is not None:
            self._file.close()


def check(case: Case) -> Finding:
    """Open and decode every picture of ``DATASETS.TRAIN``, ``TEST`` and ``UNLABELED``."""
    records = unique_records(case.cfg)
    journal = Journal(journal_path(case))
    start = time.monotonic()
    try:
        old, problems = _go_through(case.cfg, records, journal)
    finally:
        journal.close()
    seconds = time.monotonic() - start
    before = f", {old:,} of them before (unchanged since)" if old else ""
    details = {"pictures": len(records), "decoded_before": old, "seconds": seconds}
    if not problems:
        sentence = f"{plural(len(records), 'picture')} opened and decoded{before}: all are whole and as large as said"
        return Finding(OK, sentence, details)
    skips = case.cfg.INPUT.ON_BAD_IMAGE == "skip" and len(problems) < len(records)
    return Finding(
        WARNING if skips else WRONG,
        f"{len(problems):,} of {plural(len(records), 'picture')} cannot be used{before}: repair or remove them",
        {**details, "problems": problems},
        "\n".join(problems[:SHOWN])
        + (f"\nand {len(problems) - SHOWN} more" * (len(problems) > SHOWN)),
    )


def unique_records(cfg: CfgNode) -> list[dict]:
    """The records of all pictures that a run reads; a file that several sets name once for each size they give."""
    keys = {"DATASETS.TRAIN": cfg.DATASETS.TRAIN, "DATASETS.TEST": cfg.DATASETS.TEST}
    keys[UNLABELED_KEY] = cfg.DATASETS.UNLABELED
    found = {}
    for key, names in keys.items():
        for name in names:
            for record in pictures(key, name):
                size = record.get("width"), record.get("height")
                found.setdefault((record["file_name"], size), record)
    return list(found.values())


def decoded_size(cfg: CfgNode, path: str) -> tuple[int, int]:
    """Width and height of a picture as training sees it, turned as its EXIF says; raises what the reader raises."""
    return read_picture(path, cfg.INPUT.MAX_IMAGE_PIXELS).size


def journal_path(case: Case) -> Path:
    """``--journal``, or a file below ``OUTPUT_DIR``."""
    return Path(case.args.journal or os.path.join(case.cfg.OUTPUT_DIR, JOURNAL))


def _go_through(cfg: CfgNode, records: list[dict], journal: Journal) -> tuple[int, list[str]]:
    """How many were decoded before, and what is wrong, a sentence for each bad picture."""
    old, problems, waiting = 0, [], []
    for record in records:
        size = journal.size(record["file_name"])
        if size is None:
            waiting.append(record)
            continue
        old += 1
        problems += filter(None, [size_problem(record, size)])
    bar = Progress(len(records), old, sys.stderr, unit="picture")
    done, start = 0, time.monotonic()
    with ThreadPoolExecutor(usable_cores()) as pool:
        for batch in _batches(waiting, AT_A_TIME):  # an interruption waits for no more than these
            for record, stat, size, problem in pool.map(lambda r: _decode(cfg, r), batch):
                if size is not None:
                    journal.add(record["file_name"], stat, size)
                problems += filter(None, [problem])
                done += 1
                rate = (time.monotonic() - start) / done
                bar.show(len(records), old + done, rate * (len(waiting) - done), "")
    bar.close()
    return old, problems


def _decode(cfg: CfgNode, record: dict):
    path = record["file_name"]
    try:
        stat = os.stat(path)  # before it is read: what changes meanwhile is looked at again
        size = decoded_size(cfg, path)
    except (DeploymentError, OSError) as error:
        return record, None, None, str(error)
    return record, stat, size, size_problem(record, size)


def _batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
