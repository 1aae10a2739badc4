"""Pickles of weights: numbers arrive, and nothing in a file can crash or change the process."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from era.checkpoint.reading import SafeCheckpointer
from era.checkpoint.unpickling import SafeUnpickler
from era.errors import UserError


class Crafted:
    """Pickles as a call of one of numpy's functions with these arguments, and then this state."""

    def __init__(self, function, arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


rebuild = np.zeros(1).__reduce__()[0]
scalar = np.float32(0).__reduce__()[0]
# The last number would tell numpy that objects come as a list; without it, bytes are taken for pointers.
OBJECT_STATE = (3, "|", None, None, None, -1, -1, 0)
NUMBER_STATE = (3, "<", None, None, None, -1, -1, 0)


def array(shape, dtype, data):
    return Crafted(rebuild, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data))


def dtype(name, state=NUMBER_STATE):
    return Crafted(np.dtype, (name, False, True), state)


FLOAT = np.dtype("f4")
CRAFTED = {
    "object dtype": array((2,), dtype("O8", OBJECT_STATE), b"\x41" * 16),
    "object dtype by its state": array((2,), dtype("f8", OBJECT_STATE), b"\x41" * 15),
    "object array as a list": array((2,), dtype("O8", OBJECT_STATE), [1, 2]),
    "object scalar": Crafted(scalar, (dtype("O8", OBJECT_STATE), b"\x41" * 8)),
    "void dtype": array((2,), dtype("V8"), b"\x41" * 16),
    "structured dtype": array(
        (1,),
        dtype("f8", (3, "<", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 63)),
        b"\x41" * 8,
    ),
    "dtype of fields": array((1,), dtype("O,O"), b"\x41" * 16),
    "text dtype": array((1,), dtype("U2"), b"\x41" * 8),
    "negative shape": array((-2, -2), FLOAT, b"\0" * 16),
    "huge shape": array((2**40, 2**40), FLOAT, b"\0" * 16),
    "huge empty shape": array((0, 2**70), FLOAT, b""),
    "shape of text": array("ab", FLOAT, b"\0" * 8),
    "too few bytes": array((4,), FLOAT, b"\0" * 15),
    "too many bytes": array((4,), FLOAT, b"\0" * 17),
    "a size for bytes": array((2**40,), np.dtype("u1"), 2**40),
    "scalar of too few bytes": Crafted(scalar, (FLOAT, b"\0")),
    "array of a size": Crafted(np.ndarray, ((4,), "O")),
    "bytes by another codec": Crafted(__import__("_codecs").encode, (b"x", "zip")),
}  # fmt: skip
READ = """
import sys
from torch import nn
from era.checkpoint.reading import SafeCheckpointer
from era.errors import UserError
for path in sys.argv[1:]:
    print("trying", path, flush=True)
    try:
        SafeCheckpointer(nn.Linear(1, 1), save_to_disk=False).load(path)
    except UserError as e:
        print("refused:", e, flush=True)
"""


def test_crafted_pickles_are_refused_in_one_sentence(tmp_path):
    """In a process of their own: numpy's functions would crash it on some of them."""
    paths = []
    for protocol in (2, 4):
        for name, value in CRAFTED.items():
            paths.append(tmp_path / f"{name.replace(' ', '_')}.{protocol}.pkl")
            payload = {"model": {"weight": value}, "__author__": "mallory"}
            paths[-1].write_bytes(pickle.dumps(payload, protocol))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, *map(str, paths)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(paths), done.stdout
    for path, tried, told in zip(paths, lines[::2], lines[1::2], strict=True):
        assert str(path) in tried
        assert told.startswith(f"refused: weights {str(path)!r} cannot be read")


@pytest.mark.parametrize("name", ["numpy.dtype", "numpy.core.multiarray._reconstruct"])
def test_a_pickle_cannot_change_what_reads_it(name, tmp_path):
    """BUILD with a pair of dicts sets attributes of the object before it, here of a function."""
    module, _, function = name.rpartition(".")
    attributes = b"N}X\x05\0\0\0_call" + b"ccollections\nOrderedDict\ns\x86b."
    path = tmp_path / "w.pkl"
    path.write_bytes(b"\x80\x02" + f"c{module}\n{function}\n".encode() + attributes)
    with pytest.raises(UserError, match="tries to change a function"):
        SafeCheckpointer(torch.nn.Linear(1, 1), save_to_disk=False).load(str(path))


@pytest.mark.parametrize("kind", ["b1", "u1", "i2", "i4", "i8", "f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numeric_arrays_arrive_as_they_were(kind, order, tmp_path):
    values = np.asarray(np.arange(12).reshape(3, 4) % 2, kind, order=order)
    scalar = np.dtype(kind).type(1)
    for protocol in (2, 3, 4):
        path = tmp_path / "w.pkl"
        path.write_bytes(pickle.dumps({"a": values, "s": scalar, "e": values[:0]}, protocol))
        with open(path, "rb") as f:
            found = SafeUnpickler(f, encoding="latin1").load()
        assert found["a"].dtype == kind.strip(">") and np.array_equal(found["a"], values)
        assert found["s"] == scalar and type(found["s"]) is type(scalar)
        assert found["e"].shape == (0, 4)
