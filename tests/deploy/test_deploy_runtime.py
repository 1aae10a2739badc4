"""The runtime package: exact preprocessing, no torch where none is needed, predict and evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from deploy_case import ROOT, exported, mask_exported, mask_source, needs, source
from detectron2.data import transforms
from detectron2.data.detection_utils import read_image as detectron2_read_image
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from PIL import Image

import era_runtime
from era.deploy import evaluate, parity
from era.errors import UserError
from era_runtime import DeploymentError
from era_runtime import predict as predict_module
from era_runtime.preprocess import InputRules, preprocess, read_image, scale_back

# ---- Detectron2's arithmetic, exactly --------------------------------------------------------------


@pytest.mark.parametrize("order", ["BGR", "RGB"])
@pytest.mark.parametrize(
    ("size", "rules"),
    [
        ((480, 640), (800, 1333)),  # up
        ((1200, 1600), (128, 128)),  # down, the longer edge decides
        ((97, 511), (96, 256)),  # odd, long
        ((333, 100), (96, 1000)),  # high
        ((128, 128), (128, 128)),  # as it is
        ((50, 60), (0, 0)),  # not scaled at all
    ],
)
def test_preprocess_is_resize_shortest_edge_bit_for_bit(size, rules, order):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = preprocess(image, InputRules(*rules, order))
    if order == "RGB":
        image = image[:, :, ::-1]
    augmentation = transforms.ResizeShortestEdge([rules[0], rules[0]], rules[1])
    expected = augmentation.get_transform(image).apply_image(image)
    np.testing.assert_array_equal(found, expected.astype("float32").transpose(2, 0, 1))


def test_scale_back_is_detector_postprocess_bit_for_bit():
    draw = np.random.default_rng(0)
    corners = draw.uniform(-20, 150, (200, 4)).astype(
        np.float32
    )  # some leave the image, some are empty
    for from_size, to_size in (
        ((96, 128), (480, 641)),
        ((128, 75), (333, 195)),
        ((64, 64), (7, 9)),
    ):
        boxes, keep = scale_back(corners, from_size, to_size)
        instances = Instances(from_size, pred_boxes=Boxes(torch.from_numpy(corners.copy())))
        expected = detector_postprocess(instances, *to_size).pred_boxes.tensor.numpy()
        assert 0 < len(expected) < 200
        np.testing.assert_array_equal(boxes[keep], expected)


@pytest.mark.parametrize("orientation", [1, 6])
def test_read_image_reads_as_detectron2_does(tmp_path, orientation):
    path = str(tmp_path / "image.jpg")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    np.testing.assert_array_equal(read_image(path), detectron2_read_image(path, format="BGR"))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        "x",
    ],
)
def test_an_array_of_another_kind_is_refused(image):
    with pytest.raises(DeploymentError, match="expected an array"):
        preprocess(image, InputRules(96, 128, "BGR"))


def test_an_image_that_scales_to_nothing_is_refused():
    with pytest.raises(DeploymentError, match="too narrow"):
        preprocess(np.zeros((1, 5000, 3), np.uint8), InputRules(96, 128, "BGR"))


# ---- where torch is not needed ---------------------------------------------------------------------

CLEAN = """
import sys
BLOCKED = ("torch", "torchvision", "detectron2", "era", "fvcore", "iopath")
for name in BLOCKED:
    sys.modules[name] = None  # an import of it fails
