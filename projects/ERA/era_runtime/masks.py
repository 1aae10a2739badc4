"""Masks of boxes as masks of images: the arithmetic of ``detectron2.layers.paste_masks_in_image`` in numpy."""

from __future__ import annotations

import numpy as np


def paste_masks(
    masks: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float = 0.5
) -> np.ndarray:
    """Stretch every mask over its box in the image.

    Args:
        masks: (n, M, M) float32, probabilities of the M x M cells that a box is divided into.
        boxes: (n, 4) float32, x0, y0, x1, y1 in pixels of the image; may reach beyond it, not empty.
        height, width: of the image.
        threshold: least probability, interpolated between the cells' centres, of a pixel of the object.

    Returns:
        (n, height, width) bool.
    """
    pasted = np.zeros((len(boxes), height, width), dtype=bool)
    for image, mask, (x0, y0, x1, y1) in zip(pasted, masks, boxes, strict=True):
        # Beyond a pixel outside its box no mask reaches the threshold.
        top, bottom = np.clip([np.floor(y0) - 1, np.ceil(y1) + 1], 0, height).astype(int)
        left, right = np.clip([np.floor(x0) - 1, np.ceil(x1) + 1], 0, width).astype(int)
        rows = _weights(np.arange(top, bottom), y0, y1, len(mask))
        columns = _weights(np.arange(left, right), x0, x1, len(mask))
        image[top:bottom, left:right] = rows @ mask @ columns.T >= threshold
    return pasted


def _weights(pixels: np.ndarray, low: np.float32, high: np.float32, cells: int) -> np.ndarray:
    """Linear interpolation along one edge of a box: each cell's weight at each pixel's centre.

    Args:
        pixels: (p,) coordinates of pixels.
        low, high: ends of the box.

    Returns:
        (p, cells) float32; beyond the outermost centres it falls to 0, as if zeros lay around.
    """
    centres = pixels.astype(np.float32) + np.float32(0.5)
    grid = (centres - low) / (high - low) * 2 - 1  # -1 to 1, as torch's grid_sample takes it
    places = ((grid + 1) * cells - 1) / 2
    return np.maximum(1 - np.abs(places[:, None] - np.arange(cells, dtype=np.float32)), 0)
