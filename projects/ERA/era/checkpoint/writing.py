"""Files and folders are written whole or not at all; a checkpoint's SHA-256 beside it; the identity of weights."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from era.errors import UserError

PARTIAL = ".partial"  # ends the name of a file while it is written
HASH = ".sha256"  # ends the name of the file beside a checkpoint, in the form of sha256sum
_LONGEST = 4096  # characters that are read of a file with a hash
_known: dict[tuple[str, int, int], str] = {}  # SHA-256 by path, size and time of change


def save_whole(data: Any, path: str, *, with_hash: bool = False) -> None:
    """``torch.save`` to a file beside ``path``, then rename: a crash leaves the old file intact.

    Args:
        with_hash: leave the SHA-256 of what was meant to be written in ``path`` + :data:`HASH`.

    Raises:
        UserError: it cannot be written, as on a full disk; nothing is left of it.
    """
    out = None
    try:
        try:
            with open(path + PARTIAL, "wb") as file:
                out = _Hashed(file)
                torch.save(data, out)
                file.flush()
                os.fsync(file.fileno())
            if with_hash:
                # Between the two renames a file has no hash, never that of another.
                _write(
                    path + HASH + PARTIAL, f"{out.digest.hexdigest()}  {os.path.basename(path)}\n"
                )
                remove(path + HASH)
            os.replace(path + PARTIAL, path)
            if with_hash:
                os.replace(path + HASH + PARTIAL, path + HASH)
        finally:
            remove(path + PARTIAL, path + HASH + PARTIAL)
    except Exception as e:  # torch turns a failed write into errors of its own
        error = out.error if out is not None and out.error is not None else e
        if not isinstance(error, OSError):
            raise
        raise cannot_be_written(path, error) from error


class _Hashed:
    """A file that is only written to, from its beginning to its end, and what that hashes to."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        self.file.flush()


def write_text_whole(text: str, path: str) -> None:
    """A small text file, written whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        try:
            _write(path + PARTIAL, text)
            os.replace(path + PARTIAL, path)
        finally:
            remove(path + PARTIAL)
    except OSError as e:
        raise cannot_be_written(path, e) from e


def check_new_folder(output: str | Path, flag: str = "--output") -> None:
    """A folder that is to be written is absent or empty.

    Args:
        flag: that named it, for the message.

    Raises:
        UserError: it is not.
    """
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{flag} {output} exists and is not an empty folder: name another, or remove it."
        )


@contextmanager
def folder_whole(output: str | Path, flag: str = "--output") -> Iterator[Path]:
    """A folder, whole or not at all: what is written inside goes into a temporary neighbour, which gets the folder's name
    when the block ends. If it ends by an error, nothing is left, nor the folders above that were made for it.

    Args:
        output: absent or empty, see :func:`check_new_folder`.
        flag: that named it, for the message.

    Yields:
        The temporary folder, for everybody to read.

    Raises:
        UserError: it cannot be written.
    """
    final = Path(output).absolute()
    made = [parent for parent in final.parents if not parent.exists()]  # the deepest first
    temporary = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        temporary.chmod(0o755)  # mkdtemp keeps others out
        yield temporary
        if final.exists():
            final.rmdir()
        temporary.rename(final)
    except BaseException as e:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(e, OSError):
            raise UserError(
                f"{flag} {output} cannot be written ({e.strerror or e}): name a folder where you may write."
            ) from e
        raise


def cannot_be_written(path: str, error: OSError) -> UserError:
    """The sentence about a file that a run could not write; of a path with a folder, also how much room there is."""
    folder = os.path.dirname(path)
    free = (
        f", {shutil.disk_usage(folder).free / 2**20:.0f} MiB free" if os.path.isdir(folder) else ""
    )
    return UserError(
        f"{path} cannot be written ({error.strerror or error}{free}): what was written before is whole; make room or "
        "mend the folder, then go on with --resume, or choose another OUTPUT_DIR."
    )


def remove(*paths: str) -> None:
    """Remove files, those that are there."""
    for path in paths:
        if os.path.isfile(path):
            os.remove(path)


def damage(path: str) -> str | None:
    """What is wrong with a file by the SHA-256 beside it; None if nothing is, or if there is none beside it.

    A file that has not changed is read once.
    """
    beside = path + HASH
    if not os.path.exists(beside):
        return None
    try:
        if not os.path.isfile(beside):  # a pipe would be waited for
            raise OSError
        with open(beside, encoding="utf-8") as file:
            expected = file.read(_LONGEST).split()[0]
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, IndexError):
        return f"{beside} cannot be read"
    found = _file_hash(path)
    if found == expected:
        return None
    return (
        f"its SHA-256 is {found[:12]}..., {os.path.basename(path + HASH)} says {expected[:12]}..."
    )


def _file_hash(path: str) -> str:
    status = os.stat(path)
    key = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
    if key not in _known:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        _known[key] = digest.hexdigest()
    return _known[key]


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def weights_hash(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
