"""One predictor for all formats: images in, detections in pixels of those images out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from era_runtime.backends import BACKENDS
from era_runtime.errors import DeploymentError
from era_runtime.manifest import read_classes, read_manifest
from era_runtime.masks import paste_masks
from era_runtime.preprocess import InputRules, preprocess, resized_shape, scale_back


class Backend(Protocol):
    """A loaded model.

    Attributes:
        max_batch: images that one call takes at most; None = as many as memory holds.
    """

    max_batch: int | None

    def __call__(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
        """Images (3, h, w) float32 to boxes (n, 4) in their pixels, scores (n,) and classes (n,) each; a model
        with masks adds their probabilities (n, M, M) on M x M cells of each box."""
        ...


@dataclass(frozen=True)
class Detections:
    """What was found in one image, by falling score.

    Attributes:
        boxes: (n, 4) float32, x0, y0, x1, y1 in pixels of the image that was given.
        scores: (n,) float32, 0 to 1.
        classes: (n,) int64, indices into the predictor's ``class_names``.
        class_names: n names.
        masks: (n, H, W) bool, the pixels of each object in the image that was given; None if the model
            predicts none.
        mask_probabilities: (n, M, M) float32, what the masks come from: M x M cells of each box; or None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    class_names: tuple[str, ...]
    masks: np.ndarray | None = None
    mask_probabilities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, keep: np.ndarray) -> Detections:
        """Some of the detections: indices, or (n,) bool."""
        return Detections(
            self.boxes[keep],
            self.scores[keep],
            self.classes[keep],
            tuple(np.array(self.class_names, dtype=object)[keep]),
            *(m if m is None else m[keep] for m in (self.masks, self.mask_probabilities)),
        )


