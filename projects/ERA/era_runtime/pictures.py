"""Picture files of anybody, read in one way everywhere: in training, in evaluation and by deployed models."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from era_runtime.errors import DeploymentError

# Pillow's own bound, from which on it takes a file for an attack.
MAX_PIXELS = 2 * (1024 * 1024 * 1024 // 4 // 3)
# Others are not tried, whatever a file is called: Pillow would run Ghostscript on PostScript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")
_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_limit_lifted = threading.Lock()


def read_picture(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture file as Detectron2 reads it, turned as its EXIF says, decoded, with 8 bits a channel.

    Of 16 bits the upper 8 are taken, as Pillow itself does where there are three channels; of one channel it would
    make everything above 255 white.

    Args:
        max_pixels: width x height from which on it is refused before a pixel is decoded.

    Raises:
        DeploymentError: no ordinary file, no picture, a damaged or too large one, or floating-point pixels.
    """
    with _opened(path, max_pixels) as picture:
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        picture = picture if turn is None else picture.transpose(turn)
        return _eight_bits(picture)


def picture_size(path: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in pixels of what :func:`read_picture` would return; only the file's head is read.

    Where a PNG tells its orientation behind its pixels, this is the size before turning.

    Raises:
        DeploymentError: as :func:`read_picture`, as far as the head tells.
    """
    with _opened(path, max_pixels) as picture:
        width, height = picture.size
        known = picture.format != "PNG" or "exif" in picture.info  # else Pillow would decode it all
        return (height, width) if known and _orientation(picture) >= 5 else (width, height)


@contextmanager
def _opened(path: str, max_pixels: int) -> Iterator[Image.Image]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise OSError("it is no ordinary file")
        with _without_limit():
            picture = Image.open(path, formats=FORMATS)
        with picture:
            pixels = picture.size[0] * picture.size[1]
            if pixels > max_pixels:
                raise OSError(
                    f"it has {picture.size[0]} x {picture.size[1]} pixels, more than the limit of {max_pixels}"
                )
            if picture.mode == "F":
                raise OSError("its pixels are floating-point numbers; store 8 or 16 bits")
            yield picture
    except Exception as e:  # a damaged file makes Pillow raise whatever it likes
        reason = " ".join(str(e).replace(repr(path), "it").split())[:200] or type(e).__name__
        raise DeploymentError(f"the picture {path} cannot be read ({reason})") from e


@contextmanager
def _without_limit() -> Iterator[None]:
    # Pillow has one limit for the whole process; ours is looked at next, before anything is decoded.
    with _limit_lifted:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF: Detectron2 does not turn it then
        return 1
    return value if value in _TURNS else 1


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise OSError(f"its pixels go from {values.min()} to {values.max()}; store 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))
