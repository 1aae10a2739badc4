"""ONNX over batches of pictures: of any number and size, or of one fixed shape, as TensorRT likes it.

Input ``images`` (N, 3, H, W) float32, 0 to 255, each picture at the top left and the rest filled with the model's mean, which
is zero behind the normalisation, as in Detectron2's own batches; ``sizes`` (N, 2) float32, each picture's height and width
within (dense detectors do not read it, and their graphs lack it).

Outputs of any batch, the detections of all pictures one after the other: ``boxes`` (n, 4), ``scores`` (n,), ``classes`` (n,),
``pictures`` (n,) and perhaps ``masks`` (n, M, M). Of a fixed one, D rows a picture of which the first are its detections:
``boxes`` (N, D, 4), ``scores`` and ``classes`` (N, D), ``counts`` (N,) of detections, ``complete`` (N,) and perhaps
``masks`` (N, D, M, M).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.layers import nonzero_tuple
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.nn import functional as F

from era.errors import UserError
from era.modeling.detectors import detector_of
from era.modeling.detectors.batches import rois_of
from era_runtime.batches import IMAGES, SIZES

ANY_OUTPUTS = ("boxes", "scores", "classes", "pictures")
FIXED_OUTPUTS = ("boxes", "scores", "classes", "counts", "complete")
MASKS = "masks"
ANY = "any"


@dataclass(frozen=True)
class BatchForm:
    """How an ONNX graph takes several pictures.

    Attributes:
        batch: pictures a call; None = any number.
        shape: (height, width) of the input, pixels; None = any. Given with a number of pictures alone.
    """

    batch: int | None = None
    shape: tuple[int, int] | None = None


class BatchGraph(nn.Module):
    """What is exported: from ``images`` and ``sizes`` to the outputs of the module's docstring, in the order of
    ``output_names``.

    Args:
        model: an ordinary model of a family, in eval mode.
        fixed: (H, W) of the one shape, pixels; None = any.

    Raises:
        UserError: the family has no form for batches.
    """

    def __init__(self, model: nn.Module, fixed: tuple[int, int] | None = None):
        super().__init__()
        self.model = model
        self.detector = detector_of(model)
        self.detector.check_batches()
        self.fixed = fixed
        # plain numbers: padding by what a trace knows of the shapes would be arithmetic of the graph
        self.padded = None if fixed is None else self._pad(torch.zeros(1, 3, *fixed)).shape[-2:]
        self.eval()

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs: masks only if the model predicts them."""
        names = list(ANY_OUTPUTS if self.fixed is None else FIXED_OUTPUTS)
        return [*names, MASKS] if self.detector.mask_on else names

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detections of a batch."""
        images = (images - self.model.pixel_mean) / self.model.pixel_std
        if self.fixed is None:
            images = self._pad(images)
        else:
            missing = [more - own for more, own in zip(self.padded, self.fixed, strict=True)]
            images = F.pad(images, (0, missing[1], 0, missing[0]))
        features = self.model.backbone(images)
        found = self.detector.detect_batch(features, sizes, fixed=self.fixed is not None)
        if self.fixed is not None:
            return self._fixed_outputs(features, found)
        pictures, rows = nonzero_tuple(found.is_found)
        boxes, classes = found.boxes[pictures, rows], found.classes[pictures, rows]
        outputs = boxes, found.scores[pictures, rows], classes, pictures
        if not self.detector.mask_on:
            return outputs
        rois = torch.cat([pictures[:, None].to(boxes), boxes], 1)
        return *outputs, self.detector.masks_at(features, rois, classes, fixed=False)

    def _fixed_outputs(self, features: dict[str, Tensor], found) -> tuple[Tensor, ...]:
        boxes = torch.where(found.is_found[:, :, None], found.boxes, 0.0)
        classes = torch.where(found.is_found, found.classes, 0)
        outputs = boxes, found.scores, classes, found.is_found.sum(1), found.complete
        if not self.detector.mask_on:
            return outputs
        masks = self.detector.masks_at(features, rois_of(boxes), classes.flatten(), fixed=True)
        return *outputs, masks.reshape(*classes.shape, *masks.shape[-2:])

    def _pad(self, images: Tensor) -> Tensor:
        """As Detectron2 pads a batch to what the backbone takes."""
        backbone = self.model.backbone
        return ImageList.from_tensors(
            [images],
            backbone.size_divisibility,
            padding_constraints=backbone.padding_constraints,
        ).tensor[0]


def write_batch_onnx(
    model: nn.Module, path: Path, *, opset: int, batch: int | None, shape: tuple[int, int] | None
) -> None:
    """Write the graph with torch's legacy exporter.

    Args:
        batch: pictures a call; None = any number.
        shape: (H, W), pixels; None = any. Either both are given or none.

    Raises:
        UserError: the family has no form for batches.
    """
    graph = BatchGraph(model, shape)
    # 2 and not 1 pictures: the tracer takes an axis of length 1 for one to broadcast
    count, size = batch or 2, shape or (96, 128)
    example = torch.rand(count, 3, *size) * 255, torch.tensor([size] * count, dtype=torch.float32)
    axes = {}
    if shape is None:
        axes = {name: {0: "detections"} for name in graph.output_names}
        axes |= {IMAGES: {0: "batch", 2: "height", 3: "width"}, SIZES: {0: "batch"}}
    with torch.no_grad():
        torch.onnx.export(
            graph,
            example,
            str(path),
            opset_version=opset,
            dynamo=False,
            input_names=[IMAGES, SIZES],
            output_names=graph.output_names,
            dynamic_axes=axes,
        )
    drop_unused_inputs(path)


def drop_unused_inputs(path: Path) -> None:
    """Leave out of an ONNX file's inputs what no node reads."""
    import onnx

    model = onnx.load(str(path))
    used = {name for node in model.graph.node for name in node.input}
    for value in list(model.graph.input):
        if value.name not in used:
            model.graph.input.remove(value)
    onnx.save(model, str(path))


def parse_form(batch: str, shape: str) -> BatchForm | None:
    """What ``--batch`` and ``--shape`` ask for; None = one picture a call, of any size.

    Raises:
        UserError: a value of another form, or two that do not go together.
    """
    if batch not in ("", ANY) and not (batch.isdecimal() and int(batch) > 0):
        raise UserError(
            f"--batch is {batch!r}: expected {ANY} or a number of pictures; give it so."
        )
    if shape and batch == ANY:
        raise UserError(
            "--shape and --batch any do not go together: a fixed shape has a fixed number of pictures; give it as --batch N."
        )
    if shape:
        return BatchForm(int(batch or 1), parse_shape(shape))
    if batch == ANY:
        return BatchForm()
    if batch not in ("", "1"):
        raise UserError(
            f"--batch is {batch} without --shape: a number is for graphs of one fixed shape; give --shape HxW, or --batch {ANY}."
        )
    return None


def parse_shape(text: str) -> tuple[int, int]:
    """``HxW`` as height and width, pixels.

    Raises:
        UserError: it is of another form.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"--shape is {text!r}: expected HEIGHTxWIDTH in pixels, such as 800x1344; give it so."
        )
    return int(parts[0]), int(parts[1])
