"""``tools/predict.py --batch``: the files that one picture after the other gives, in the inputs' order."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from deploy_case import FIXED, ROOT, batch_exported, exported, needs
from PIL import Image
from test_deploy_runtime import CLEAN

import era_runtime
from era.deploy import parity
from era.deploy.batched import BatchForm
from era_runtime import predict as predict_module
from era_runtime.predict import EXIT_FAILED, EXIT_USER_ERROR, main

pytestmark = list(needs("onnx").marks)
ANY = BatchForm()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven pictures of three sizes in turn, two of one name."""
    folder = tmp_path_factory.mktemp("photos")
    rules = era_runtime.load(batch_exported("era", ANY)[0]).rules
    images = [image[:, :, ::-1] for image in parity.sample_images(rules)[:3]]
    names = ["a/1.png", "a/2.png", "b/1.png", "b/3.png", "b/4.jpg", "c/5.png", "c/6.png"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        turned = images[i % 3][:, :: 1 if i < 4 else -1]
        Image.fromarray(np.ascontiguousarray(turned)).save(folder / name)
    return folder


def results(out):
    """What was written: names, and detections by picture."""
    listed = json.loads((out / "images.json").read_text())["images"]
    by_picture = {entry["id"]: [] for entry in listed}
    for result in json.loads((out / "results.json").read_text()):
        by_picture[result["image_id"]].append(result)
    assert [entry["id"] for entry in listed] == list(range(1, len(listed) + 1))
    return [entry["file_name"] for entry in listed], list(by_picture.values())


def predicted(folder, out, *arguments, status=0):
    """Run it, and :func:`results`."""
    assert main(["--model", str(folder), "--output", str(out), *map(str, arguments)]) == status
    return results(out)


def check_equal(found, expected):
    """The same pictures in the same order with the same detections, to rounding."""
    assert found[0] == expected[0]
    for own, other in zip(found[1], expected[1], strict=True):
        assert len(own) == len(other) > 0
        for name, places in (("score", 1e-5), ("bbox", 1e-3)):
            np.testing.assert_allclose(
                [r[name] for r in own], [r[name] for r in other], atol=places
            )
        assert [r["category_id"] for r in own] == [r["category_id"] for r in other]


@pytest.mark.parametrize("model", ["onnx", "fixed", "detectron2"])
def test_a_batch_gives_what_one_picture_after_the_other_gives(model, photos, tmp_path, monkeypatch):
    form = {"onnx": ANY, "fixed": FIXED}.get(model)
    folder = exported(model)[0] if form is None else batch_exported("era", form)[0]
    calls = []
    inner = era_runtime.Predictor.one_call
    monkeypatch.setattr(
        era_runtime.Predictor,
        "one_call",
        lambda p, given: (calls.append(len(given)), inner(p, given))[1],
    )
    expected = predicted(folder, tmp_path / "one", "--batch-size", 1, photos)
    found = predicted(folder, tmp_path / "many", "--batch", 3, photos)
    check_equal(found, expected)
    files = sorted(os.listdir(tmp_path / "many"))
    assert files == sorted(os.listdir(tmp_path / "one")) and "1-2.jpg" in files
    for name in files:
        if name.endswith(".jpg"):
            one, many = (
                np.asarray(Image.open(tmp_path / d / name), float) for d in ("one", "many")
            )
            assert np.abs(one - many).mean() < 0.5  # of one picture, not of two
    assert calls[:7] == [1] * 7 and calls[7:] == ([3, 3, 1] if model == "fixed" else [3, 2, 2])


def test_a_model_of_one_picture_a_call_refuses_in_one_sentence(photos, tmp_path, capsys):
    arguments = [
        "--model",
        str(exported("onnx")[0]),
        "--output",
        str(tmp_path / "out"),
        "--batch",
        "8",
    ]
    assert main([*arguments, str(photos)]) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert told.startswith(
        "error: batch size 8 was asked for, but the onnx model takes 1 to 1 at once"
    )
    assert told.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on_bad_image", ["skip", "stop"])
def test_a_bad_picture_is_named_and_the_others_keep_their_places(
    photos, tmp_path, capsys, on_bad_image
):
    bad, cut = tmp_path / "bad.jpg", tmp_path / "cut.png"
    bad.write_text("no picture")
    cut.write_bytes((photos / "a/1.png").read_bytes()[:-2000])  # its head is right
    files = [
        photos / "a/1.png",
        photos / "a/2.png",
        cut,
        photos / "b/3.png",
        bad,
        photos / "c/5.png",
    ]
    arguments = ["--batch", 3, "--on-bad-image", on_bad_image, "--no-pictures", *files]
    names, by_picture = predicted(
        batch_exported("era", ANY)[0], tmp_path / "out", *arguments, status=EXIT_FAILED
    )
    told = capsys.readouterr().err
    assert "cut.png cannot be read" in told and ("bad.jpg" in told) == (on_bad_image == "skip")
    expected = [0, 1, 3, 5] if on_bad_image == "skip" else [0, 1]
    assert names == [str(files[i]) for i in expected]
    single = predicted(
        batch_exported("era", ANY)[0],
        tmp_path / "one",
        "--no-pictures",
        *(files[i] for i in expected),
    )
    check_equal((names, by_picture), single)


@pytest.mark.parametrize("stops", [False, True])
def test_pictures_of_one_size_share_a_call_and_only_neighbours_where_a_bad_one_stops(
    photos, tmp_path, stops
):
    predictor = era_runtime.load(batch_exported("era", ANY)[0], batch_size=2)
    job = predict_module._Job(predictor, str(tmp_path), 0.0, False, 5, 10**8, stops=stops)
    names = ("a/1.png", "b/3.png", "c/6.png", "a/2.png", "b/4.jpg")  # 0, 0, 0, 1, 1 of three sizes
    a, b, c, d, e = (str(photos / name) for name in names)
    assert job.batches([a, b, d, c, e]) == (
        [[a, b], [d], [c], [e]] if stops else [[a, b], [d, e], [c]]
    )


def test_predicts_in_batches_without_torch(photos, tmp_path):
    folder = batch_exported("era", ANY)[0]
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, "--model", folder, "--output", tmp_path / "out", "--batch", "4", photos],
        env={**os.environ, "PYTHONPATH": str(ROOT / "projects/ERA"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_equal(results(tmp_path / "out"), predicted(folder, tmp_path / "one", photos))
