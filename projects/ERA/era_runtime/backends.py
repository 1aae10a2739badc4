"""The four runtimes behind :class:`era_runtime.Predictor`; each is imported when it is first needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np

from era_runtime.errors import DeploymentError

Output = tuple[np.ndarray, ...]
OUTPUT_NAMES = ("boxes", "scores", "classes", "masks")  # the last one of models that predict masks


def require(module: str, *, package: str, what: str) -> ModuleType:
    """Import a runtime.

    Raises:
        DeploymentError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise DeploymentError(
            f"{what} needs {package}, which cannot be imported ({e}): install it."
        ) from e


class OnnxBackend:
    """onnxruntime on the CPU; one image a call."""

    max_batch = 1

    def __init__(self, folder: Path, manifest: dict, num_threads: int | None):
        ort = require("onnxruntime", package="onnxruntime", what="a folder of format onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
            options.inter_op_num_threads = num_threads
        self.session = ort.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        given = {output.name for output in self.session.get_outputs()}
        self.names = [name for name in OUTPUT_NAMES if name in given]

    def __call__(self, images: list[np.ndarray]) -> list[Output]:
        """See :class:`era_runtime.predictor.Backend`."""
        return [tuple(self.session.run(self.names, {"image": image})) for image in images]


class OpenVinoBackend:
    """OpenVINO on the CPU in float32; one image a call."""

    max_batch = 1

    def __init__(self, folder: Path, manifest: dict, num_threads: int | None):
        ov = require("openvino", package="openvino", what="a folder of format openvino")
        # Without the hint OpenVINO may compute in bfloat16 on CPUs that have it.
        config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if num_threads is not None:
            config["INFERENCE_NUM_THREADS"] = num_threads
        self.model = ov.Core().compile_model(str(folder / "model.xml"), "CPU", config)
        given = {name for output in self.model.outputs for name in output.names}
        self.names = [name for name in OUTPUT_NAMES if name in given]

    def __call__(self, images: list[np.ndarray]) -> list[Output]:
        """See :class:`era_runtime.predictor.Backend`."""
        outputs = []
        for image in images:
            result = self.model([image])
            outputs.append(tuple(result[name].copy() for name in self.names))
        return outputs


class TorchScriptBackend:
    """A traced model; needs torch and torchvision, not detectron2; one image a call."""

    max_batch = 1

    def __init__(self, folder: Path, manifest: dict, num_threads: int | None):
        what = "a folder of format torchscript"
        self.torch = require("torch", package="torch", what=what)
        require("torchvision", package="torchvision", what=what)  # registers NMS and ROIAlign
        if num_threads is not None:
            self.torch.set_num_threads(num_threads)
        self.model = self.torch.jit.load(str(folder / "model.ts"), map_location="cpu").eval()

    def __call__(self, images: list[np.ndarray]) -> list[Output]:
        """See :class:`era_runtime.predictor.Backend`."""
        outputs = []
        with self.torch.no_grad():
            for image in images:
                outputs.append(tuple(x.numpy() for x in self.model(self.torch.from_numpy(image))))
        return outputs


def detectron2_backend(folder: Path, manifest: dict, num_threads: int | None):
    """The eager model; needs torch, detectron2 and the package ``era``; takes real batches."""
    what = "a folder of format detectron2"
    torch = require("torch", package="torch", what=what)
    require("detectron2", package="detectron2", what=what)
    deploy = require("era.deploy.model", package="the package era", what=what)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return deploy.EagerBackend(deploy.load_folder(folder, manifest))


BACKENDS = {
    "detectron2": detectron2_backend,
    "torchscript": TorchScriptBackend,
    "onnx": OnnxBackend,
    "openvino": OpenVinoBackend,
}
