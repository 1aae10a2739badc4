"""``tools/predict.py`` and what lies in folders: pipes, names that are no UTF-8, bad pictures; and a full disk."""

from __future__ import annotations

import builtins
import errno
import importlib.util
import json
import os

import hostile
import numpy as np
import pytest
from PIL import Image

from era_runtime import results
from era_runtime.predict import EXIT_FAILED, main

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="the extra deploy is not installed",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a model that finds one box in every picture."""
    folder = tmp_path_factory.mktemp("model")
    hostile.onnx_folder(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    """A folder with one good picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(folder / "good.png")
    return folder


def test_a_pipe_in_the_folder_is_named_and_not_waited_for(model, photos, tmp_path, capsys):
    os.mkfifo(photos / "a.jpg")
    out = tmp_path / "out"
    assert main([str(photos), "--model", model, "--output", str(out)]) == EXIT_FAILED
    assert len(json.loads((out / "results.json").read_text())) == 1
    assert "a.jpg cannot be read (it is no ordinary file)" in capsys.readouterr().err


def test_a_name_that_is_no_utf8_comes_back(model, photos, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    os.rename(photos / "good.png", photos / name)
    bad = os.fsdecode(b"\xff\xfe.jpg")
    (photos / bad).write_bytes(b"noise")
    out = tmp_path / "out"
    assert main([str(photos), "--model", model, "--output", str(out)]) == EXIT_FAILED
    content = (out / "images.json").read_bytes().decode("utf-8")
    (entry,) = json.loads(content)["images"]
    assert os.fsencode(entry["file_name"]) == os.fsencode(photos / name)
    assert (out / os.fsdecode(b"caf\xe9.jpg")).exists()
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("on_bad_image", ["skip", "stop"])
def test_a_bad_picture_is_named_and_decides_as_asked(model, photos, tmp_path, capsys, on_bad_image):
    (photos / "bad.jpg").write_bytes(hostile.encoded("JPEG")[:-300])
    out = tmp_path / "out"
    arguments = [
        str(photos),
        "--model",
        model,
        "--output",
        str(out),
        "--on-bad-image",
        on_bad_image,
    ]
    assert main(arguments) == EXIT_FAILED
    assert "bad.jpg cannot be read" in capsys.readouterr().err
    assert len(json.loads((out / "results.json").read_text())) == (on_bad_image == "skip")


def test_the_limit_of_pixels_can_be_set(model, photos, tmp_path, capsys):
    arguments = [str(photos), "--model", model, "--max-pixels", "1199"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == EXIT_FAILED
    assert "more than the limit of 1199" in capsys.readouterr().err


@pytest.mark.parametrize("pictures", [True, False])
def test_a_full_disk_is_one_sentence(model, photos, tmp_path, capsys, monkeypatch, pictures):
    """Nothing half written stays, neither a picture nor a JSON file."""

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results, "open", lambda *a: Full(builtins.open(*a)), raising=False)  # noqa: SIM115
    out = tmp_path / "out"
    arguments = [str(photos), "--model", model, "--output", str(out)]
    assert main(arguments + ([] if pictures else ["--no-pictures"])) == EXIT_FAILED
    error = capsys.readouterr().err
    assert f"error: --output {out} cannot be written (No space left on device)" in error
    assert error.count("\n") == 1 and list(out.iterdir()) == []
