"""Exports over batches: parity with eager's own batches, what their graphs are made of, and requests that cannot be met."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from deploy_case import FIXED, batch_exported, batch_source, exported, mask_run, needs, run, source

import era_runtime
from era.deploy import parity
from era.deploy.batched import BatchForm
from era.deploy.export import export, export_main
from era.deploy.source import load_source
from era.deploy.tensorrt import BUILD_COMMAND, operator_problems
from era.errors import UserError
from era_runtime import DeploymentError
from era_runtime.batches import BatchBackend, as_batch
from era_runtime.preprocess import InputRules, preprocess, resized_shape

ANY = BatchForm()
onnx_needed = needs("onnx").marks
# What each export is for; the other combinations share all of their code with one of these.
LOOSE = [
    ("era", 0, "onnx"), ("era", 1, "onnx"), ("masks", 0, "onnx"), ("cascade_era", 0, "onnx"), ("retinanet_era", 0, "onnx"),
    ("fcos_era", 0, "onnx"), ("masks", 0, "openvino"),
]  # fmt: skip


def check_parity(folder, report, form):
    """Batches of one and of several sizes were compared, without detections in some and in all of their pictures."""
    assert report.problems == [] and max(case.box_difference for case in report.cases) < 0.005
    assert sum(case.eager for case in report.cases) > 30
    batches = {case.batch for case in report.cases}
    assert batches == ({1, 2, 3} if form.shape else {1, 3, 5, 7})
    if report.empty_checked == "image":
        assert (
            sum(case.eager == case.exported == 0 for case in report.cases if case.batch == 3) >= 3
        )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == 2 and manifest["max_batch"] == form.batch
    assert set(manifest["files"]) | {"manifest.json"} == {path.name for path in folder.iterdir()}
    return manifest


# ---- any number of pictures of any size --------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "alpha", "name"),
    [pytest.param(*case, marks=needs(case[2]).marks) for case in LOOSE],
)
def test_a_graph_of_any_batch_equals_eagers_batches(config, alpha, name):
    folder, report = batch_exported(config, ANY, alpha, name)
    manifest = check_parity(folder, report, ANY)
    outputs = ["boxes", "scores", "classes", "pictures"]
    assert list(manifest["outputs"]) == outputs + (["masks"] if config == "masks" else [])
    assert report.empty_checked == "image"


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=onnx_needed) for c in ("era", "fcos_era")]
)
def test_the_number_of_pictures_is_an_axis_and_no_part_is_there_twice(config):
    import onnx

    graph = onnx.load(str(batch_exported(config, ANY)[0] / "model.onnx")).graph
    operators = [node.op_type for node in graph.node]
    assert not {"If", "Loop", "Scan", "SplitToSequence"} & set(operators)
    levels = 1 if config == "fcos_era" else 1 + 4  # the RPN suppresses by level
    assert operators.count("NonMaxSuppression") == levels
    axes = graph.input[0].type.tensor_type.shape.dim
    assert [a.dim_param for a in axes] == ["batch", "", "height", "width"]
    assert [value.name for value in graph.input] == ["images", "sizes"][
        : 1 if config == "fcos_era" else 2
    ]


@pytest.mark.skipif(onnx_needed[0].args[0], reason="onnx not installed")
def test_results_of_a_batch_are_those_of_one_picture_after_the_other():
    """Of pictures of many sizes, whatever their order: those that the model is given in one size share a call."""
    folder, _ = batch_exported("masks", ANY)
    images = parity.sample_images(batch_source("masks").rules)
    images = [
        images[0],
        images[1],
        images[0][::-1].copy(),
        images[2],
        images[1][:, ::-1].copy(),
    ] * 3
    calls = []
    batched = era_runtime.load(folder, batch_size=4, num_threads=1)
    inner = batched.backend
    batched.backend = lambda given: (calls.append([i.shape for i in given]), inner(given))[1]
    single = era_runtime.load(folder, num_threads=1)
    for found, image in zip(batched(images), images, strict=True):
        expected = single(image)
        assert len(found) == len(expected) > 0
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        assert found.class_names == expected.class_names
        assert (found.masks != expected.masks).mean() < 1e-3
    assert [len(call) for call in calls] == [4, 4, 3, 2, 2] and all(len(set(c)) == 1 for c in calls)
    assert batched([]) == []


# ---- one fixed shape, for TensorRT -------------------------------------------------------------------


def few_candidates(config: str):
    """A dense detector with fewer candidates, whose matrices of overlaps are small."""
    first = source(0, config)
    key = f"MODEL.{'FCOS' if 'fcos' in config else 'RETINANET'}.TOPK_CANDIDATES_TEST"
    return load_source(run=str(run(config)), opts=[*first.opts, key, 100])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(c, marks=onnx_needed)
        for c in ("era", "masks", "cascade_era", "retinanet_era", "fcos_era")
    ],
)
def test_a_graph_of_fixed_shapes_equals_eager_on_the_padded_pictures(config, tmp_path):
    folder = tmp_path / "folder"
    if config in ("retinanet_era", "fcos_era"):
        report = export(few_candidates(config), "onnx", str(folder), form=FIXED)
    else:
        folder, report = batch_exported(config, FIXED)
    manifest = check_parity(folder, report, FIXED)
    assert manifest["input"]["shape"] == [96, 128]
    outputs = ["boxes", "scores", "classes", "counts", "complete"]
    assert list(manifest["outputs"]) == outputs + (["masks"] if config == "masks" else [])
    for text in ((folder / "README.md").read_text(), json.dumps(manifest["tensorrt"])):
        assert BUILD_COMMAND in text and "No TensorRT was at hand" in text
    assert operator_problems(folder / "model.onnx") == []
    check_graph(folder / "model.onnx")


def check_graph(path):
    """Numbers for every shape, of inputs and outputs and between, and none of the operators that are another one each time."""
    import onnx

    model = onnx.shape_inference.infer_shapes(
        onnx.load(str(path)), strict_mode=True, data_prop=True
    )
    graph = model.graph
    values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    for name in [value.name for value in graph.input] + [
        o for node in graph.node for o in node.output
    ]:
        assert all(axis.dim_value > 0 for axis in values[name].type.tensor_type.shape.dim), name
    operators = {node.op_type for node in graph.node}
    assert not operators & {
        "NonZero",
        "NonMaxSuppression",
        "If",
        "Loop",
        "Scan",
        "Unique",
        "Compress",
    }
    assert {node.domain for node in graph.node} == {""} and [
        o.domain for o in model.opset_import
    ] == [""]
    shapes = {
        o.name: [axis.dim_value for axis in o.type.tensor_type.shape.dim] for o in graph.output
    }
    assert shapes["boxes"] == [3, 100, 4] and shapes["counts"] == shapes["complete"] == [3]


@pytest.mark.skipif(onnx_needed[0].args[0], reason="onnx not installed")
def test_a_graph_that_tensorrt_would_not_take_is_told():
    problems = " ".join(operator_problems(batch_exported("era", ANY)[0] / "model.onnx"))
    for words in (
        "the operator NonMaxSuppression",
        "its input images has an axis of any length",
        "depends on the data",
    ):
        assert words in problems


def test_a_top_k_beyond_tensorrts_is_told(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("TopK", ["x", "k"], ["values", "order"])],
        "g",
        [helper.make_tensor_value_info("x", kinds.FLOAT, [1, 5000])],
        [helper.make_tensor_value_info("values", kinds.FLOAT, [1, 4000])],
        [helper.make_tensor("k", kinds.INT64, [1], [4000])],
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "m.onnx"))
    (problem,) = operator_problems(tmp_path / "m.onnx")
    assert "more than the best 3840" in problem


@pytest.mark.skipif(onnx_needed[0].args[0], reason="onnx not installed")
def test_fixed_calls_are_filled_up_and_pictures_come_back_in_their_own_pixels():
    """Five pictures through a model of three a call, portraits smaller than elsewhere; as eager on the padded pictures."""
    folder, _ = batch_exported("era", FIXED)
    predictor = era_runtime.load(folder)
    assert predictor.batch_size == 3
    images = parity.sample_images(predictor.rules)[:5]
    eager = source(0).padded_predictor(FIXED.shape)
    for found, image in zip(predictor(images), images, strict=True):
        expected = eager(image)
        assert len(parity.match(expected, found)) == len(expected) == len(found) > 0
        assert (
            found.boxes[:, 2].max() <= image.shape[1] and found.boxes[:, 3].max() <= image.shape[0]
        )


@pytest.mark.parametrize(
    ("size", "rules", "expected"),
    [
        ((480, 640), (96, 128), (96, 128)),  # as without a shape
        ((640, 480), (96, 128), (96, 72)),  # a portrait: it would be 128x96
        ((100, 400), (96, 128), (32, 128)),
        ((50, 60), (0, 0), (50, 60)),  # not scaled, and it fits
        ((200, 160), (0, 0), (96, 77)),  # not scaled, but for the shape
    ],
)
def test_pictures_are_scaled_into_the_shape(size, rules, expected):
    rules = InputRules(*rules, "BGR", (96, 128))
    assert resized_shape(*size, rules) == expected
    assert preprocess(np.zeros((*size, 3), np.uint8), rules).shape == (3, *expected)


def test_a_batch_is_padded_with_the_mean_by_hand():
    images = [np.full((3, 2, 3), 7, np.float32), np.full((3, 1, 4), 9, np.float32)]
    feed = as_batch(images, [1.5, 2.5, 3.5], count=3)
    assert feed["images"].shape == (3, 3, 2, 4) and feed["images"].dtype == np.float32
    assert feed["sizes"].tolist() == [[2, 3], [1, 4], [2, 4]]
    np.testing.assert_array_equal(feed["images"][0, 1], [[7, 7, 7, 2.5]] * 2)
    np.testing.assert_array_equal(feed["images"][1, 2], [[9] * 4, [3.5] * 4])
    np.testing.assert_array_equal(feed["images"][2, 0], [[1.5] * 4] * 2)


def test_a_picture_with_more_candidates_than_fixed_shapes_hold_is_told():
    def run(complete):
        found = {
            "boxes": np.zeros((2, 5, 4)),
            "scores": np.zeros((2, 5)),
            "classes": np.zeros((2, 5), np.int64),
        }
        return {**found, "counts": np.array([2, 0]), "complete": np.array([complete, False])}

    image = np.zeros((3, 4, 4), np.float32)
    whole, cut = (
        BatchBackend(lambda _, c=c: run(c), ["images"], [0, 0, 0], 2, (4, 4)) for c in (True, False)
    )
    ((boxes, _, _),) = whole([image])  # what fills the batch up does not count
    assert boxes.shape == (2, 4)
    with pytest.warns(
        UserWarning, match="more candidates than this model of fixed shapes looks at"
    ):
        cut([image])


# ---- what cannot be met ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "many"], "--batch is 'many': expected any or a number"),
        (["--batch", "0"], "--batch is '0': expected any or a number"),
        (["--batch", "4"], "--batch is 4 without --shape"),
        (["--shape", "800"], "--shape is '800': expected HEIGHTxWIDTH"),
        (["--shape", "0x8"], "--shape is '0x8': expected HEIGHTxWIDTH"),
        (["--shape", "96x128", "--batch", "any"], "--shape and --batch any do not go together"),
        (["--batch", "any", "--format", "torchscript"], "--batch any is for format onnx or openvino, not torchscript"),
        (["--batch", "any", "--format", "detectron2"], "takes any number of pictures as it is"),
        (["--shape", "96x128", "--format", "openvino"], "--shape is for format onnx, not openvino"),
        (["--batch", "any", "--int8", "--calibrate", "x"], "--int8 and --batch any are not made together"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_sentence_and_write_nothing(tmp_path, arguments, message):
    if "--format" not in arguments:
        arguments = [*arguments, "--format", "onnx"]
    with pytest.raises(UserError, match=message) as caught:
        export_main(["--run", str(run()), *arguments, "--output", str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [needs("onnx")])
def test_a_detector_without_a_form_for_batches_is_refused(tmp_path, name):
    """Masks of another head than Mask R-CNN's."""
    odd = load_source(run=str(mask_run()))
    odd.model.roi_heads.mask_pooler = None  # such as PointRend has it
    with pytest.raises(
        UserError, match=r"Mask R-CNN's own mask head: export it for one picture a call"
    ):
        export(odd, name, str(tmp_path / "out"), form=ANY)
    assert list(tmp_path.iterdir()) == []


