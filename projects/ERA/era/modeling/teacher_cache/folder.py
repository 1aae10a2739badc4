"""Entries as files in a folder that any number of processes and runs share.

Reading takes no lock: a file is written under another name and renamed when it is whole, and its checksum is
looked at. Whoever writes holds the folder's lock, which the system releases when a process dies; so a partial file
that is there while one holds the lock is a dead process's, and is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from era.errors import UserError
from era.modeling.teacher_cache.entry import CorruptEntry, Entry, decode, encode

logger = logging.getLogger(__name__)

LEDGER = ".teacher-cache"  # the lock, and in it the bytes of all entries, in DIGITS digits
DIGITS = 20
SUFFIX, PARTIAL = ".maps", ".partial"
# Where the budget is full, so much more of it is freed at once: finding the oldest means looking at every file.
HEADROOM = 16


class FolderStore:
    """Entries in a folder; the least recently used, of whichever process, leaves first.

    Trouble with a single file costs that entry, never the run: it is said once, and the entry computed again.

    Args:
        folder: made if it is not there. Files in it that are no entries are left alone.
        budget: bytes that all entries of the folder together may take.

    Raises:
        UserError: the folder cannot be made, written or locked.
    """

    def __init__(self, folder: str | Path, budget: int):
        self.folder, self.budget = Path(folder), budget
        self.where = str(folder)
        self._said: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as ledger:
                _write_number(ledger, self._make_room(budget))
        except OSError as e:
            raise UserError(
                f"MODEL.TEACHER.CACHE {folder} cannot be written ({e.strerror}): expected a folder for the "
                "teacher's maps on a file system with locks; choose another, or memory."
            ) from e

    @property
    def held(self) -> int:
        """Bytes of all entries of the folder."""
        try:
            with open(self.folder / LEDGER, "rb") as file:
                return _read_number(file.fileno()) or 0
        except OSError:
            return 0

    def get(self, key: str) -> Entry | None:
        """The entry of a key, now the most recently used; None if there is none that is whole."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                data = bytearray(os.fstat(file.fileno()).st_size)
                file.readinto(data)
            entry = decode(key, data)
            _touch(path)
            return entry
        except FileNotFoundError:
            return None
        except CorruptEntry as e:
            self._say(
                "corrupt", f"{path} is no whole entry: {e}. It is removed and computed again."
            )
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError as e:
            self._say("read", f"{path} cannot be read ({e.strerror}): it is computed again.")
        return None

    def put(self, key: str, entry: Entry) -> None:
        """Write an entry, at the cost of those that were not used for longest; one over the budget is not kept."""
        parts = encode(key, entry)
        size = sum(map(len, parts))
        if size > self.budget:
            return
        path = self._path(key)
        partial = path.with_suffix(PARTIAL)
        try:
            with self._locked() as ledger:
                if path.exists():  # another process was faster
                    return
                held = _read_number(ledger)
                if held is None or held + size > self.budget:
                    held = self._make_room(self.budget - max(size, self.budget // HEADROOM))
                # Before the file: who is killed in between has counted too much, never too little.
                _write_number(ledger, held + size)
                path.parent.mkdir(exist_ok=True)
                with open(partial, "wb") as file:
                    file.writelines(parts)
                _touch(partial)
                os.replace(partial, path)
        except OSError as e:
            self._say("write", f"{path} cannot be written ({e.strerror}): going on without it.")
            with contextlib.suppress(OSError):
                partial.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / (key + SUFFIX)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The folder's lock, as the file descriptor of the ledger."""
        ledger = os.open(self.folder / LEDGER, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(ledger, fcntl.LOCK_EX)
            yield ledger
        finally:
            os.close(ledger)

    def _make_room(self, limit: int) -> int:
        """Remove dead processes' partial files and the oldest entries until all take at most ``limit`` bytes; what
        they take then. The lock must be held."""
        entries = []
        for path in self.folder.glob("??/*"):
            if path.suffix == PARTIAL:
                path.unlink(missing_ok=True)
            elif path.suffix == SUFFIX:
                with contextlib.suppress(FileNotFoundError):  # a corrupt one goes without the lock
                    stat = path.stat()
                    entries.append((stat.st_mtime_ns, stat.st_size, path))
        held = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if held <= limit:
                break
            path.unlink(missing_ok=True)
            held -= size
        return held

    def _say(self, what: str, sentence: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("Teacher cache: %s (Said once.)", sentence)


def _touch(path: Path) -> None:
    """Note that a file is used now, finer than the system's own clock of files."""
    now = time.time_ns()
    with contextlib.suppress(FileNotFoundError):  # somebody else's eviction
        os.utime(path, ns=(now, now))


def _read_number(file: int) -> int | None:
    text = os.pread(file, DIGITS, 0)
    return int(text) if len(text) == DIGITS and text.isdigit() else None


def _write_number(file: int, number: int) -> None:
    os.pwrite(file, f"{number:0{DIGITS}d}".encode(), 0)
