"""Pickles of weights, read without running anything that they ask for."""

from __future__ import annotations

import collections
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

# Names of dtypes that weights have: bool, integers and floats by their size in bytes.
NUMERIC = re.compile("b1|[iu][1248]|f[248]")


class SafeUnpickler(pickle.Unpickler):
    """Reads pickles of plain containers and numeric numpy arrays, such as model-zoo weights.

    A pickle asks for functions by name and calls them with what it likes. It gets none of numpy's: stand-ins
    rebuild arrays from type, shape and bytes after checking them, for numpy itself would take a file's
    bytes for addresses in memory.

    Args:
        file: opened in binary mode, which can be sought in, for it is read twice.
        options: as ``pickle.Unpickler``.
    """

    def __init__(self, file: BinaryIO, **options: Any):
        super().__init__(file, **options)
        self._file = file

    def load(self) -> Any:
        """The object.

        Raises:
            pickle.UnpicklingError: something else than weights is asked for.
        """
        start = self._file.tell()
        check_memo(self._file)
        self._file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for one of the few globals that arrays need.

        Raises:
            pickle.UnpicklingError: any other global.
        """
        # numpy 2 renamed numpy.core to numpy._core; files of both ages exist.
        known = _KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")
        return known


def check_memo(file: BinaryIO) -> None:
    """Refuse a pickle that numbers its objects beyond their count: the reader would make room for all the numbers,
    34 GB of it for eleven bytes.

    Raises:
        pickle.UnpicklingError: it does.
    """
    for count, (opcode, argument, _position) in enumerate(pickletools.genops(file), start=1):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise pickle.UnpicklingError(f"it numbers object {argument} as one of {count}")


class _Function:
    """What a pickle may call. A pickle can also set attributes, except of an object that refuses."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args):
        return self._call(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it tries to change a function")


class _Dtype:
    """Stands for ``numpy.dtype``; the byte order comes as its state."""

    __slots__ = ("value",)

    def __init__(self, name: str):
        if not isinstance(name, str) or not NUMERIC.fullmatch(name):
            raise pickle.UnpicklingError(f"it holds an array of {name!r}: expected numbers")
        self.value = np.dtype(name)

    def __setstate__(self, state: tuple):
        _version, order, *structure = state
        if any(part is not None for part in structure[:3]):  # subarray, names, fields
            raise pickle.UnpicklingError("it holds a structured array: expected numbers")
        self.value = self.value.newbyteorder(order)


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray``; shape, type and bytes come as its state."""

    def __setstate__(self, state: tuple):
        _version, shape, dtype, is_fortran, data = state
        data = _as_bytes(data)
        size = math.prod(shape) * dtype.value.itemsize
        if any(n < 0 for n in shape) or size != len(data):
            raise pickle.UnpicklingError(
                f"it holds an array of shape {shape} and type {dtype.value} in {len(data)} bytes"
            )
        super().__setstate__((1, shape, dtype.value, bool(is_fortran), data))


def _as_bytes(data: bytes | str) -> bytes:
    # Bytes of Python 2 arrive as text, for SafeUnpickler reads with encoding="latin1".
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError(
            f"it holds an array of a {type(data).__name__}: expected bytes"
        )
    return data


def _encode(text: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode``, the way of protocol 2 to store bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it encodes as {encoding!r}: expected latin1")
    return text.encode("latin1")


def _scalar(dtype: _Dtype, data: bytes | str) -> np.generic:
    """Stands for numpy's function of that name."""
    (value,) = np.frombuffer(_as_bytes(data), dtype.value)
    return value


def _refuse(*_args) -> None:
    """Stands for ``numpy.ndarray`` itself, which is only handed to ``_reconstruct``."""
    raise pickle.UnpicklingError("it makes an array without its bytes")


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _Function(_encode),
    ("__builtin__", "bytes"): _Function(lambda: b""),  # protocol 2 of an empty one
    ("numpy", "dtype"): _Function(lambda name, *_flags: _Dtype(name)),
    ("numpy", "ndarray"): _Function(_refuse),
    ("numpy.core.multiarray", "_reconstruct"): _Function(
        lambda _kind, _shape, _typecode: np.ndarray.__new__(_Array, (0,), np.int8)
    ),
    ("numpy.core.multiarray", "scalar"): _Function(_scalar),
}
