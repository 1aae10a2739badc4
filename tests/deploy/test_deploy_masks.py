"""Masks in deployment: pasted as Detectron2 does it, exact in every format, in results and in AP."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import cv2
import numpy as np
import pytest
import torch
from builders import tiny_model
from deploy_case import mask_exported, mask_run, mask_source, needs, quiet_source
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.layers.mask_ops import paste_masks_in_image
from pycocotools import mask as coco_masks

import era_runtime
from era.deploy import evaluate, formats, parity
from era.deploy import export as export_module
from era.deploy.export import export
from era.errors import UserError
from era_runtime import Detections
from era_runtime import predict as predict_module
from era_runtime.draw import draw
from era_runtime.masks import paste_masks
from era_runtime.results import coco_results

# ---- pasting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [14, 28])
def test_masks_are_pasted_as_detectron2_does_it(cells):
    """Boxes of 0.3 to 300 pixels, many of which reach out of the image."""
    draw = np.random.default_rng(cells)
    height, width = 97, 133
    middle = draw.uniform(1, [width - 1, height - 1], (200, 2))
    half = np.exp(draw.uniform(np.log(0.15), np.log(150), (200, 2)))
    boxes = np.concatenate([middle - half, middle + half], axis=1).astype(np.float32)
    masks = draw.random((200, cells, cells), dtype=np.float32)
    found = paste_masks(masks, boxes, height, width)
    expected = paste_masks_in_image(*map(torch.from_numpy, (masks, boxes)), (height, width))
    assert found.dtype == bool and found.shape == (200, height, width) and found.sum() > 10000
    # a value at the very threshold may round to either side
    assert (found != expected.numpy()).sum() <= 2


def test_pasting_by_hand():
    full = np.ones((1, 4, 4), np.float32)
    found = paste_masks(full, np.array([[2, 1, 5, 4]], np.float32), 6, 7)
    expected = np.zeros((6, 7), bool)
    expected[1:4, 2:5] = True
    np.testing.assert_array_equal(found[0], expected)
    left = np.float32([[[1, 0], [1, 0]]])  # half of the box, whose cells are two pixels wide
    found = paste_masks(left, np.array([[0, 0, 4, 4]], np.float32), 4, 4)
    np.testing.assert_array_equal(found[0], [[True, True, False, False]] * 4)
    outside = paste_masks(full, np.array([[-9, -9, -3, -3]], np.float32), 6, 7)
    assert outside.shape == (1, 6, 7) and not outside.any()
    assert paste_masks(full[:0], np.zeros((0, 4), np.float32), 6, 7).shape == (0, 6, 7)


# ---- exports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [needs(name) for name in formats.FORMATS])
def test_exported_masks_equal_eager_at_many_sizes_and_on_an_empty_image(name):
    folder, report = mask_exported(name)
    assert report.problems == []
    assert len({case.input_size for case in report.cases}) >= 5
    assert any(case.eager == case.exported == 0 for case in report.cases)
    assert sum(case.eager for case in report.cases) > 10
    assert max(case.mask_difference for case in report.cases) < 1e-4
    assert min(case.mask_iou for case in report.cases) > 0.95
    written = json.loads((folder / "parity.json").read_text())
    assert {"mask_difference", "mask_iou"} < written["cases"][0].keys()
    assert "masks" in json.loads((folder / "manifest.json").read_text())["outputs"]
    predictor = era_runtime.load(folder)
    for image in parity.sample_images(predictor.rules)[:2]:
        found = predictor(image)
        assert found.masks.shape == (len(found), *image.shape[:2]) and found.masks.dtype == bool
        assert found.masks.any()


@pytest.mark.parametrize("name", [needs(name) for name in ("torchscript", "onnx")])
def test_masks_of_a_cascade_equal_eager(name, tmp_path):
    """The mask head reads the boxes of the last stage."""
    cascade = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
    cascade += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    report = export(quiet_source(mask_run(*cascade)), name, str(tmp_path / "folder"))
    assert report.problems == []
    assert sum(one.eager for one in report.cases) > 10
    assert max(one.box_difference for one in report.cases) < 0.005
    assert max(one.mask_difference for one in report.cases) < 0.001
    assert min(one.mask_iou for one in report.cases) > 0.999


def test_detectron2_folder_predicts_the_masks_of_the_default_predictor():
    folder, _ = mask_exported("detectron2")
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    image = parity.sample_images(mask_source().rules)[2]
    expected = DefaultPredictor(cfg)(image)["instances"]
    found = era_runtime.load(folder)(image)
    assert len(found) == len(expected) > 0
    assert (found.masks != expected.pred_masks.numpy()).sum() <= 2  # values at the very threshold


@pytest.mark.parametrize("name", [needs("onnx")])
def test_int8_leaves_the_mask_head_float(name, tmp_path):
    import onnx

    images = parity.sample_images(mask_source().rules)[:3]
    report = export(mask_source(), name, str(tmp_path / "int8"), calibration=images)
    assert all(case.mask_difference is not None for case in report.cases)
    graph = onnx.load(str(tmp_path / "int8/model.onnx")).graph
    restored = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    convs = [n for n in graph.node if n.op_type in ("Conv", "ConvTranspose")]
    assert any("/mask_head/" in n.name for n in convs)
    for node in convs:  # input 1: weights
        assert (node.input[1] in restored) == node.name.startswith("/backbone/"), node.name


def test_a_wrong_mask_head_fails_and_leaves_nothing(tmp_path, monkeypatch):
    def wrong(what, name, folder, *args):
        what = what.with_score_threshold(
            what.model.roi_heads.box_predictor.test_score_thresh
        )  # a copy
        with torch.no_grad():
            what.model.roi_heads.mask_head.predictor.bias += 0.1
        formats.write_model(what, name, folder, *args)

    monkeypatch.setattr(export_module, "write_model", wrong)
    with pytest.raises(UserError, match=r"at \d+x\d+ pixels a mask is off by .* nothing was kept"):
        export(mask_source(), "torchscript", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def one(masks=None, probabilities=None) -> Detections:
    """One detection in an image of 4x4 pixels."""
    box, score, classes = np.float32([[0, 0, 4, 4]]), np.float32([0.9]), np.array([0])
    return Detections(box, score, classes, ("disk",), masks, probabilities)


def test_parity_of_masks_by_hand():
    kwargs = {"tolerance": parity.Tolerance(), "score_threshold": 0.05, "max_detections": 100}
    left, top = np.zeros((2, 1, 4, 4), bool)
    left[:, :, :2] = top[:, :2] = True
    cells = np.full((1, 2, 2), 0.25, np.float32)
    case = parity.compare_one(one(left, cells), one(top, cells + 0.125), **kwargs)
    assert (case.mask_difference, case.mask_iou) == (0.125, pytest.approx(4 / 12))
    empty = np.zeros_like(left)
    case = parity.compare_one(one(empty, cells), one(empty, cells), **kwargs)
    assert (case.mask_difference, case.mask_iou) == (0.0, 1.0)
    assert parity.compare_one(one(), one(), **kwargs).mask_difference is None

    images = [np.zeros((4, 4, 3), np.uint8)]

    class Fixed:
        rules = mask_source().rules

        def __init__(self, found):
            self.found = found

        def one_call(self, images):
            if isinstance(self.found, Exception):
                raise self.found
            return [self.found]

    def problems(found):
        return " ".join(
            parity.compare(Fixed(one(left, cells)), Fixed(found), [images], **kwargs).problems
        )

    assert "a mask is off by 0.125" in problems(one(left, cells + 0.125))
    assert "a mask is off by nan" in problems(one(left, np.full_like(cells, np.nan)))
    assert "a mask is off by inf" in problems(one())  # an export that gives no masks
    assert "a mask has IoU 0.333" in problems(one(top, cells))
    assert "at 4x4 pixels it fails (no such shape)" in problems(RuntimeError("no such\nshape"))


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [needs("onnx")])
def test_a_runtime_that_fails_without_detections_is_refused(name, tmp_path):
    """onnxruntime cannot reshape a group norm's empty input."""
    source = quiet_source(
        mask_run("MODEL.ROI_MASK_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.CONV_DIM", 32)
    )
    with pytest.raises(UserError, match=r"at 120x120 pixels it fails \(.*nothing was kept"):
        export(source, name, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_keypoints_are_refused(tmp_path):
    model = copy.deepcopy(mask_source().model)
    model.roi_heads.keypoint_on = True
    source = dataclasses.replace(mask_source(), model=model)
    with pytest.raises(UserError, match="format torchscript gives boxes and masks alone"):
        export(source, "torchscript", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_alpha_1_with_masks_is_refused():
    distiller = tiny_model("mask_era", "MODEL.ERA.ALPHA", "1.0")
    with pytest.raises(UserError, match=r"mask or keypoint head.*gives boxes alone"):
        distiller.deployable()


# ---- results and pictures --------------------------------------------------------------------------


def test_results_hold_run_lengths_and_pictures_paint_them(tmp_path):
    folder, _ = mask_exported("torchscript")
    image = parity.sample_images(mask_source().rules)[1]
    cv2.imwrite(str(tmp_path / "a.png"), image)
    out = tmp_path / "out"
    arguments = ["--model", str(folder), "--output", str(out), str(tmp_path / "a.png")]
    assert predict_module.main([*arguments, "--score", "0.4"]) == 0
    found = mask_source().predictor()(image)
    found = found.select(found.scores >= 0.4)
    results = json.loads((out / "results.json").read_text())
    assert len(results) == len(found) > 0
    for result, mask in zip(results, found.masks, strict=True):
        np.testing.assert_array_equal(coco_masks.decode(result["segmentation"]), mask)

    inside = np.zeros((1, *image.shape[:2]), bool)
    inside[0, 40:60, 30:50] = True
    boxes = np.float32([[30, 40, 50, 60]])
    plain = Detections(boxes, np.float32([0.9]), np.array([0]), ("disk",))
    differ = (draw(image, plain) != draw(image, dataclasses.replace(plain, masks=inside))).any(-1)
    assert differ[42:58, 32:48].mean() > 0.9 and not (differ & ~inside[0]).any()


def test_without_pycocotools_a_model_with_masks_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)  # an import of it fails
    folder, _ = mask_exported("torchscript")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 40, 3), np.uint8))
    out = tmp_path / "out"
    arguments = ["--model", str(folder), "--output", str(out), str(tmp_path / "a.png")]
    assert predict_module.main(arguments) == predict_module.EXIT_USER_ERROR
    assert "a result with masks needs pycocotools" in capsys.readouterr().err
    assert not out.exists()


