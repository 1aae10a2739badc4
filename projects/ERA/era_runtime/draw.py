"""Boxes, masks, names and scores drawn into a picture; needs OpenCV."""

from __future__ import annotations

import numpy as np

from era_runtime.backends import require
from era_runtime.predictor import Detections

# BGR, far apart from one another; classes beyond take them again.
COLOURS = (
    (75, 25, 230), (75, 180, 60), (216, 99, 67), (49, 130, 245), (180, 30, 145), (200, 160, 20),
    (230, 50, 240), (40, 160, 130), (128, 0, 0), (0, 90, 160), (0, 100, 0), (60, 60, 60),
)  # fmt: skip


def draw(image: np.ndarray, detections: Detections) -> np.ndarray:
    """A copy of the image (H, W, 3) uint8 BGR with the detections drawn in, the surest on top."""
    cv2 = require("cv2", package="opencv-python-headless", what="an annotated picture")
    image = np.ascontiguousarray(image).copy()
    unit = max(min(image.shape[:2]) / 480, 0.5)
    thick, scale = max(round(1.5 * unit), 1), 0.45 * unit
    for i in range(len(detections) - 1, -1, -1):
        colour = COLOURS[int(detections.classes[i]) % len(COLOURS)]
        if detections.masks is not None:
            inside = detections.masks[i]
            image[inside] = 0.5 * image[inside] + 0.5 * np.array(colour)
        x0, y0, x1, y1 = (round(float(v)) for v in detections.boxes[i])
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, thick)
        text = f"{detections.class_names[i]} {detections.scores[i]:.2f}"
        (wide, high), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        top = max(y0 - high - below, 0)
        cv2.rectangle(image, (x0, top), (x0 + wide, top + high + below), colour, -1)
        cv2.putText(image, text, (x0, top + high), cv2.FONT_HERSHEY_SIMPLEX, scale,
                    (255, 255, 255), 1, cv2.LINE_AA)  # fmt: skip
    return image
