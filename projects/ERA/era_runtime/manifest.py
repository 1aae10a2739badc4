"""The manifest of a deployment folder: what it holds, and how it is checked when it is read."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from era_runtime.errors import DeploymentError
from era_runtime.onnx_file import external_files

FORMAT_VERSION = 1  # of folders whose model takes one picture, or is of format detectron2
BATCH_FORMAT_VERSION = 2  # of graphs over batches
FORMAT_VERSIONS = (FORMAT_VERSION, BATCH_FORMAT_VERSION)
MANIFEST = "manifest.json"
CLASSES = "classes.json"
PARITY = "parity.json"
# Files without which a format cannot be loaded.
MODEL_FILES = {
    "detectron2": ("model.pth", "config.yaml"),
    "torchscript": ("model.ts",),
    "onnx": ("model.onnx",),
    "openvino": ("model.xml", "model.bin"),
}
_KEYS = {
    "format": str,
    "alpha": (int, float),
    "precision": str,
    "input": dict,
    "score_threshold": (int, float),
    "max_batch": (int, type(None)),
    "files": dict,
}
_INPUT_KEYS = {"min_size": int, "max_size": int, "channel_order": str}
MAX_EDGE = 16384  # pixels that a picture is scaled to at most
CHANNEL_ORDERS = ("BGR", "RGB")
# Least and most of the numbers that a manifest may hold.
_RANGES = {
    "alpha": (0, 1),
    "max_batch": (1, 1 << 20),
    "num_classes": (1, 1 << 20),
    "score_threshold": (0, 1),
    "nms_threshold": (0, 1),
    "max_detections": (-1, 1 << 20),
}
_INPUT_RANGES = {"min_size": (0, MAX_EDGE), "max_size": (1, MAX_EDGE)}


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> dict:
    """Read a deployment folder's manifest and check every file that it lists.

    Raises:
        DeploymentError: no manifest, one of another format version, without a needed entry or with a number out of
            its range, an unknown model format, a file that is absent or differs from its SHA-256, or an ONNX file
            that takes weights from a file without one.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DeploymentError(
            f"{folder} is no deployment folder ({MANIFEST} cannot be read: {e.strerror}): name a folder "
            "that tools/export.py made."
        ) from e
    except (ValueError, RecursionError) as e:
        raise DeploymentError(f"{path} is not JSON ({e}): export the model again.") from e
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in FORMAT_VERSIONS or isinstance(version, (bool, float)):
        raise DeploymentError(
            f"{path} has format_version {version!r}: this version reads {' and '.join(map(str, FORMAT_VERSIONS))}; export the "
            "model again, or use the version of this package that made the folder."
        )
    _check_entries(path, manifest, _KEYS)
    _check_entries(path, manifest["input"], _INPUT_KEYS)
    _check_ranges(path, manifest, _RANGES)
    _check_ranges(path, manifest["input"], _INPUT_RANGES)
    _check_batch_entries(path, manifest)
    order = manifest["input"]["channel_order"]
    if order not in CHANNEL_ORDERS:
        raise DeploymentError(
            f"{path} has channel_order {order!r}: expected one of {', '.join(CHANNEL_ORDERS)}; export the model again."
        )
    if manifest["format"] not in MODEL_FILES:
        raise DeploymentError(
            f"{path} has format {manifest['format']!r}: expected one of {', '.join(MODEL_FILES)}."
        )
    _check_files(folder, manifest)
    if manifest["format"] == "onnx":
        _check_external_data(folder / "model.onnx", manifest["files"])
    return manifest


def read_classes(folder: str | Path) -> list[dict]:
    """``[{"id": COCO category id, "name": ...}, ...]`` in the order of the model's class indices."""
    path = Path(folder) / CLASSES
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise DeploymentError(f"{path} is not JSON ({e}): export the model again.") from e
    if not isinstance(classes, list) or not all(
        isinstance(c, dict) and isinstance(c.get("id"), int) and isinstance(c.get("name"), str)
        for c in classes
    ):
        raise DeploymentError(f"{path} is no list of {{id, name}}: export the model again.")
    return classes


def _check_entries(path: Path, found: dict, expected: dict) -> None:
    for key, kind in expected.items():
        if key not in found or not isinstance(found[key], kind):
            raise DeploymentError(
                f"{path} has no fit entry {key!r} (found {found.get(key)!r}): export the model again."
            )


def _check_ranges(path: Path, found: dict, ranges: dict[str, tuple[int, int]]) -> None:
    for key, (low, high) in ranges.items():
        value = found.get(key)
        if value is None:  # whether it may be absent was looked at before
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            raise DeploymentError(
                f"{path} has {key} {value!r}: expected a number from {low} to {high}; export the model again."
            )


def _check_batch_entries(path: Path, manifest: dict) -> None:
    """The one input shape, where there is one, and what a graph over batches is padded with."""
    if manifest["input"].get("shape") is not None:
        _check_numbers(path, manifest["input"], "shape", 2, (1, MAX_EDGE), int)
    if manifest["format_version"] == BATCH_FORMAT_VERSION:
        _check_numbers(path, manifest["input"], "mean", 3, (-MAX_EDGE, MAX_EDGE), (int, float))


def _check_numbers(path: Path, found: dict, key: str, count: int, limits: tuple, kind) -> None:
    values = found.get(key)
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, kind) for v in values):  # fmt: skip
        raise DeploymentError(
            f"{path} has {key} {values!r}: expected a list of {count} numbers; export the model again."
        )
    for value in values:
        _check_ranges(path, {key: value}, {key: limits})


def _check_external_data(path: Path, files: dict) -> None:
    """Weights beside an ONNX file are files of the manifest, whose hashes were checked."""
    try:
        names = external_files(path)
    except ValueError as e:
        raise DeploymentError(f"{path} is no ONNX file ({e}): export the model again.") from e
    for name in sorted(names):
        if name not in files:
            raise DeploymentError(
                f"{path} takes weights from {name!r}, which {MANIFEST} does not list: nothing is loaded without its "
                "SHA-256; export the model again."
            )


def _check_files(folder: Path, manifest: dict) -> None:
    files = manifest["files"]
    for name in (*MODEL_FILES[manifest["format"]], CLASSES):
        if name not in files:
            raise DeploymentError(
                f"{folder / MANIFEST} does not list {name}: export the model again."
            )
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name:
            raise DeploymentError(
                f"{folder / MANIFEST} lists {name!r}, which is not a plain file name: export again."
            )
        if not path.is_file():
            raise DeploymentError(
                f"{path} is missing, though {MANIFEST} lists it: copy the whole folder again."
            )
        expected = entry.get("sha256") if isinstance(entry, dict) else None
        try:
            found = sha256_file(path)
        except OSError as e:
            raise DeploymentError(
                f"{path} cannot be read ({e.strerror}): correct its permissions."
            ) from e
        if found != expected:
            raise DeploymentError(
                f"{path} does not match the SHA-256 in {MANIFEST}: the file was changed or damaged; copy "
                "the folder again or export the model again."
            )
