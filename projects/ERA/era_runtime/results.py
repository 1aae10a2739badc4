"""Detections as COCO-format results."""

from __future__ import annotations

import json
import os
from types import ModuleType

import numpy as np

from era_runtime.backends import require
from era_runtime.predictor import Detections


def coco_results(detections: Detections, image_id: int, categories: list[dict]) -> list[dict]:
    """COCO's result entries: ``image_id, category_id, bbox [x, y, width, height], score``.

    Where there are masks, ``segmentation`` holds them in COCO's compressed run-length form.

    Raises:
        DeploymentError: there are masks, and pycocotools is not installed.
    """
    results = [
        {
            "image_id": image_id,
            "category_id": categories[int(c)]["id"],
            "bbox": [float(x0), float(y0), float(x1) - float(x0), float(y1) - float(y0)],
            "score": float(score),
        }
        for (x0, y0, x1, y1), score, c in zip(
            detections.boxes, detections.scores, detections.classes, strict=True
        )
    ]
    if detections.masks is not None:
        coco = require_mask_tools()
        for result, mask in zip(results, detections.masks, strict=True):
            rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return results


def require_mask_tools() -> ModuleType:
    """``pycocotools.mask``.

    Raises:
        DeploymentError: pycocotools is not installed.
    """
    return require("pycocotools.mask", package="pycocotools", what="a result with masks")


def write_json(data, path: str) -> None:
    """Write a JSON file whole or not at all; a name that is no UTF-8 becomes JSON's escapes of its bytes."""
    # Python reads such bytes as halves of surrogate pairs, and \udcXX is their spelling in JSON too.
    write_whole(path, json.dumps(data, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def write_whole(path: str, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    try:
        with open(path + ".partial", "wb") as f:
            f.write(content)
        os.replace(path + ".partial", path)
    finally:
        if os.path.exists(path + ".partial"):
            os.remove(path + ".partial")
