"""Downloads of weights: whole or not at all, never waiting for ever, and each host's files apart.

iopath, through which Detectron2 fetches, does neither: it waits for a silent server without end, and its cache
knows a file by the path of its address alone, so that one host's file is handed out as another's.
"""

from __future__ import annotations

import http.client
import os
import tempfile
import time
import urllib.request
from urllib.parse import unquote, urlsplit

from detectron2.checkpoint.catalog import ModelCatalog, ModelCatalogHandler
from detectron2.utils.file_io import Detectron2Handler
from iopath.common.file_io import file_lock, get_cache_dir
from tqdm import tqdm

from era.addresses import check_address
from era.errors import UserError

TIMEOUT = 30.0  # seconds that a server may say nothing
SLOWEST = 1024  # bytes a second, as a mean over each span of TIMEOUT
FOLDER = "era_downloads"  # in iopath's cache: $FVCORE_CACHE, else ~/.torch/iopath_cache
_BLOCK = 1 << 16


def fetch(address: str, *, what: str) -> str:
    """Path of a local copy of a remote file, downloaded if it is not there yet.

    Copies lie under the scheme, the host with its port, and the path of their address; its query is not asked for,
    as in Detectron2, which reads a query as a setting of its own.

    Args:
        address: one that :func:`era.addresses.check_address` passes.
        what: how a message names the source of the address.

    Raises:
        UserError: an address that could lead out of the cache, a server that cannot be reached, is silent for
            :data:`TIMEOUT` or slower than :data:`SLOWEST`, or a download that ends too early.
    """
    check_address(address, what=what)
    try:
        url = _web_address(urlsplit(address).geturl())
        check_address(url, what=what)
        cached = os.path.join(get_cache_dir(), FOLDER, *_cached_name(url))
        with file_lock(cached):
            if not os.path.isfile(cached):
                _download(url, cached)
    except (OSError, http.client.HTTPException, RuntimeError, KeyError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        reason = f"the server said nothing for {TIMEOUT:g} s" if _is_timeout(e) else _first_words(e)
        raise UserError(
            f"{what} {address!r} cannot be downloaded ({reason}): expected a reachable address; try again, correct "
            "it, or download the file yourself and give its path."
        ) from e
    return cached


def _web_address(address: str) -> str:
    """What Detectron2's own schemes stand for, without query and fragment."""
    if address.startswith(ModelCatalogHandler.PREFIX):
        address = ModelCatalog.get(address.removeprefix(ModelCatalogHandler.PREFIX))
    elif address.startswith(Detectron2Handler.PREFIX):
        address = Detectron2Handler.S3_DETECTRON2_PREFIX + address.removeprefix(
            Detectron2Handler.PREFIX
        )
    return urlsplit(address)._replace(query="", fragment="").geturl()


def _cached_name(url: str) -> list[str]:
    """Folders and file name of a copy."""
    parts = urlsplit(url)
    host = f"{parts.hostname or ''}_{parts.port or ''}".strip("_")
    names = [name for name in unquote(parts.path).split("/") if name]
    if not host or not names or any("\0" in name for name in (host, *names)):
        raise ValueError("it names no file of a host")
    return [f"{parts.scheme}_{host}", *names]


def _download(url: str, path: str) -> None:
    """Write the file at ``path`` whole or not at all."""
    descriptor, partial = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".partial")
    try:
        with (
            os.fdopen(descriptor, "wb") as file,
            urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
        ):
            total = int(answer.headers.get("Content-Length") or 0)
            name = os.path.basename(path)
            with tqdm(
                desc=name, total=total or None, unit="B", unit_scale=True, disable=None
            ) as bar:
                size = _copy(answer, file, bar)
        if size == 0 or size < total:
            raise OSError(f"it ended after {size} of {total or 'some'} bytes")
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _copy(answer, file, bar) -> int:
    """Copy until the end; the number of bytes."""
    size, span_start, span_size = 0, time.monotonic(), 0
    while block := answer.read1(_BLOCK) if hasattr(answer, "read1") else answer.read(_BLOCK):
        file.write(block)
        bar.update(len(block))
        size, span_size = size + len(block), span_size + len(block)
        span = time.monotonic() - span_start
        if span > TIMEOUT:
            if span_size < SLOWEST * span:
                raise OSError(
                    f"{span_size} bytes came in {span:.0f} s, less than {SLOWEST} a second"
                )
            span_start, span_size = time.monotonic(), 0
    return size


def _is_timeout(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or isinstance(
        getattr(error, "reason", None), TimeoutError
    )


def _first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
