"""Writing a model in each format. The graph formats, but for those over batches, take one image ``image`` (3, height, width) float32
and return ``boxes`` (n, 4), ``scores`` (n,), ``classes`` (n,) and of a model that predicts masks ``masks``
(n, M, M); boxes are in pixels of that image, masks are probabilities on M x M cells of each box."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from detectron2.export import TracingAdapter
from torch import Tensor, nn

from era.deploy.batched import BatchForm, BatchGraph, write_batch_onnx
from era.deploy.model import raw_outputs, save_folder
from era.deploy.source import Source
from era.deploy.tensorrt import check_operators, fold_constants
from era.errors import UserError
from era.modeling.detectors import detector_of
from era_runtime.backends import OUTPUT_NAMES, require

# With Detectron2's own constant, 11, ROIAlign has no half-pixel offset: the result is silently wrong.
OPSET = 17
# Packages beside torch and detectron2 that a format needs.
RUNTIMES = {
    "detectron2": (),
    "torchscript": (),
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
}
FORMATS = tuple(RUNTIMES)


# What the two kinds of it are for.
FORMS = {"--batch any": ("onnx", "openvino"), "--shape": ("onnx",)}


def check_format(name: str, *, int8: bool, form: BatchForm | None = None) -> None:
    """The format is known, can have the form, and its packages are installed.

    Raises:
        UserError: one sentence.
    """
    if name not in FORMATS:
        raise UserError(f"format is {name!r}: expected one of {', '.join(FORMATS)}.")
    if int8 and name != "onnx":
        raise UserError(f"int8 is for format onnx, not {name}: leave one of the two out.")
    if form is not None:
        flag = "--shape" if form.shape else "--batch any"
        if name not in FORMS[flag]:
            raise UserError(
                f"{flag} is for format {' or '.join(FORMS[flag])}, not {name}"
                + (", which takes any number of pictures as it is" if name == "detectron2" else "")
                + ": leave one of the two out."
            )
        if int8:
            raise UserError(
                f"--int8 and {flag} are not made together: the int8 model takes one picture a call; leave one of the two out."
            )
    for package in RUNTIMES[name]:
        try:
            require(package, package=f"{package} (pip install 'era-detectron2[deploy]')",
                    what=f"format {name}")  # fmt: skip
        except ValueError as e:
            raise UserError(str(e)) from e


def write_model(
    source: Source,
    name: str,
    folder: Path,
    example: np.ndarray,
    calibration: Sequence[np.ndarray] = (),
    form: BatchForm | None = None,
) -> None:
    """Write the model files of one format.

    Args:
        example: (3, h, w) float32, an image to trace with; the result takes any size.
        calibration: inputs like ``example``; if there are any, the ONNX model's backbone becomes int8.
        form: of a graph over batches; None = one picture a call.

    Raises:
        UserError: the model has no such form.
    """
    if name == "detectron2":
        save_folder(source.model, source.cfg, source.alpha, folder)
        return
    image = torch.from_numpy(example)
    if name == "torchscript":
        adapter = trace_adapter(source.model, image)
        with torch.no_grad(), quiet():
            traced = torch.jit.trace(adapter, (image,), check_trace=False)
        traced.save(str(folder / "model.ts"))
    elif name == "onnx" and calibration:
        write_onnx(source.model, image, folder / "float.onnx")
        prefix = backbone_prefix(source)
        quantize(folder / "float.onnx", folder / "model.onnx", calibration, prefix)
        (folder / "float.onnx").unlink()
    elif name == "onnx":
        write_onnx(source.model, image, folder / "model.onnx", form)
    else:
        import openvino as ov

        write_onnx(source.model, image, folder / "float.onnx", form)
        converted = ov.convert_model(str(folder / "float.onnx"))
        ov.save_model(converted, str(folder / "model.xml"), compress_to_fp16=False)
        del converted
        (folder / "float.onnx").unlink()


def outputs_of(model: nn.Module, form: BatchForm | None = None) -> list[str]:
    """Names of a graph's outputs: masks only if the model predicts them."""
    if form is not None:
        return BatchGraph(model, form.shape).output_names
    return list(OUTPUT_NAMES if detector_of(model).mask_on else OUTPUT_NAMES[:-1])


def trace_adapter(model: nn.Module, image: Tensor) -> TracingAdapter:
    """A module from one image tensor to the tensors of :func:`outputs_of`, in eval mode."""

    def infer(model: nn.Module, inputs: list[dict]) -> tuple[Tensor, ...]:
        return raw_outputs(detector_of(model).detect(inputs, do_postprocess=False)[0])

    # .eval(): the adapter is a fresh module in training mode, and torch's exporter would put the whole
    # of it, the frozen model included, through a switch of modes.
    return TracingAdapter(model, [{"image": image}], infer).eval()


