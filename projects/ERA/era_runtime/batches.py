"""Graphs over batches: pictures of different sizes as one array, and each picture's part of what comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

IMAGES, SIZES = "images", "sizes"  # the inputs' names


def as_batch(
    images: Sequence[np.ndarray],
    mean: Sequence[float],
    *,
    count: int = 0,
    shape: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """``images`` (N, 3, H, W) and ``sizes`` (N, 2), both float32: each picture at the top left, the rest of the mean, which is
    zero behind the model's normalisation.

    Args:
        images: (3, h, w) float32 each.
        mean: of each channel, in the model's order.
        count: at least so many pictures; further ones are of the mean alone. 0 = as many as there are.
        shape: (H, W), pixels; None = the largest height and width that there are.
    """
    height, width = shape or (max(i.shape[1] for i in images), max(i.shape[2] for i in images))
    batch = np.empty((max(count, len(images)), 3, height, width), np.float32)
    batch[:] = np.asarray(mean, np.float32)[:, None, None]
    sizes = np.full((len(batch), 2), (height, width), np.float32)
    for own, size, image in zip(batch, sizes, images, strict=False):
        own[:, : image.shape[1], : image.shape[2]] = image
        size[:] = image.shape[1:]
    return {IMAGES: batch, SIZES: sizes}


class BatchBackend:
    """A graph over batches behind :class:`era_runtime.Predictor`, whatever runs it.

    Args:
        run: from the inputs by name to the outputs by name.
        takes: names of the graph's inputs.
        mean: of each channel, in the model's order.
        count: pictures that a call takes, neither more nor fewer; None = any number.
        shape: (H, W) that it takes, pixels; None = any.
    """

    def __init__(
        self,
        run: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]],
        takes: Sequence[str],
        mean: Sequence[float],
        count: int | None = None,
        shape: tuple[int, int] | None = None,
    ):
        self.run, self.takes, self.mean = run, frozenset(takes), mean
        self.count, self.shape, self.max_batch = count, shape, count

    def __call__(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
        """See :class:`era_runtime.predictor.Backend`."""
        feed = as_batch(images, self.mean, count=self.count or 0, shape=self.shape)
        found = self.run({name: array for name, array in feed.items() if name in self.takes})
        parts = [found[name] for name in ("boxes", "scores", "classes", "masks") if name in found]
        if "pictures" in found:
            rows = [found["pictures"] == i for i in range(len(images))]
            return [tuple(part[own] for part in parts) for own in rows]
        if not found["complete"][: len(images)].all():
            warnings.warn(
                "a picture has more candidates than this model of fixed shapes looks at: some of its detections may be missing "
                "or superfluous; export with a higher score threshold, or without --shape.",
                stacklevel=2,
            )
        counts = found["counts"]
        return [tuple(part[i, : counts[i]] for part in parts) for i in range(len(images))]
