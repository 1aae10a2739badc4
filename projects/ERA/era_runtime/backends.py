"""The four runtimes behind :class:`era_runtime.Predictor`; each is imported when it is first needed."""

from __future__ import annotations

import importlib
import re
import zipfile
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np

from era_runtime.batches import IMAGES, BatchBackend
from era_runtime.errors import DeploymentError

Output = tuple[np.ndarray, ...]
# Operators of torch 2.11 and torchvision 0.26 with the name of a file among their arguments.
FILE_ACCESS = re.compile(rb"\b(save|from_file|read_file|write_file|load_tensor)\b")
LARGEST_CODE = 1 << 26  # bytes; that of the toy detector has 0.2 MB
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


def onnx_backend(folder: Path, manifest: dict, num_threads: int | None):
    """onnxruntime on the CPU, of a graph of either kind."""
    ort = require("onnxruntime", package="onnxruntime", what="a folder of format onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = num_threads
    session = ort.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    takes = {value.name: value.shape for value in session.get_inputs()}
    if IMAGES not in takes:
        return OnnxBackend(session)
    names = [output.name for output in session.get_outputs()]
    # a fixed axis is a number, any other a name
    count, _, height, width = (x if isinstance(x, int) else None for x in takes[IMAGES])
    return BatchBackend(
        lambda feed: dict(zip(names, session.run(names, feed), strict=True)),
        takes,
        manifest["input"]["mean"],
        count,
        (height, width) if height and width else None,
    )


class OnnxBackend:
    """onnxruntime on the CPU; one image a call."""

    max_batch = 1

    def __init__(self, session):
        self.session = session
        given = {output.name for output in self.session.get_outputs()}
        self.names = [name for name in OUTPUT_NAMES if name in given]

    def __call__(self, images: list[np.ndarray]) -> list[Output]:
        """See :class:`era_runtime.predictor.Backend`."""
        return [tuple(self.session.run(self.names, {"image": image})) for image in images]


def openvino_backend(folder: Path, manifest: dict, num_threads: int | None):
    """OpenVINO on the CPU in float32, of a graph of either kind."""
    ov = require("openvino", package="openvino", what="a folder of format openvino")
    # Without the hint OpenVINO may compute in bfloat16 on CPUs that have it.
    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if num_threads is not None:
        config["INFERENCE_NUM_THREADS"] = num_threads
    model = ov.Core().compile_model(str(folder / "model.xml"), "CPU", config)
    takes = [name for value in model.inputs for name in value.names]
    if IMAGES not in takes:
        return OpenVinoBackend(model)
    names = [name for output in model.outputs for name in output.names]

    def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = model(feed)
        return {name: found[name].copy() for name in names}

    return BatchBackend(run, takes, manifest["input"]["mean"])


class OpenVinoBackend:
    """OpenVINO on the CPU in float32; one image a call."""

    max_batch = 1

    def __init__(self, model):
        self.model = model
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
        refuse_file_access(folder / "model.ts")
        self.model = self.torch.jit.load(str(folder / "model.ts"), map_location="cpu").eval()

    def __call__(self, images: list[np.ndarray]) -> list[Output]:
        """See :class:`era_runtime.predictor.Backend`."""
        outputs = []
        with self.torch.no_grad():
            for image in images:
                outputs.append(tuple(x.numpy() for x in self.model(self.torch.from_numpy(image))))
        return outputs


def refuse_file_access(path: Path) -> None:
    """A TorchScript file is a program: it must not name what reads or writes files, before any of it runs.

    Raises:
        DeploymentError: it does, or is no TorchScript file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sources = [i for i in archive.infolist() if i.filename.endswith(".py")]
            if sum(info.file_size for info in sources) > LARGEST_CODE:
                raise OSError(f"its code has more than {LARGEST_CODE} bytes")
            codes = [archive.read(info) for info in sources]
    except (zipfile.BadZipFile, OSError, RuntimeError, zlib.error, NotImplementedError) as e:
        raise DeploymentError(
            f"{path} is no TorchScript file ({e}): export the model again."
        ) from e
    for code in codes:
        if found := FILE_ACCESS.search(code):
            raise DeploymentError(
                f"{path} names {found[0].decode()}, which reads or writes files: a detector needs none of that, and "
                "nothing of it was run; export the model again."
            )


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
    "onnx": onnx_backend,
    "openvino": openvino_backend,
}
