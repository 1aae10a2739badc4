"""Where the cache keeps its entries: the budget, what leaves first, broken files, killed and parallel processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import signal
import zlib

import pytest
import torch

from era.modeling.teacher_cache.entry import HEAD, CorruptEntry, Entry, decode, encode
from era.modeling.teacher_cache.folder import LEDGER, FolderStore
from era.modeling.teacher_cache.memory import MemoryStore

NAMES = {name: f"{number:02x}" + name * 62 for number, name in enumerate("abcdef")}


def entry_of(name, size=1000):
    """Content that follows from the name."""
    return Entry({"p3": torch.full((size,), float(ord(name)))}, seconds=0.5)


def size_of(name, size=1000):
    return sum(map(len, encode(NAMES[name], entry_of(name, size))))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LEDGER)


@pytest.fixture(params=["memory", "folder"])
def store_of(request, tmp_path):
    """A store with room for so many entries, and a bit."""

    def make(count):
        if request.param == "memory":
            return MemoryStore(count * 4000 + 100)
        return FolderStore(tmp_path / "maps", count * size_of("a") + 100)

    return make


def kept(store):
    """Names in the store; looking does not count as use."""
    if isinstance(store, MemoryStore):
        return {name for name, key in NAMES.items() if key in store._entries}
    return {name for name, key in NAMES.items() if store._path(key).exists()}


def test_the_least_recently_used_leaves_first(store_of):
    store = store_of(3)
    for name in "abc":
        store.put(NAMES[name], entry_of(name))
    assert kept(store) == {"a", "b", "c"}
    assert store.get(NAMES["a"]).tensors["p3"][0] == ord("a")
    store.put(NAMES["d"], entry_of("d"))
    assert kept(store) == {"a", "c", "d"} and store.get(NAMES["b"]) is None
    store.get(NAMES["c"])
    store.put(NAMES["e"], entry_of("e", 1900))  # as large as two
    assert kept(store) == {"c", "e"}
    store.put(NAMES["f"], entry_of("f", 5000))
    assert store.get(NAMES["f"]) is None, "larger than the budget: not kept"
    assert "e" in kept(store), "and nothing leaves for it"


def test_the_budget_holds_whatever_comes(store_of):
    store = store_of(3)
    generator = random.Random(0)
    for _ in range(60):
        name = generator.choice("abcdef")
        found = store.get(NAMES[name])
        assert found is None or found.tensors["p3"][0] == ord(name)
        store.put(NAMES[name], entry_of(name, generator.randrange(1, 1500)))
        assert 0 < store.held <= store.budget
        if isinstance(store, FolderStore):
            assert store.held == sum(path.stat().st_size for path in files(store.folder))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_a_file_gives_back_what_it_was_made_of(dtype):
    tensors = {
        "p3": (torch.randn(3, 5, 7) * 3).to(dtype),
        "none": torch.zeros(0, 4, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    data = bytearray(b"".join(encode("key", Entry(tensors, 0.25))))
    found = decode("key", data)
    assert found.seconds == 0.25 and found.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found.tensors[name].dtype == dtype and torch.equal(found.tensors[name], value)
    assert len(data) % 64 == 0


def broken(data: bytes) -> dict[str, bytes]:
    changed = bytearray(data)
    changed[-2000] ^= 1
    return {
        "empty": b"",
        "cut": data[:-1],
        "cut in the header": data[:40],
        "a bit": bytes(changed),
        "longer": data + b"\0",
        "pickle": pickle.dumps({"p3": 1}) + data,
        "another's": b"".join(encode(NAMES["b"], entry_of("b"))),
        "zeros": bytes(len(data)),
    }


@pytest.mark.parametrize("how", broken(b"\0" * 5000))
def test_a_broken_file_is_noticed_removed_and_computed_again(tmp_path, how, caplog):
    store = FolderStore(tmp_path, 10**6)
    store.put(NAMES["a"], entry_of("a"))
    (path,) = files(tmp_path)
    path.write_bytes(broken(path.read_bytes())[how])
    with caplog.at_level(logging.WARNING):
        assert store.get(NAMES["a"]) is None
    assert "no whole entry" in caplog.text and files(tmp_path) == []
    store.put(NAMES["a"], entry_of("a"))
    assert torch.equal(store.get(NAMES["a"]).tensors["p3"], entry_of("a").tensors["p3"])


def test_a_header_that_lies_is_no_entry():
    """A right checksum over a wrong header: lengths and types are still looked at."""
    for old, new in (
        (b"[1000]", b"[9000]"),
        (b"float32", b"complex"),
        (b'"seconds"', b'"sekonds"'),
    ):
        parts = [bytes(part) for part in encode("key", entry_of("a"))]
        parts[1] = parts[1].replace(old, new)
        magic, _, size = HEAD.unpack(parts[0])
        parts[0] = HEAD.pack(magic, zlib.crc32(b"".join(parts[1:])), size)
        with pytest.raises(CorruptEntry):
            decode("key", bytearray(b"".join(parts)))


def start(function, *args):
    """A process of its own."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def die_while_writing(folder):
    store = FolderStore(folder, 10**6)
    store.put(NAMES["a"], entry_of("a"))
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.put(NAMES["b"], entry_of("b"))