def write_onnx(model: nn.Module, image: Tensor, path: Path, form: BatchForm | None = None) -> None:
    """ONNX by torch's legacy exporter; the other fails on stock code. Height and width are dynamic where the form does not
    say otherwise."""
    if form is not None:
        with quiet():
            write_batch_onnx(model, path, opset=OPSET, batch=form.batch, shape=form.shape)
        if form.shape is not None:
            fold_constants(path)
            check_operators(path)
        return
    outputs = outputs_of(model)
    axes = {"image": {1: "height", 2: "width"}} | {name: {0: "detections"} for name in outputs}
    with torch.no_grad(), quiet(), branch_free_nms():
        torch.onnx.export(
            trace_adapter(model, image),
            (image,),
            str(path),
            opset_version=OPSET,
            dynamo=False,
            input_names=["image"],
            output_names=outputs,
            dynamic_axes=axes,
        )


@contextlib.contextmanager
def branch_free_nms() -> Iterator[None]:
    """Within it, batched NMS has no ``If``.

    torchvision's returns early for no boxes; that becomes an ONNX ``If`` from which OpenVINO returns one
    row of garbage for an image without detections. The arithmetic is torchvision's own: boxes of
    different groups are moved apart, then one NMS.
    """

    def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
        # the added zero gives max() something to look at when there are no boxes
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
        offsets = groups.to(boxes) * (largest + 1)
        return torchvision.ops.nms(boxes + offsets[:, None], scores, iou_threshold)

    original = torchvision.ops.boxes.batched_nms
    torchvision.ops.boxes.batched_nms = batched_nms  # where detectron2.layers.nms looks it up
    try:
        yield
    finally:
        torchvision.ops.boxes.batched_nms = original


def quantize(path: Path, target: Path, calibration: Sequence[np.ndarray], prefix: str) -> None:
    """Static int8 (QDQ) of the convolutions of the student's backbone and FPN; all else stays float.

    Args:
        calibration: model inputs (3, h, w) float32, to learn the ranges of the activations from.
        prefix: of the names of the backbone's nodes, see :func:`backbone_prefix`.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.images = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image}

    graph = onnx.load(str(path))
    convs = [n.name for n in graph.graph.node if n.op_type == "Conv" and n.name.startswith(prefix)]
    if not convs:  # an empty list would mean "all" to onnxruntime, the heads included
        raise UserError(
            "int8 found no convolution in the model's backbone to quantise: export float."
        )
    unshare_initializers(graph)
    onnx.save(graph, str(path))
    with quiet():
        quantization.quantize_static(
            str(path),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            nodes_to_quantize=convs,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            # 7 bits for weights: without VNNI instructions a CPU adds two products of 8 bits in 16, which
            # saturates and loses detections.
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
    forget_inferred_shapes(target)


def forget_inferred_shapes(path: Path) -> None:
    """Leave the shapes of inner tensors to the runtime, as the exporter does.

    The quantiser writes what it infers of them; onnxruntime then folds the shape that decoded boxes get, (n, 4), into
    (0, -1), "as before, and the rest", which fails where a level of a dense detector has no box.
    """
    import onnx

    model = onnx.load(str(path))
    del model.graph.value_info[:]
    onnx.save(model, str(path))


def backbone_prefix(source: Source) -> str:
    """How the names of the ONNX nodes of the student's own backbone begin, without what a method adds to it.

    The legacy exporter names a node by the path of its module: ``/backbone/bottom_up/.../Conv``.
    """
    kind = type(source.student.backbone)
    path = next(name for name, module in source.model.named_modules() if type(module) is kind)
    return "/" + path.replace(".", "/") + "/"


def unshare_initializers(graph) -> None:
    """Give every weight its own tensor again, in place.

    The exporter keeps one of several equal weights and hands it on by ``Identity``; onnxruntime's
    quantiser does not see through that and leaves such biases, and with them their convolutions, slow.
    """
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in list(graph.graph.node):
        if node.op_type == "Identity" and node.input[0] in weights:
            copy = graph.graph.initializer.add()
            copy.CopyFrom(weights[node.input[0]])
            copy.name = node.output[0]
            graph.graph.node.remove(node)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' many warnings on shapes; parity is what tells whether they mattered."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
