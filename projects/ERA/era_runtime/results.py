"""Detections as COCO-format results."""

from __future__ import annotations

import json
import os

from era_runtime.predictor import Detections


def coco_results(detections: Detections, image_id: int, categories: list[dict]) -> list[dict]:
    """COCO's result entries: ``image_id, category_id, bbox [x, y, width, height], score``."""
    return [
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


def write_json(data, path: str) -> None:
    """Write a JSON file whole or not at all."""
    try:
        with open(path + ".partial", "w", encoding="utf-8") as f:
            json.dump(data, f, ensure_ascii=False)
        os.replace(path + ".partial", path)
    finally:
        if os.path.exists(path + ".partial"):
            os.remove(path + ".partial")
