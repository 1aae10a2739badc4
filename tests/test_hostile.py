"""The corpus of hostile files: each is refused in one sentence, runs nothing, writes nothing and never hangs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import hostile
import numpy as np
import pytest
import torch
from builders import tiny_cfg
from PIL import Image
from torch import nn

from era.checkpoint import fetching
from era.checkpoint.reading import SafeCheckpointer
from era.config import load_config
from era.data.pictures import UnreadablePicture, check_pictures, picture_mapper
from era.data.validation import check_annotation_file
from era.engine.resume import check_place
from era.errors import UserError
from era_runtime import DeploymentError, load, read_image
from era_runtime.onnx_file import external_files

onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="the extra deploy is not installed",
)


def refused(do, words: str) -> str:
    """The one sentence with which something is refused."""
    start = time.monotonic()
    with pytest.raises((UserError, DeploymentError)) as caught:
        do()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 900, sentence
    assert re.search(words, sentence), sentence
    assert time.monotonic() - start < 20
    return sentence


@pytest.fixture
def trap(tmp_path):
    """A path that nothing may create."""
    path = tmp_path / "trap"
    yield path
    assert not path.exists()


def test_pickles_of_weights(trap, tmp_path):
    for name, (content, words) in hostile.pickles(trap).items():
        path = tmp_path / "weights.pkl"
        path.write_bytes(content)
        model = SafeCheckpointer(nn.Linear(1, 1), save_to_disk=False)
        assert "cannot be read" in refused(lambda m=model, p=path: m.load(str(p)), words), name


@pytest.mark.parametrize("suffix", [".pth", ".pyth"])
def test_checkpoints(trap, tmp_path, suffix):
    for content, words in hostile.checkpoints(trap).values():
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        model = SafeCheckpointer(nn.Linear(1, 1), save_to_disk=False)
        refused(lambda m=model, p=path: m.load(str(p)), words)


def test_places_in_a_run(tmp_path):
    path = tmp_path / "model_0000003.pth"
    run = SimpleNamespace(state_dict=hostile.place, load_state_dict=check_place)
    model = SafeCheckpointer(nn.Linear(1, 1), trainer=run)
    weights = model.model.state_dict()
    check_place(hostile.place())
    for trainer in hostile.places().values():
        torch.save({"model": weights, "trainer": trainer, "iteration": 3}, path)
        refused(lambda: model.load(str(path)), "cannot be read")


def test_a_hash_beside_does_not_make_a_checkpoint_trusted(trap, tmp_path):
    for content, words in hostile.checkpoints(trap).values():
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        (tmp_path / "weights.pth.sha256").write_text(hashlib.sha256(content).hexdigest())
        model = SafeCheckpointer(nn.Linear(1, 1), save_to_disk=False)
        refused(lambda m=model, p=path: m.load(str(p)), words)
        path.write_bytes(content + b"\1")
        refused(lambda m=model, p=path: m.load(str(p)), "are damaged")


def test_configs(trap, tmp_path):
    path = tmp_path / "config.yaml"
    for content, words in hostile.configs(trap).values():
        path.write_bytes(content)
        refused(lambda: load_config(str(path)), words)
    for opts in (
        ["SEED"],
        ["SEED", "[" * 5000],
        ["SEED", "{}"],
        ["MODEL.X.Y", "1"],
        ["MODEL", "1"],
    ):
        refused(lambda opts=opts: load_config("", opts), "overrides that do not fit")


def test_annotations(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    path = tmp_path / "train.json"
    cfg = tiny_cfg("plain")

    def check():
        check_annotation_file(
            "own", str(path), str(tmp_path), True,
            open_pictures=lambda at, records: check_pictures(cfg, at, records),
        )  # fmt: skip

    path.write_text(json.dumps(hostile.coco()))
    check()
    for content, words in hostile.annotations().values():
        path.write_bytes(content)
        refused(check, words)


def test_pictures_in_training_evaluation_and_prediction(tmp_path):
    mappers = [picture_mapper(tiny_cfg("plain"), is_train=is_train) for is_train in (True, False)]
    path = tmp_path / "a.jpg"
    record = {"file_name": str(path), "width": 40, "height": 30, "image_id": 1, "annotations": []}
    path.write_bytes(hostile.encoded("PNG"))
    assert [mapper(record)["image"].shape[0] for mapper in mappers] == [3, 3]
    for content, words in hostile.pictures().values():
        path.write_bytes(content)
        assert str(path) in refused(lambda: read_image(str(path)), words)
        for mapper in mappers:
            with pytest.raises(UnreadablePicture, match=words) as caught:
                mapper(record)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    os.mkfifo(path)
    refused(lambda: read_image(str(path)), "no ordinary file")


@onnx
def test_deployment_folders(tmp_path):
    good = tmp_path / "good"
    hostile.onnx_folder(good)
    assert len(load(good)(np.zeros((30, 40, 3), np.uint8))) == 1
    for entries, words in hostile.manifests().values():
        hostile.seal(good, "onnx", **entries)
        refused(lambda: load(good), words)
    for name, content, words in hostile.model_files().values():
        hostile.onnx_folder(good)
        (good / name).write_bytes(content)
        hostile.seal(good, "onnx")
        refused(lambda: load(good), words)
        (good / "classes.json").unlink()


@onnx
def test_weights_beside_an_onnx_file_have_a_hash_or_are_refused(tmp_path):
    folder = tmp_path / "folder"
    weights = np.array([[2, 3, 20, 30]], np.float32).tobytes()
    folder.mkdir()
    (folder / "weights.bin").write_bytes(weights)
    hostile.onnx_folder(folder, external="weights.bin")
    assert external_files(folder / "model.onnx") == {"weights.bin"}
    assert load(folder)(np.zeros((32, 32, 3), np.uint8)).boxes.tolist() == [[2, 3, 20, 30]]
    (folder / "weights.bin").write_bytes(weights[:-1] + b"\1")
    refused(lambda: load(folder), "weights.bin does not match")
    (folder / "weights.bin").unlink()
    (tmp_path / "weights.bin").write_bytes(weights)
    for outside in (
        "weights.bin",
        "../weights.bin",
        str(tmp_path / "weights.bin"),
        "./weights.bin",
    ):
        hostile.onnx_folder(folder, external=outside)
        refused(lambda: load(folder), "takes weights from")


class WritesAFile(nn.Module):
    """A model that writes a file when it is run, and has a name for one in its code."""

    def forward(self, image: torch.Tensor):
        torch.save(image, "trap")
        return image


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_that_touches_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.jit.script(WritesAFile()).save(str(folder / "model.ts"))
    hostile.seal(folder, "torchscript")
    refused(lambda: load(folder), "names save, which reads or writes files")
    for content in (b"noise" * 99, b"", hostile._archive(b"N.")):
        (folder / "model.ts").write_bytes(content)
        hostile.seal(folder, "torchscript")
        refused(lambda: load(folder), "no TorchScript file|cannot be loaded")
    assert not (tmp_path / "trap").exists()


# ---- servers -----------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Starts servers that answer every connection in one way; gives their ports."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "TIMEOUT", 0.5)
    sockets, over = [], threading.Event()

    def start(answer) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    answer(connection, over)

        threading.Thread(target=accept, daemon=True).start()
        return listener.getsockname()[1]

    yield start
    over.set()
    for listener in sockets:
        listener.close()


def says_nothing(connection, over):
    over.wait(20)


def says_nothing_after_its_head(connection, over):
    connection.recv(4096)
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
    over.wait(20)


def drips(connection, over):
    connection.recv(4096)
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    while not over.wait(0.1):
        connection.sendall(b"x")


def breaks_off(connection, over):
    connection.recv(4096)
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nabc")


def sends_nothing(connection, over):
    connection.recv(4096)
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")


def talks_nonsense(connection, over):
    connection.recv(4096)
    connection.sendall(b"\0" * 100)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says_nothing, "said nothing for 0.5 s"),
        (says_nothing_after_its_head, "said nothing for 0.5 s"),
        (drips, "less than 1024 a second"),
        (breaks_off, "ended after 3 of 1000|IncompleteRead|more expected"),
        (sends_nothing, "ended after 0 of"),
        (talks_nonsense, "cannot be downloaded"),
    ],
)
def test_a_bad_server_ends_in_a_sentence_and_leaves_nothing(answer, words, serve, tmp_path):
    address = f"http://127.0.0.1:{serve(answer)}/w.pth"
    model = SafeCheckpointer(nn.Linear(1, 1), save_to_disk=False)
    assert "cannot be downloaded" in refused(lambda: model.load(address), words)
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert left == []


def test_what_was_downloaded_is_checked_as_a_file_is(serve, tmp_path):
    """By the hash beside it, if there is one."""
    model = SafeCheckpointer(nn.Linear(1, 1), save_to_disk=False)
    stored = io.BytesIO()
    torch.save({"model": model.model.state_dict()}, stored)

    def sends_weights(connection, over):
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + stored.getvalue())

    address = f"http://127.0.0.1:{serve(sends_weights)}/w.pth"
    model.load(address)
    (copy,) = (tmp_path / "cache").rglob("w.pth")
    copy.with_name("w.pth.sha256").write_text(hashlib.sha256(stored.getvalue()).hexdigest())
    model.load(address)
    copy.write_bytes(stored.getvalue() + b"\1")
    refused(lambda: model.load(address), "are damaged")
    refused(lambda: model.load(f"{address}?matching_heuristics=True"), "are damaged")


def test_two_hosts_with_one_path_are_two_files(serve):
    def saying(text: bytes):
        def answer(connection, over):
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + text)

        return answer

    ports = [serve(saying(text)) for text in (b"one", b"two")]
    for _ in range(2):  # the second time out of the cache
        paths = [
            fetching.fetch(f"http://127.0.0.1:{port}/models/w.pth", what="weights")
            for port in ports
        ]
        assert [Path(path).read_bytes() for path in paths] == [b"one", b"two"]


def test_the_corpus_is_large(tmp_path):
    parts = [hostile.pickles(tmp_path), hostile.checkpoints(tmp_path), hostile.configs(tmp_path),
             hostile.annotations(), hostile.pictures(), hostile.manifests(), hostile.model_files(),
             hostile.places()]  # fmt: skip
    assert sum(map(len, parts)) >= 120
