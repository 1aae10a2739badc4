"""What a deployment folder says of itself: the manifest, and how an engine is built of a model of fixed shapes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from era.deploy.batched import BatchForm
from era.deploy.formats import OPSET, RUNTIMES, outputs_of
from era.deploy.source import Source
from era.deploy.tensorrt import BUILD_COMMAND, UNMEASURED
from era.environment import versions
from era.modeling.detectors import detector_of
from era_runtime.manifest import (
    BATCH_FORMAT_VERSION,
    CLASSES,
    FORMAT_VERSION,
    MANIFEST,
    sha256_file,
)

README = "README.md"
OUTPUTS = {
    "boxes": "(n, 4) float32, x0, y0, x1, y1 in pixels of the input",
    "scores": "(n,) float32",
    "classes": f"(n,) int64, index into {CLASSES}",
    "masks": "(n, M, M) float32, probabilities on M x M cells of each box",
    # of graphs over batches
    "pictures": "(n,) int64, index of each row's picture in the batch",
    "counts": "(N,) int64, how many rows of each picture, the first ones, are detections",
    "complete": "(N,) bool, whether the fixed numbers of candidates and of NMS rounds changed nothing",
}


def readme(form: BatchForm) -> str:
    """What lies beside a model of fixed shapes: how an engine is built of it, and what is fed."""
    height, width = form.shape
    return f"""# A detector of fixed shapes

Build an engine with TensorRT's own tool (10.x), in this folder:

    {BUILD_COMMAND}

`--fp16` behind it builds one in half precision. {UNMEASURED}

Input: `images` ({form.batch}, 3, {height}, {width}) float32, 0 to 255, each picture scaled by `input` of manifest.json, at the top
left, the rest filled with `mean`; of a two-stage detector also `sizes` ({form.batch}, 2) float32, each picture's height and width
within. Outputs: `outputs` of manifest.json, with an axis of {form.batch} before each; of a picture's rows the first `counts` are
its detections.
"""


def write_manifest(
    source: Source, name: str, folder: Path, int8: bool, form: BatchForm | None = None
) -> None:
    """Write ``manifest.json`` over all other files of the folder; docs/deployment.md explains it."""
    detector = detector_of(source.model)
    order = source.rules.channel_order
    shape = form.shape if form else None
    manifest = {
        "format_version": BATCH_FORMAT_VERSION if form else FORMAT_VERSION,
        "format": name,
        "alpha": source.alpha,
        "precision": "int8 backbone, float32 heads" if int8 else "float32",
        "input": {
            "min_size": source.rules.min_size,
            "max_size": source.rules.max_size,
            "resize": "shorter edge to min_size, longer at most max_size"
            + (", and into shape" if shape else "")
            + "; Pillow bilinear on uint8",
            **({"shape": list(shape)} if shape else {}),
            "channel_order": order,
            "layout": "images (N, 3, height, width) float32, 0 to 255, padded with mean; sizes (N, 2) of each"
            if form
            else "(3, height, width) float32, 0 to 255",
            "size_divisibility": source.model.backbone.size_divisibility,
            "inside_the_model": "normalisation with mean and std, padding to size_divisibility",
            "mean": source.model.pixel_mean.flatten().tolist(),
            "std": source.model.pixel_std.flatten().tolist(),
        },
        "outputs": {
            output: _by_picture(OUTPUTS[output]) if shape else OUTPUTS[output]
            for output in outputs_of(source.model, form)
        },
        **detector.thresholds,
        "num_classes": len(source.categories),
        "max_batch": None if name == "detectron2" else form.batch if form else 1,
        **({"tensorrt": {"command": BUILD_COMMAND, "measured": UNMEASURED}} if shape else {}),
        **({"opset": OPSET} if name in ("onnx", "openvino") else {}),
        "source": {
            "config_file": source.config_file,
            "opts": source.opts,
            "weights": source.weights,
            "weights_sha256": sha256_file(source.weights)
            if os.path.isfile(source.weights)
            else None,
            "teacher": dict(source.eager.teacher.source) | {"sha256": source.eager.teacher.sha256}
            if source.alpha == 1
            else None,
        },
        "versions": versions(*RUNTIMES[name]),
        "files": {
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            for path in sorted(folder.iterdir())
            if path.name != MANIFEST
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _by_picture(text: str) -> str:
    """An output of any length as one of D rows a picture."""
    return text.replace("(n,)", "(N, D)").replace("(n, ", "(N, D, ")
