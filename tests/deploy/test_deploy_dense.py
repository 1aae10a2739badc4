"""RetinaNet and FCOS in deployment: parity in every format, alpha 0 and 1, int8, results and AP without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from deploy_case import FOLDER, ROOT, SMALL, exported, needs, run, score_key, source
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from test_deploy_runtime import CLEAN

import era_runtime
from era.checkpoint.reading import strip_student
from era.config import get_era_cfg, load_config
from era.deploy import evaluate, formats, parity
from era.deploy import export as export_module
from era.deploy.export import export
from era.deploy.source import load_source
from era.errors import UserError
from era.report.deployed import measure, read_deployed

RETINANET, FCOS = "retinanet_era", "fcos_era"
# What each export is for; the other combinations share all of their code with one of these.
EXPORTS = [
    ("detectron2", RETINANET, 0), ("detectron2", FCOS, 1),
    ("torchscript", RETINANET, 1), ("torchscript", FCOS, 0),
    ("onnx", RETINANET, 0), ("onnx", RETINANET, 1), ("onnx", FCOS, 0), ("onnx", FCOS, 1),
    ("openvino", RETINANET, 0), ("openvino", FCOS, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "alpha"),
    [pytest.param(*needs(name).values, *rest, marks=needs(name).marks) for name, *rest in EXPORTS],
)
def test_export_equals_eager_at_many_sizes_and_on_an_empty_image(name, config, alpha):
    folder, report = exported(name, alpha, config)
    assert report.problems == []
    assert len({case.input_size for case in report.cases}) >= 5
    assert report.empty_checked == "image"
    assert any(case.eager == case.exported == 0 for case in report.cases)
    assert sum(case.eager for case in report.cases) > 10
    assert max(case.box_difference for case in report.cases) < 0.005
    manifest = json.loads((folder / "manifest.json").read_text())
    model = source(alpha, config).model
    assert manifest["outputs"].keys() == {"boxes", "scores", "classes"}
    assert manifest["score_threshold"] == pytest.approx(model.test_score_thresh)
    assert (
        manifest["nms_threshold"] == model.test_nms_thresh == (0.5 if "retina" in config else 0.6)
    )
    assert (manifest["max_detections"], manifest["num_classes"]) == (100, 8)
    assert set(manifest["files"]) | {"manifest.json"} == {p.name for p in folder.iterdir()}
    assert not list(FOLDER.glob(".*")), "temporary folders are gone"


@pytest.mark.parametrize("config", [RETINANET, FCOS])
def test_alpha_1_is_the_blended_detector_without_the_teachers_backbone(config):
    """On a batch of two sizes what :class:`era.modeling.detectors.dense_inference.BlendedDense` gives."""
    deployed = source(1, config)
    inputs = [{"image": torch.rand(3, *size) * 255} for size in ((96, 128), (100, 75))]
    with torch.no_grad():
        expected, found = deployed.eager.inference(inputs), deployed.model(inputs)
    for a, b in zip(expected, found, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) > 0 and torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
        torch.testing.assert_close(a.scores, b.scores)
    distiller = deployed.eager
    parts = distiller.student.backbone, distiller.methods["era"].estimator
    parts += (distiller.teacher.model.head,)
    count = sum(p.numel() for part in parts for p in part.parameters())
    assert sum(p.numel() for p in deployed.model.parameters()) == count


@pytest.mark.parametrize(
    ("config", "plain"), [(RETINANET, "retinanet_plain"), (FCOS, "fcos_plain")]
)
def test_alpha_0_is_the_detector_that_never_heard_of_distillation(config, plain):
    """Weights, by name and number, and detections of the model of the plain config."""
    deployed = source(0, config)
    key = score_key(run(config))
    opts = [*SMALL, *deployed.opts[deployed.opts.index(key) :]]
    model = build_model(load_config(str(ROOT / f"configs/toy/{plain}.yaml"), opts))
    weights = torch.load(run(config) / "model_final.pth")["model"]
    model.load_state_dict(strip_student(weights), strict=True)
    assert model.state_dict().keys() == deployed.model.state_dict().keys()
    image = torch.rand(3, 100, 128) * 255
    with torch.no_grad():
        (expected,), (found,) = (m.eval()([{"image": image}]) for m in (model, deployed.model))
    assert len(expected["instances"]) > 0
    assert torch.equal(
        expected["instances"].pred_boxes.tensor, found["instances"].pred_boxes.tensor
    )


def test_a_plain_retinanet_is_a_stock_folder(tmp_path):
    """Of a plain run's config and weights: stock ``get_cfg`` reads the config, ``DefaultPredictor`` gives what the deployed
    model gives, boxes at the border clipped to the image included."""
    weights = tmp_path / "plain.pth"
    saved = torch.load(run(RETINANET) / "model_final.pth")["model"]
    torch.save({"model": strip_student(saved)}, weights)
    plain = load_source(
        config_file=str(ROOT / "configs/toy/retinanet_plain.yaml"),
        weights=str(weights),
        opts=[str(o) for o in [*SMALL, *source(0, RETINANET).opts]],
    )
    export(plain, "detectron2", str(tmp_path / "folder"))
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "folder/config.yaml"))
    cfg.MODEL.WEIGHTS = str(tmp_path / "folder/model.pth")
    image = parity.sample_images(plain.rules)[2]
    expected = DefaultPredictor(cfg)(image)["instances"]
    found = era_runtime.load(tmp_path / "folder")(image)
    assert len(found) > 0
    np.testing.assert_array_equal(expected.pred_boxes.tensor.numpy(), found.boxes)
    np.testing.assert_array_equal(expected.scores.numpy(), found.scores)
    height, width = image.shape[:2]
    assert found.boxes.min() == 0.0 and found.boxes[:, [0, 2]].max() <= width
    assert found.boxes[:, [1, 3]].max() <= height


def test_an_fcos_folder_names_its_family_in_keys_of_this_project():
    """Detectron2 has no keys for FCOS: with those of ``get_era_cfg`` its folder is one for ``DefaultPredictor``."""
    folder, _ = exported("detectron2", 0, FCOS)
    with pytest.raises(KeyError, match=r"Non-existent config key: MODEL\.FCOS"):
        get_cfg().merge_from_file(str(folder / "config.yaml"))
    cfg = get_era_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    image = parity.sample_images(source(0, FCOS).rules)[2]
    expected = DefaultPredictor(cfg)(image)["instances"]
    found = era_runtime.load(folder)(image)
    assert len(found) > 0
    np.testing.assert_array_equal(expected.pred_boxes.tensor.numpy(), found.boxes)


@pytest.mark.parametrize("name", [needs("onnx")])
@pytest.mark.parametrize("config", [RETINANET, FCOS])
def test_the_onnx_graph_holds_all_and_has_no_branch(name, config):
    """Points or anchors, decoding and NMS: what is fed is an image."""
    import onnx

    model = onnx.load(str(exported(name, 0, config)[0] / "model.onnx"))
    operators = {node.op_type for node in model.graph.node}
    assert {o.domain: o.version for o in model.opset_import}[""] == 17
    assert [value.name for value in model.graph.input] == ["image"]
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "classes"]
    assert "NonMaxSuppression" in operators and not operators & {"If", "Loop", "RoiAlign"}


@pytest.mark.parametrize("name", [needs("onnx")])
def test_int8_quantises_the_backbone_and_keeps_the_head_float(name, tmp_path):
    import onnx

    images = parity.sample_images(source(0, RETINANET).rules)[:3]
    report = export(source(0, RETINANET), name, str(tmp_path / "int8"), calibration=images)
    assert report.empty_checked == "image"  # also without a box at any level
    graph = onnx.load(str(tmp_path / "int8/model.onnx")).graph
    restored = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    assert any("/top_block/p7/" in n.name for n in convs)  # p6 and p7 are of the FPN
    assert any("/head/" in n.name for n in convs)
    for node in convs:  # input 1: weights
        assert (node.input[1] in restored) == node.name.startswith("/backbone/"), node.name


@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param(*needs(name).values, config, marks=needs(name).marks)
        for name, config in (("onnx", RETINANET), ("openvino", FCOS))
    ],
)
def test_predicts_without_torch_and_detectron2_as_eager_does(name, config, tmp_path):
    folder, _ = exported(name, 0, config)
    eager = source(0, config).predictor()
    images = parity.sample_images(eager.rules)[:2]
    for i, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, "--model", folder, "--output", tmp_path / "out", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT / "projects/ERA"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    for i, image in enumerate(images):
        expected = eager(image)
        mine = [r["score"] for r in results if r["image_id"] == i + 1]
        assert len(mine) > 0
        np.testing.assert_allclose(sorted(mine), sorted(expected.scores), atol=1e-4)
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2


def test_evaluate_beside_eager(tmp_path, capsys):
    """AP of a folder whose model detects with the teacher's head, on ground truth that is a part of what it finds."""
    eager, data = source(1, RETINANET).predictor(), {"info": {}, "images": [], "annotations": []}
    for i, image in enumerate(parity.sample_images(eager.rules)[:3]):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
        height, width = image.shape[:2]
        data["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        found = eager(image)
        for box, c in list(zip(found.boxes, found.classes, strict=True))[::7]:
            x, y, w, h = (float(v) for v in (*box[:2], *(box[2:] - box[:2])))
            entry = {"id": len(data["annotations"]) + 1, "image_id": i, "category_id": int(c) + 1}
            data["annotations"].append({**entry, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
    data["categories"] = eager.categories
    (tmp_path / "a.json").write_text(json.dumps(data))
    folder = str(exported("torchscript", 1, RETINANET)[0])
    arguments = ["--annotations", str(tmp_path / "a.json"), "--images", str(tmp_path)]
    run_of = ["--run", str(run(RETINANET))]
    assert evaluate.evaluate_main([folder, *arguments, *run_of, "--max-drop", "0.01"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["boxes", "eager", folder]
    assert told[2].endswith("+0.00") and float(told[2].split()[1]) > 1


@pytest.mark.parametrize("name", [needs("onnx")])
def test_a_report_tells_size_parity_and_time_of_its_folder(name):
    folder, parity_report = exported(name, 0, FCOS)
    times = measure([folder], 2)
    (found,) = read_deployed([folder], times)
    assert (found.format, found.precision, found.alpha) == ("onnx", "float32", 0)
    assert found.megabytes == pytest.approx((folder / "model.onnx").stat().st_size / 1e6)
    assert found.box_difference == max(case.box_difference for case in parity_report.cases)
    assert len(times[str(folder)]) == 2 and found.milliseconds[0] > 0


def test_a_wrong_head_fails_and_leaves_nothing(tmp_path, monkeypatch):
    def wrong(what, name, folder, *args):
        what = what.with_score_threshold(what.model.test_score_thresh)  # a copy
        with torch.no_grad():
            what.model.head.bbox_pred.bias += 0.05
        formats.write_model(what, name, folder, *args)

    monkeypatch.setattr(export_module, "write_model", wrong)
    with pytest.raises(
        UserError, match=r"differs from eager: at \d+x\d+ pixels .*nothing was kept"
    ):
        export(source(0, FCOS), "torchscript", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "weights", "classes", "message"),
    [
        # weights of another family
        ("retinanet_plain", "era", 8, r"do not fit the model of the config: the file lacks "),
        ("fcos_plain", RETINANET, 8, r"do not fit the model of the config: the file has .* of shape "),
        # names for another number of classes than the family's own key says
        ("retinanet_plain", RETINANET, 3, r"3 class names were found and MODEL.RETINANET.NUM_CLASSES is 8"),
        ("fcos_plain", FCOS, 3, r"3 class names were found and MODEL.FCOS.NUM_CLASSES is 8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(config, weights, classes, message, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(f"c{i}" for i in range(classes)))
    with pytest.raises(UserError, match=message):
        load_source(
            config_file=str(ROOT / f"configs/toy/{config}.yaml"),
            weights=str(run(weights) / "model_final.pth"),
            opts=[str(o) for o in SMALL],
            classes_file=str(tmp_path / "classes.txt"),
        )