class Predictor:
    """Detects objects; which runtime does the work is no concern of the caller.

    Args:
        backend: the loaded model.
        rules: how images are scaled.
        categories: ``[{"id", "name"}, ...]`` in the order of the class indices.
        batch_size: images handed to the model at once.
        manifest: of the folder; empty for a model that came from none.

    Raises:
        DeploymentError: a batch size that the model cannot take.
    """

    def __init__(
        self,
        backend: Backend,
        rules: InputRules,
        categories: list[dict],
        *,
        batch_size: int = 1,
        manifest: dict | None = None,
    ):
        if batch_size < 1 or (backend.max_batch is not None and batch_size > backend.max_batch):
            name = (manifest or {}).get("format", "this")
            most = "at least 1" if backend.max_batch is None else f"1 to {backend.max_batch}"
            raise DeploymentError(
                f"batch size {batch_size} was asked for, but the {name} model takes {most} at once: "
                "choose a batch size that it can take (a list of images is always welcome), or export the model with "
                "--batch any (format onnx or openvino)."
            )
        self.backend = backend
        self.rules = rules
        self.categories = categories
        self.class_names = tuple(c["name"] for c in categories)
        self.batch_size = batch_size
        self.manifest = manifest or {}

    def __call__(self, images: np.ndarray | Sequence[np.ndarray]) -> Detections | list[Detections]:
        """Detections of one image, or a list of them for a sequence of images.

        Images that the model is given in one size share its calls, ``batch_size`` at most, so that nothing is padded and the
        results are those of one image after the other.

        Args:
            images: (H, W, 3) uint8 in BGR, of any size, or a sequence of such arrays.

        Raises:
            DeploymentError: an array of another shape or type.
        """
        if isinstance(images, np.ndarray) and images.ndim == 3:
            return self.one_call([images])[0]
        images = list(images)
        results: list[Detections | None] = [None] * len(images)
        for rows in batches_of(list(map(self.input_shape, images)), self.batch_size):
            for row, found in zip(rows, self.one_call([images[i] for i in rows]), strict=True):
                results[row] = found
        return results

    def input_shape(self, image: np.ndarray) -> tuple[int, int] | None:
        """Height and width in pixels of what the model is given of an image; None where it is no image."""
        shape = getattr(image, "shape", ())
        if len(shape) != 3 or 0 in shape:
            return None
        return self.rules.shape or resized_shape(*shape[:2], self.rules)

    def _run(self, inputs: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
        try:
            return self.backend(inputs)
        except Exception as e:
            if not self.manifest:  # a model of one's own: whatever it raises
                raise
            raise DeploymentError(
                f"the {self.manifest.get('format')} model fails on images of shape {[i.shape for i in inputs]} "
                f"({_first_words(e)}): it is damaged, or memory is short; export it again, or scale images smaller."
            ) from e

    def one_call(self, images: list[np.ndarray]) -> list[Detections]:
        """Detections of images that the model is given in one call; of different sizes, the smaller are padded to the largest,
        which moves results a little, as it does in Detectron2.

        Args:
            images: (H, W, 3) uint8 in BGR; not more than the model can take.

        Raises:
            DeploymentError: an array of another shape or type.
        """
        inputs = [preprocess(image, self.rules) for image in images]
        results = []
        for image, given, output in zip(images, inputs, self._run(inputs), strict=True):
            _check_output(output, len(self.categories), self.manifest.get("format", "given"))
            boxes, scores, classes, *masks = output
            boxes, keep = scale_back(boxes, given.shape[1:], image.shape[:2])
            boxes, classes = boxes[keep], np.asarray(classes, dtype=np.int64)[keep]
            cells = np.asarray(masks[0], dtype=np.float32)[keep] if masks else None
            results.append(
                Detections(
                    boxes=boxes,
                    scores=np.asarray(scores, dtype=np.float32)[keep],
                    classes=classes,
                    class_names=tuple(self.class_names[c] for c in classes),
                    masks=paste_masks(cells, boxes, *image.shape[:2]) if masks else None,
                    mask_probabilities=cells,
                )
            )
        return results


def batches_of(shapes: Sequence[Hashable], most: int) -> list[list[int]]:
    """Indices of equal entries together, at most ``most``, by the first of each."""
    open_batches: dict[Hashable, list[int]] = {}
    batches = []
    for i, shape in enumerate(shapes):
        batch = open_batches.get(shape)
        if batch is None or len(batch) == most:
            batch = open_batches[shape] = []
            batches.append(batch)
        batch.append(i)
    return batches


def _not_loaded(folder: str | Path, manifest: dict, error: Exception) -> str:
    return (
        f"{folder}: the model cannot be loaded as {manifest['format']} ({_first_words(error)}), though its files are those of the "
        "manifest: it is damaged, or of another version of the runtime; export it again."
    )


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_output(output: tuple, count: int, what: str) -> None:
    """A model of somebody else may give anything."""
    shapes = [np.shape(part) for part in output]
    n = shapes[1][0] if len(shapes) in (3, 4) and len(shapes[1]) == 1 else None
    fits = n is not None and shapes[0] == (n, 4) and shapes[2] == (n,)
    if fits and len(shapes) == 4:
        fits = len(shapes[3]) == 3 and shapes[3][0] == n and shapes[3][1] == shapes[3][2]
    classes = np.asarray(output[2]) if fits else np.zeros(0)
    if not fits or (n and (classes.min() < 0 or classes.max() >= count)):
        raise DeploymentError(
            f"the {what} model gives outputs of shapes {shapes}{f' and classes beyond {count}' if fits else ''}: "
            "expected boxes (n, 4), scores (n,), classes (n,) and perhaps masks (n, M, M); export it again."
        )


def load(
    folder: str | Path, *, batch_size: int | None = None, num_threads: int | None = None
) -> Predictor:
    """A predictor from a deployment folder, on the CPU.

    Args:
        folder: made by ``tools/export.py``; every file's SHA-256 is checked.
        batch_size: images handed to the model at once, at most ``max_batch`` of the manifest; None = 1, or as many as a model
            of a fixed number takes.
        num_threads: CPU threads of the runtime; None leaves it to the runtime. For torch this holds for
            the whole process.

    Raises:
        DeploymentError: no deployment folder, a damaged one, one of an unknown format or version, a
            runtime that is not installed, or a batch size that the model cannot take.
    """
    manifest = read_manifest(folder)
    categories = read_classes(folder)
    given = manifest["input"]
    shape = tuple(given["shape"]) if given.get("shape") else None
    rules = InputRules(given["min_size"], given["max_size"], given["channel_order"], shape)
    count = manifest.get("num_classes", len(categories))
    if count != len(categories):
        raise DeploymentError(
            f"{folder} has num_classes {count} and names {len(categories)} classes: export the model again."
        )
    try:
        backend = BACKENDS[manifest["format"]](Path(folder), manifest, num_threads)
    except ValueError as e:
        if isinstance(e, DeploymentError) or type(e).__name__ == "UserError":
            raise
        raise DeploymentError(_not_loaded(folder, manifest, e)) from e
    except Exception as e:  # every runtime has its own way to say that a file is damaged
        raise DeploymentError(_not_loaded(folder, manifest, e)) from e
    if batch_size is None:
        batch_size = backend.max_batch or 1
    return Predictor(backend, rules, categories, batch_size=batch_size, manifest=manifest)
