"""The manifest of a deployment folder: what it holds, and how it is checked when it is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from era_runtime.errors import DeploymentError

FORMAT_VERSION = 1
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
        DeploymentError: no manifest, one of another format version or without a needed entry, an unknown
            model format, or a file that is absent or differs from its SHA-256.
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
    except ValueError as e:
        raise DeploymentError(f"{path} is not JSON ({e}): export the model again.") from e
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DeploymentError(
            f"{path} has format_version {version!r}: this version reads {FORMAT_VERSION}; export the "
            "model again, or use the version of this package that made the folder."
        )
    _check_entries(path, manifest, _KEYS)
    _check_entries(path, manifest["input"], _INPUT_KEYS)
    if manifest["format"] not in MODEL_FILES:
        raise DeploymentError(
            f"{path} has format {manifest['format']!r}: expected one of {', '.join(MODEL_FILES)}."
        )
    _check_files(folder, manifest)
    return manifest


def read_classes(folder: str | Path) -> list[dict]:
    """``[{"id": COCO category id, "name": ...}, ...]`` in the order of the model's class indices."""
    classes = json.loads((Path(folder) / CLASSES).read_text(encoding="utf-8"))
    if not isinstance(classes, list) or not all(
        isinstance(c, dict) and isinstance(c.get("id"), int) and isinstance(c.get("name"), str)
        for c in classes
    ):
        raise DeploymentError(
            f"{Path(folder) / CLASSES} is no list of {{id, name}}: export the model again."
        )
    return classes


def _check_entries(path: Path, found: dict, expected: dict) -> None:
    for key, kind in expected.items():
        if key not in found or not isinstance(found[key], kind):
            raise DeploymentError(
                f"{path} has no fit entry {key!r} (found {found.get(key)!r}): export the model again."
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
        if sha256_file(path) != expected:
            raise DeploymentError(
                f"{path} does not match the SHA-256 in {MANIFEST}: the file was changed or damaged; copy "
                "the folder again or export the model again."
            )
