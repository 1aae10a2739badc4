"""Export: parity, the removal proof, the manifest, and requests that cannot be met."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

import numpy as np
import pytest
import torch
from deploy_case import FOLDER, ROOT, SMALL, exported, needs, quiet_source, run, source
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model

import era_runtime
from era.checkpoint.reading import strip_student
from era.config import load_config
from era.deploy import export as export_module
from era.deploy import formats, parity
from era.deploy.export import export
from era.errors import UserError
from era_runtime import Detections

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime not installed",
)


def detections(boxes, scores, classes) -> Detections:
    """Detections from lists."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    names = tuple(str(c) for c in classes)
    return Detections(boxes, np.array(scores, np.float32), np.array(classes, np.int64), names)


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "alpha"),
    [
        pytest.param(*param.values, alpha, marks=param.marks)
        for param in map(needs, formats.FORMATS)
        for alpha in (0, 1)
        if (param.values[0], alpha)
        != ("openvino", 1)  # it is converted from the ONNX, which is here
    ],
)
def test_export_equals_eager_at_many_sizes_and_on_an_empty_image(name, alpha):
    folder, report = exported(name, alpha)
    assert report.problems == []
    assert len({case.input_size for case in report.cases}) >= 5
    assert report.empty_checked == "image"
    assert any(case.eager == case.exported == 0 for case in report.cases)
    assert sum(case.eager for case in report.cases) > 10
    assert max(case.box_difference for case in report.cases) < 0.005
    manifest = json.loads((folder / "manifest.json").read_text())
    on_disk = {path.name for path in folder.iterdir()}
    assert set(manifest["files"]) | {"manifest.json"} == on_disk
    assert {"classes.json", "parity.json"} < on_disk
    assert not list(FOLDER.glob(".*")), "temporary folders are gone"


def test_alpha_1_is_the_blended_detector_without_the_teachers_backbone():
    """Bit for bit what :class:`era.modeling.detectors.rcnn_inference.BlendedRCNN` gives, on a batch of two sizes."""
    deployed = source(1)
    inputs = [{"image": torch.rand(3, *size) * 255} for size in ((96, 128), (100, 75))]
    with torch.no_grad():
        expected = deployed.eager.inference(inputs)
        found = deployed.model.inference(inputs)
    for a, b in zip(expected, found, strict=True):
        a, b = a["instances"], b["instances"]
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
    distiller = deployed.eager
    teacher = distiller.teacher.model
    parts = (distiller.student.backbone, distiller.methods["era"].estimator)
    parts += (teacher.proposal_generator, teacher.roi_heads)
    count = sum(p.numel() for part in parts for p in part.parameters())
    assert sum(p.numel() for p in deployed.model.parameters()) == count


@pytest.mark.parametrize("name", [needs("onnx")])
def test_alpha_1_of_another_method_exports_too(name, tmp_path):
    """A backbone of two networks, with BatchNorm in the second one."""
    assisted = quiet_source(run("methods/residualkd"), alpha=1)
    report = export(assisted, name, str(tmp_path / "folder"))
    assert max(case.box_difference for case in report.cases) < 0.005


def test_parity_matches_by_box_and_forgives_only_edges():
    a = detections([[0, 0, 9, 9], [20, 20, 30, 30]], [0.8, 0.7999], [1, 1])
    swapped = detections([[20, 20, 30, 30], [0, 0, 9, 9.01]], [0.8, 0.7999], [1, 1])
    kwargs = {"tolerance": parity.Tolerance(), "score_threshold": 0.05, "max_detections": 100}
    case = parity.compare_one(a, swapped, **kwargs)
    assert case.unmatched == 0
    assert case.box_difference == pytest.approx(0.01, abs=1e-4)
    assert case.score_difference == pytest.approx(1e-4, abs=1e-6)
    # (second side, unmatched): a class swapped, one lost, one at the threshold lost
    other_class = detections(a.boxes, a.scores, [1, 2])
    assert parity.compare_one(a, other_class, **kwargs).unmatched == 2
    assert parity.compare_one(a, detections([], [], []), **kwargs).unmatched == 2
    edge = detections([[0, 0, 9, 9]], [0.0505], [1])
    assert parity.compare_one(edge, detections([], [], []), **kwargs).unmatched == 0
    # a full list: the last rank may be another one of equal score
    full = {**kwargs, "max_detections": 2}
    tied = detections([[0, 0, 9, 9], [50, 50, 60, 60]], [0.8, 0.7999], [1, 1])
    assert parity.compare_one(a, tied, **kwargs).unmatched == 2
    assert parity.compare_one(a, tied, **full).unmatched == 0
    # NaN matches nothing: four are left over
    broken = detections([[np.nan] * 4] * 2, a.scores, a.classes)
    assert parity.compare_one(a, broken, **kwargs).unmatched == 4