# ---- AP --------------------------------------------------------------------------------------------


def test_ap_of_masks_is_that_of_detectron2(tmp_path, capsys):
    eager, data = mask_source().predictor(), {"info": {}, "images": [], "annotations": []}
    for i, image in enumerate(parity.sample_images(eager.rules)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
        size = {"height": image.shape[0], "width": image.shape[1]}
        data["images"].append({"id": 10 + i, "file_name": f"{i}.png", **size})
        found = eager(image)
        found = dataclasses.replace(found, masks=np.roll(found.masks, 1, axis=2))  # moved a little
        for result in coco_results(found, 10 + i, eager.categories)[::2]:
            area = int(coco_masks.area(result["segmentation"]))
            entry = {**result, "id": len(data["annotations"]) + 1, "area": area, "iscrowd": 0}
            data["annotations"] += [entry] if area else []
    data["categories"] = eager.categories
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(data))

    folder = str(mask_exported("torchscript")[0])
    found = evaluate.coco_ap(era_runtime.load(folder), str(annotations), str(tmp_path))
    register_coco_instances("mask_case", {}, str(annotations), str(tmp_path))
    try:
        mapper = DatasetMapper(mask_source().cfg, is_train=False)
        records = DatasetCatalog.get("mask_case")
        loader = build_detection_test_loader(records, mapper=mapper, num_workers=0)
        evaluator = COCOEvaluator("mask_case", use_fast_impl=False)
        expected = inference_on_dataset(mask_source().eager, loader, evaluator)
    finally:
        DatasetCatalog.remove("mask_case")
        MetadataCatalog.remove("mask_case")
    assert found.keys() == {"bbox", "segm"}
    assert 5 < found["segm"]["AP"] < 99
    for kind, metric in [(k, m) for k in found for m in ("AP", "AP50", "AP75")]:
        assert found[kind][metric] == pytest.approx(expected[kind][metric], abs=1e-6)

    arguments = [folder, "--annotations", str(annotations), "--images", str(tmp_path)]
    assert evaluate.evaluate_main([*arguments, "--max-drop", "0.01"]) == 0
    told = capsys.readouterr().out
    assert "boxes" in told and "masks" in told and told.count("+0.00") == 2
