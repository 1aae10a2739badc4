"""An entry of the cache, and its form as a file: a JSON header and raw bytes, with a checksum.

A file never holds anything that could run: reading one makes tensors or fails.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

# Magic, CRC-32 of all that follows this head, bytes of the JSON after it. Every part is padded to ALIGNMENT.
HEAD = struct.Struct("<8sII")
MAGIC = b"eracache"
ALIGNMENT = 64
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    + (torch.int64, torch.int32, torch.uint8, torch.bool)
}


@dataclass(frozen=True)
class Entry:
    """What a teacher says of one picture.

    Attributes:
        tensors: by name, contiguous and on the CPU.
        seconds: what it took to compute them.
    """

    tensors: dict[str, Tensor]
    seconds: float

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class CorruptEntry(Exception):
    """A file that is no whole entry."""


def encode(key: str, entry: Entry) -> list[bytes | memoryview]:
    """An entry as the content of a file, in parts; ``key`` is written down with it."""
    described = [
        [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in entry.tensors.items()
    ]
    text = json.dumps({"key": key, "seconds": entry.seconds, "tensors": described}).encode()
    text += b" " * (-(HEAD.size + len(text)) % ALIGNMENT)
    parts = [text]
    for tensor in entry.tensors.values():
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        parts.append(bytes(-tensor.nbytes % ALIGNMENT))
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return [HEAD.pack(MAGIC, checksum, len(text)), *parts]


def decode(key: str, data: bytearray) -> Entry:
    """Inverse of :func:`encode`; the tensors are views of ``data``.

    Raises:
        CorruptEntry: cut short, changed, of another key, or no entry at all.
    """
    try:
        magic, checksum, size = HEAD.unpack_from(data)
        if magic != MAGIC or zlib.crc32(memoryview(data)[HEAD.size :]) != checksum:
            raise CorruptEntry("the checksum does not fit")
        start = HEAD.size + size
        header = json.loads(data[HEAD.size : start])
        if header["key"] != key:
            raise CorruptEntry("it belongs to another key")
        tensors = {}
        for name, dtype, shape in header["tensors"]:
            count = math.prod(shape)
            flat = torch.frombuffer(data, dtype=DTYPES[dtype], count=count, offset=start) if count \
                else torch.empty(0, dtype=DTYPES[dtype])  # fmt: skip
            tensors[name] = flat.reshape(shape)
            start += flat.nbytes + -flat.nbytes % ALIGNMENT
        return Entry(tensors, float(header["seconds"]))
    except (struct.error, ValueError, KeyError, TypeError) as e:
        raise CorruptEntry(f"it cannot be read ({type(e).__name__})") from e