def test_a_wrong_export_fails_and_leaves_nothing(tmp_path, monkeypatch):
    def wrong(what, name, folder, *args):
        what = what.with_score_threshold(0.05)
        with torch.no_grad():
            what.model.roi_heads.box_predictor.bbox_pred.bias += 0.05
        formats.write_model(what, name, folder, *args)

    monkeypatch.setattr(export_module, "write_model", wrong)
    with pytest.raises(
        UserError, match=r"differs from eager: at \d+x\d+ pixels .*nothing was kept"
    ):
        export(source(0), "torchscript", str(tmp_path / "a/b/out"))
    assert list(tmp_path.iterdir()) == []


def test_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        export(source(0), "detectron2", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# ---- the removal proof ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def never_distilled():
    """The same Faster R-CNN from the plain config, with the distilled student's weights."""
    threshold = source(0).cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
    opts = [*SMALL, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", threshold]
    model = build_model(load_config(str(ROOT / "configs/toy/plain.yaml"), opts))
    weights = torch.load(run() / "model_final.pth")["model"]
    model.load_state_dict(strip_student(weights), strict=True)
    return model.eval()


def test_alpha_0_is_the_faster_rcnn_that_never_heard_of_distillation(never_distilled, tmp_path):
    folder, _ = exported("torchscript")
    script = torch.jit.load(str(folder / "model.ts"))
    count = sum(p.numel() for p in never_distilled.parameters())
    assert sum(p.numel() for p in script.parameters()) == count

    image = torch.rand(3, 100, 128) * 255
    adapter = formats.trace_adapter(never_distilled, image)
    assert isinstance(adapter, TracingAdapter)
    with torch.no_grad(), formats.quiet():
        plain = torch.jit.trace(adapter, (image,), check_trace=False)
    plain.save(str(tmp_path / "plain.ts"))  # saving pools the constants
    plain = torch.jit.load(str(tmp_path / "plain.ts"))
    operators = [Counter(n.kind() for n in m.inlined_graph.nodes()) for m in (script, plain)]
    assert operators[0] == operators[1]
    with torch.no_grad():
        for size in ((96, 96), (64, 128)):
            image = torch.rand(3, *size) * 255
            for a, b in zip(script(image), plain(image), strict=True):
                assert torch.equal(a, b)


@needs_onnx
def test_alpha_0_onnx_has_the_plain_models_operators(never_distilled, tmp_path):
    import onnx

    folder, _ = exported("onnx")
    formats.write_onnx(never_distilled, torch.rand(3, 100, 128) * 255, tmp_path / "plain.onnx")
    graphs = [onnx.load(str(p)).graph for p in (folder / "model.onnx", tmp_path / "plain.onnx")]
    operators = [[node.op_type for node in graph.node] for graph in graphs]
    assert operators[0] == operators[1]
    sizes = [sum(int(np.prod(t.dims)) for t in graph.initializer) for graph in graphs]
    assert sizes[0] == sizes[1]


def test_alpha_0_detectron2_folder_is_stock(tmp_path, never_distilled):
    """Stock ``get_cfg`` reads the config, ``DefaultPredictor`` gives what the deployed model gives."""
    folder, _ = exported("detectron2")
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    image = parity.sample_images(source(0).rules)[2]
    expected = DefaultPredictor(cfg)(image)["instances"]
    found = era_runtime.load(folder)(image)
    assert len(found) > 0
    np.testing.assert_array_equal(expected.pred_boxes.tensor.numpy(), found.boxes)
    np.testing.assert_array_equal(expected.scores.numpy(), found.scores)


# ---- ONNX ----------------------------------------------------------------------------------------


@needs_onnx
def test_onnx_has_the_right_roi_align_and_no_branch():
    import onnx

    model = onnx.load(str(exported("onnx")[0] / "model.onnx"))
    assert {o.domain: o.version for o in model.opset_import}[""] == 17
    aligns = [node for node in model.graph.node if node.op_type == "RoiAlign"]
    modes = {a.name: a.s for node in aligns for a in node.attribute}
    assert aligns and modes["coordinate_transformation_mode"] == b"half_pixel"
    assert "If" not in {node.op_type for node in model.graph.node}


@needs_onnx
def test_int8_quantises_the_backbone_and_keeps_the_heads_float(tmp_path):
    import onnx

    images = parity.sample_images(source(0).rules)[:3]
    report = export(source(0), "onnx", str(tmp_path / "int8"), calibration=images)
    assert report.tolerance == parity.INT8
    graph = onnx.load(str(tmp_path / "int8/model.onnx")).graph
    restored = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):  # input 1: weights
            assert (node.input[1] in restored) == ("/backbone/" in node.name), node.name
    weights = [
        onnx.numpy_helper.to_array(t)
        for t in graph.initializer
        if t.data_type == onnx.TensorProto.INT8
    ]
    weights = [w for w in weights if w.ndim == 4]
    # 7 bits: two products of 8 bits would saturate on a CPU without VNNI
    assert weights and max(np.abs(w.astype(int)).max() for w in weights) == 64
    manifest = json.loads((tmp_path / "int8/manifest.json").read_text())
    assert manifest["precision"].startswith("int8")
    float_size = (exported("onnx")[0] / "model.onnx").stat().st_size
    assert (tmp_path / "int8/model.onnx").stat().st_size < 0.8 * float_size
