"""Which other files an ONNX file refers to, read without the package ``onnx``."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

# Fields of ONNX's messages (onnx.proto3) that lead to tensors: message -> field number -> message.
_LEADS = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_WIDTHS = {1: 8, 5: 4}  # bytes of the wire types of fixed size
_DEEPEST = 64  # graphs within graphs


def external_files(path: str | Path) -> set[str]:
    """Locations of the tensors that an ONNX file keeps in other files, as it spells them.

    Raises:
        ValueError: it is no ONNX file.
    """
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as e:
            raise ValueError("it is empty") from e
        with data:
            return set(_locations(data, 0, len(data), "Model", 0))


def _locations(data: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ValueError("it nests too deep")
    if message == "Entry":
        texts = {number: data[a:b] for number, a, b in _fields(data, start, end)}
        if texts.get(1) == b"location":
            yield texts.get(2, b"").decode("utf-8", "replace")
        return
    for number, a, b in _fields(data, start, end):
        if number in _LEADS[message]:
            yield from _locations(data, a, b, _LEADS[message][number], depth + 1)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number and extent of every field of variable length."""
    while start < end:
        tag, start = _number(data, start, end)
        kind = tag & 7
        if kind == 0:
            _, start = _number(data, start, end)
        elif kind == 2:
            length, start = _number(data, start, end)
            if start + length > end:
                raise ValueError("it breaks off")
            yield tag >> 3, start, start + length
            start += length
        elif kind in _WIDTHS:
            start += _WIDTHS[kind]
        else:
            raise ValueError("it is no ONNX file")


def _number(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if start >= end:
            raise ValueError("it breaks off")
        byte, start = data[start], start + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise ValueError("it is no ONNX file")