import json
import era_runtime
from era_runtime.predict import main
status = main(sys.argv[1:])
loaded = [n for n in sys.modules if n.split(".")[0] in BLOCKED and sys.modules[n] is not None]
assert not loaded, loaded
sys.exit(status)
"""


@pytest.mark.parametrize("name", [needs("onnx"), needs("openvino")])
@pytest.mark.parametrize("masks", [False, True])
def test_predicts_without_torch_and_detectron2_as_eager_does(name, masks, tmp_path):
    folder, _ = mask_exported(name) if masks else exported(name)
    eager = (mask_source() if masks else source(0)).predictor()
    images = parity.sample_images(eager.rules)[:3]
    for i, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, "--model", folder, "--output", tmp_path / "out", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT / "projects/ERA"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    for i, image in enumerate(images):
        expected = eager(image)
        mine = [r for r in results if r["image_id"] == i + 1]
        assert len(mine) == len(expected)
        assert all(("segmentation" in r) == masks for r in mine)
        np.testing.assert_allclose(
            sorted(r["score"] for r in mine), sorted(expected.scores), atol=1e-4
        )
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 3


# ---- Predictor -------------------------------------------------------------------------------------


def test_batches_of_detectron2_and_lists_for_all(tmp_path):
    images = parity.sample_images(source(0).rules)
    one = [source(0).predictor()(image) for image in images]
    # equal input sizes in a batch: no padding, so the batch changes nothing
    batch = era_runtime.load(exported("detectron2")[0], batch_size=3)([images[1]] * 4)
    for found in batch:
        np.testing.assert_allclose(found.boxes, one[1].boxes, atol=1e-3)
    listed = era_runtime.load(exported("torchscript")[0])(images)
    for found, expected in zip(listed, one, strict=True):
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        assert found.class_names == tuple(source(0).categories[c]["name"] for c in found.classes)
    assert era_runtime.load(exported("torchscript")[0])([]) == []


@pytest.mark.parametrize("size", [0, 2])
def test_a_batch_size_that_the_model_cannot_take_is_refused(size):
    with pytest.raises(
        DeploymentError, match=f"batch size {size} .*torchscript model takes 1 to 1"
    ):
        era_runtime.load(exported("torchscript")[0], batch_size=size)


# ---- predict.py ------------------------------------------------------------------------------------


def test_predict_reports_what_it_cannot_read_and_goes_on(tmp_path, capsys):
    images = parity.sample_images(source(0).rules)
    for name in ("a/x.png", "b/x.png"):  # equal names get files of their own
        (tmp_path / name).parent.mkdir()
        cv2.imwrite(str(tmp_path / name), images[0])
    (tmp_path / "b/bad.jpg").write_text("no picture")
    cv2.imwrite(str(tmp_path / "b/narrow.png"), np.zeros((1, 5000, 3), np.uint8))
    out = tmp_path / "out"
    folder = str(exported("detectron2")[0])
    arguments = ["--model", folder, "--output", str(out), "--batch-size", "4"]
    status = predict_module.main([*arguments, str(tmp_path / "a"), str(tmp_path / "b/*")])
    assert status == predict_module.EXIT_FAILED
    told = capsys.readouterr()
    assert "bad.jpg cannot be read" in told.err and "narrow.png" in told.err
    listed = json.loads((out / "images.json").read_text())
    assert [e["file_name"][-7:] for e in listed["images"]] == ["a/x.png", "b/x.png"]
    assert {p.name for p in out.iterdir()} == {"x.jpg", "x-2.jpg", "results.json", "images.json"}
    result = json.loads((out / "results.json").read_text())[0]
    assert set(result) == {"image_id", "category_id", "bbox", "score"}


def test_predict_on_a_video(tmp_path):
    frames = [np.roll(parity.sample_images(source(0).rules)[1], 5 * i, 1) for i in range(5)]
    path = str(tmp_path / "clip.mp4")
    writer = cv2.VideoWriter(
        path, cv2.VideoWriter_fourcc(*"mp4v"), 10, (frames[0].shape[1] & ~1, frames[0].shape[0])
    )
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[:, : frame.shape[1] & ~1]))
    writer.release()
    if not os.path.isfile(path) or not cv2.VideoCapture(path).isOpened():
        pytest.skip("this OpenCV writes no mp4")
    out = tmp_path / "out"
    folder = str(exported("torchscript")[0])
    assert predict_module.main(["--model", folder, "--output", str(out), path]) == 0
    images = json.loads((out / "images.json").read_text())["images"]
    assert [e["frame"] for e in images] == list(range(5))
    assert cv2.VideoCapture(str(out / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing/*.jpg"], "names no picture"),
        (["tests", "--score", "2"], "expected a number from 0 to 1"),
        (
            [str(ROOT / "setup.cfg"), "--batch-size", "8"],
            "the torchscript model takes 1 to 1 at once",
        ),
        ([str(ROOT / "setup.cfg"), "--model", "configs"], "is no deployment folder"),
    ],
)
def test_predict_refuses_in_one_sentence_and_writes_nothing(tmp_path, capsys, arguments, message):
    model = ["--model", str(exported("torchscript")[0])]
    status = predict_module.main([*model, "--output", str(tmp_path / "out"), *arguments])
    assert status == predict_module.EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- evaluate.py -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A COCO-format dataset whose ground truth is part of what eager finds, moved a little."""
    folder = tmp_path_factory.mktemp("coco")
    eager, images, annotations = source(0).predictor(), [], []
    for i, image in enumerate(parity.sample_images(source(0).rules)):
        cv2.imwrite(str(folder / f"{i}.png"), image)
        height, width = image.shape[:2]
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width})
        found = eager(image)
        for box, c in list(zip(found.boxes, found.classes, strict=True))[::2]:
            x, y, w, h = (float(v) for v in (box[0] + 1, box[1], *(box[2:] - box[:2])))
            entry = {"id": len(annotations) + 1, "image_id": 10 + i, "category_id": int(c) + 1}
            annotations.append({**entry, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
    data = {"info": {}, "images": images, "annotations": annotations}
    data["categories"] = source(0).categories
    (folder / "annotations.json").write_text(json.dumps(data))
    return str(folder / "annotations.json"), str(folder)


def test_ap_is_that_of_detectron2(coco, tmp_path):
    from detectron2.data import (
        DatasetCatalog,
        DatasetMapper,
        MetadataCatalog,
        build_detection_test_loader,
    )
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator, inference_on_dataset

    found = evaluate.coco_ap(era_runtime.load(exported("torchscript")[0]), *coco)
    register_coco_instances("deploy_case", {}, *coco)
    try:
        mapper = DatasetMapper(source(0).cfg, is_train=False)
        loader = build_detection_test_loader(
            DatasetCatalog.get("deploy_case"), mapper=mapper, num_workers=0
        )
        evaluator = COCOEvaluator("deploy_case", output_dir=str(tmp_path), use_fast_impl=False)
        expected = inference_on_dataset(source(0).eager, loader, evaluator)["bbox"]
    finally:
        DatasetCatalog.remove("deploy_case")
        MetadataCatalog.remove("deploy_case")
    assert found.keys() == {"bbox"} and found["bbox"]["AP"] > 5
    for metric in ("AP", "AP50", "AP75"):
        assert found["bbox"][metric] == pytest.approx(expected[metric], abs=1e-6)


def test_evaluate_beside_eager(coco, capsys):
    folder = str(exported("torchscript")[0])
    arguments = [folder, "--annotations", coco[0], "--images", coco[1], "--latency", "1"]
    assert evaluate.evaluate_main([*arguments, "--max-drop", "0.01"]) == 0
    told = capsys.readouterr().out
    assert "+0.00" in told and "eager" in told and "ratio; batch 1, one thread" in told


def test_evaluate_refuses_other_classes(coco, tmp_path):
    data = json.loads(Path(coco[0]).read_text())
    data["categories"][0]["name"] = "other"
    (tmp_path / "a.json").write_text(json.dumps(data))
    folder = str(exported("torchscript")[0])
    with pytest.raises(UserError, match="are not the model's"):
        evaluate.evaluate_main(
            [folder, "--annotations", str(tmp_path / "a.json"), "--images", coco[1]]
        )


def test_nothing_detected_is_ap_0(coco):
    predictor = source(0).with_score_threshold(1.0).predictor()
    assert evaluate.coco_ap(predictor, *coco)["bbox"]["AP"] == 0.0