def changed(**entries):
    """A change to a copied folder: other entries in ``input`` of its manifest; ... takes one out."""

    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["input"] |= entries
        manifest["input"] = {k: v for k, v in manifest["input"].items() if v is not ...}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


@pytest.mark.skipif(onnx_needed[0].args[0], reason="onnx not installed")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(shape=[96]), r"has shape \[96\]: expected a list of 2 numbers"),
        (changed(shape=[96, 12.5]), "expected a list of 2 numbers"),
        (changed(shape=[96, 10**9]), r"has shape 1000000000: expected a number from 1 to 16384"),
        (changed(mean=...), "has mean None: expected a list of 3 numbers"),
        (changed(mean=[1, 2, "x"]), "expected a list of 3 numbers"),
        (changed(mean=[1, 2, float("nan")]), "has mean nan: expected a number"),
        # pictures that the graph does not take: found out in the call
        (changed(shape=[64, 64]), "the onnx model fails on images of shape"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, message):
    shutil.copytree(batch_exported("era", FIXED)[0], tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(DeploymentError, match=message) as caught:
        predictor = era_runtime.load(tmp_path / "copy")
        predictor.rules = InputRules(128, 128, "BGR")
        predictor(np.zeros((128, 128, 3), np.uint8))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(onnx_needed[0].args[0], reason="onnx not installed")
def test_a_model_of_one_picture_a_call_says_which_one_takes_more():
    with pytest.raises(
        DeploymentError,
        match=r"batch size 8 .* the onnx model takes 1 to 1 at once: .* --batch any",
    ):
        era_runtime.load(exported("onnx")[0], batch_size=8)
