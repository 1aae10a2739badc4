"""Masks as run lengths (RLE), checked before pycocotools' C code reads them.

pycocotools trusts its input: run lengths that do not fill the image leave memory unwritten in the mask,
and a text that ends within a number is read past its end. Results files are often somebody else's.
"""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

PART = 5  # bits of a number that a character of the compressed form holds
MORE, MINUS = 0x20, 0x10  # bits: another character follows; the number is negative
LONGEST = 7  # characters of a number, which are enough for any run of an image


def checked_rle(value, height: int, width: int) -> dict:
    """COCO's RLE of a mask, compressed or a list of run lengths, in the compressed form.

    Args:
        value: ``{"size": [height, width], "counts": text or list}``, from an untrusted source.
        height, width: of the image, pixels.

    Returns:
        ``size`` and ``counts`` (bytes), as ``pycocotools.mask`` takes them.

    Raises:
        ValueError: it is no such thing, or not a mask of an image of that size; the message says why.
    """
    if not isinstance(value, dict) or value.get("size") != [height, width]:
        size = value.get("size") if isinstance(value, dict) else None
        raise ValueError(f"its size is {str(size)[:40]}, the image's [{height}, {width}]")
    counts = value.get("counts")
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if isinstance(counts, list):
        if not all(type(run) is int and 0 <= run <= height * width for run in counts):
            raise ValueError("its counts are no run lengths")
        runs = np.array(counts, dtype=np.int64)
    elif isinstance(counts, str):
        runs = run_lengths(counts)
    else:
        raise ValueError("its counts are neither a text nor a list")
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its run lengths do not fill {height} x {width} pixels")
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts.encode("ascii")}
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def run_lengths(text: str) -> np.ndarray:
    """Run lengths (int64) that COCO's compressed text stands for; they may be negative in a bad one.

    Numbers are written five bits a character, the lowest first, from the fourth number on as the
    difference to the last but one.

    Raises:
        ValueError: a character that does not belong there, or a number cut off or too long.
    """
    codes = np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) - 48
    if not codes.size:
        return codes
    last = codes & MORE == 0
    if codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ValueError("its counts are no COCO run lengths")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST:
        raise ValueError("its counts are no COCO run lengths")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & (MORE - 1)) << PART * place, starts)
    runs -= np.where(codes[ends] & MINUS, 1 << PART * lengths, 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
