"""Feature maps in numpy and float64, written without regard to speed: what the tests of losses on maps compare with."""

from __future__ import annotations

import numpy as np
from numpy import ndarray
from torch import nn


def softmax(x: ndarray, axis: int | tuple[int, ...]) -> ndarray:
    """Shifted by the largest, so that nothing overflows."""
    shifted = np.exp(x - x.max(axis=axis, keepdims=True))
    return shifted / shifted.sum(axis=axis, keepdims=True)


def conv(maps: ndarray, layer: nn.Conv2d) -> ndarray:
    """What a conv of stride 1 that keeps height and width makes of maps (B, C, H, W): a sum over its shifts."""
    weight = layer.weight.detach().double().numpy()
    side = weight.shape[-1] // 2
    height, width = maps.shape[-2:]
    padded = np.pad(maps, [(0, 0), (0, 0), (side, side), (side, side)])
    total = 0.0
    for i in range(weight.shape[-2]):
        for j in range(weight.shape[-1]):
            shifted = padded[:, :, i : i + height, j : j + width]
            total = total + np.einsum("oc,bchw->bohw", weight[:, :, i, j], shifted)
    if layer.bias is not None:
        total = total + layer.bias.detach().double().numpy()[:, None, None]
    return total


def batch_norm(maps: ndarray, eps: float = 1e-5) -> ndarray:
    """By the batch's own statistics, gain 1 and shift 0."""
    mean = maps.mean(axis=(0, 2, 3), keepdims=True)
    return (maps - mean) / np.sqrt(maps.var(axis=(0, 2, 3), keepdims=True) + eps)


def pooled(maps: ndarray, side: int) -> ndarray:
    """Means over a grid of ``side`` times ``side`` equal cells; height and width must divide by it."""
    images, channels, height, width = maps.shape
    cells = maps.reshape(images, channels, side, height // side, side, width // side)
    return cells.mean(axis=(3, 5))