def test_a_kill_while_writing_leaves_a_folder_that_works(tmp_path):
    (tmp_path / "aa").mkdir()
    for name in ("notes.txt", "aa/own.txt"):
        (tmp_path / name).write_text("mine")
    other = FolderStore(tmp_path, 10**6)
    killed = start(die_while_writing, tmp_path)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert [path.suffix for path in files(tmp_path)].count(".partial") == 1
    assert other.get(NAMES["b"]) is None and other.get(NAMES["a"]) is not None
    assert other.held >= size_of("a"), "too much may be counted, too little never"
    store = FolderStore(tmp_path, 10**6)
    assert kept(store) == {"a"} and store.held == size_of("a")
    assert [path.suffix for path in files(tmp_path)] == [".maps", ".txt", ".txt"]
    for one in (other, store):
        one.put(NAMES["b"], entry_of("b"))
        assert one.get(NAMES["b"]) is not None


def test_a_lost_ledger_is_counted_again(tmp_path):
    store = FolderStore(tmp_path, 10**6)
    store.put(NAMES["a"], entry_of("a"))
    (tmp_path / LEDGER).write_text("nonsense")
    store.put(NAMES["b"], entry_of("b"))
    assert store.held == size_of("a") + size_of("b")


def work_in(folder, seed):
    store = FolderStore(folder, 3 * size_of("a") + 100)
    generator = random.Random(seed)
    found = 0
    for _ in range(500):
        name = generator.choice("abcdef")
        entry = store.get(NAMES[name])
        if entry is None:
            store.put(NAMES[name], entry_of(name))
        else:
            found += 1
            assert torch.equal(entry.tensors["p3"], entry_of(name).tensors["p3"])
    assert found > 50 and not store._said, (found, store._said)


def test_two_processes_share_a_folder(tmp_path):
    """Both write, read and evict; what is found is whole, and the budget holds over both."""
    processes = [start(work_in, tmp_path, seed) for seed in (1, 2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    store = FolderStore(tmp_path, 3 * size_of("a") + 100)
    total = sum(path.stat().st_size for path in files(tmp_path))
    assert 0 < total == store.held <= store.budget
    assert all(path.suffix == ".maps" for path in files(tmp_path))


def test_a_full_disk_costs_the_entry_alone(tmp_path, monkeypatch, caplog):
    store = FolderStore(tmp_path, 10**6)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with caplog.at_level(logging.WARNING):
        for name in "ab":
            store.put(NAMES[name], entry_of(name))
    assert caplog.text.count("No space left") == 1 and files(tmp_path) == []
    monkeypatch.undo()
    store.put(NAMES["a"], entry_of("a"))
    assert store.get(NAMES["a"]) is not None
