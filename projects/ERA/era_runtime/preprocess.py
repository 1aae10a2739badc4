"""Before and after the model: the arithmetic of Detectron2's DefaultPredictor in numpy and Pillow.

``detectron2.data.transforms.ResizeShortestEdge`` on uint8 (Pillow, bilinear, with antialiasing),
float32 in (3, H, W), and ``detectron2.modeling.postprocessing.detector_postprocess`` for boxes.
Normalisation and padding are inside the models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from era_runtime.errors import DeploymentError
from era_runtime.pictures import MAX_PIXELS, read_picture


@dataclass(frozen=True)
class InputRules:
    """How an image becomes the model's input.

    Attributes:
        min_size: pixels; the shorter edge is scaled to it. 0 = images are not scaled.
        max_size: pixels; if the longer edge would exceed it, the image is scaled to it instead.
        channel_order: ``BGR`` or ``RGB``, what the model expects.
        shape: (height, width) of the model's one input shape, pixels, which every image is scaled to fit into; None = any.
    """

    min_size: int
    max_size: int
    channel_order: str
    shape: tuple[int, int] | None = None


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture file as (H, W, 3) uint8, BGR, see :func:`era_runtime.pictures.read_picture`.

    Raises:
        DeploymentError: the file cannot be read as a picture.
    """
    image = read_picture(path, max_pixels).convert("RGB")
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def resized_shape(height: int, width: int, rules: InputRules) -> tuple[int, int]:
    """Height and width in pixels after ResizeShortestEdge; smaller where that does not fit into the one shape."""
    new_height, new_width = float(height), float(width)
    if rules.min_size > 0:
        size = float(rules.min_size)
        scale = size / min(height, width)
        if height < width:
            new_height, new_width = size, scale * width
        else:
            new_height, new_width = scale * height, size
        if max(new_height, new_width) > rules.max_size:
            scale = rules.max_size * 1.0 / max(new_height, new_width)
            new_height, new_width = new_height * scale, new_width * scale
    if rules.shape is not None:
        scale = min(1.0, rules.shape[0] / new_height, rules.shape[1] / new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


def preprocess(image: np.ndarray, rules: InputRules) -> np.ndarray:
    """One image as the model's input.

    Args:
        image: (H, W, 3) uint8, BGR.

    Returns:
        (3, h, w) float32, 0 to 255, in the model's channel order.

    Raises:
        DeploymentError: another shape or type, or an image so narrow that nothing is left of it.
    """
    shape = getattr(image, "shape", None)
    if getattr(image, "dtype", None) != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise DeploymentError(
            f"an image is {type(image).__name__} of shape {shape} and type "
            f"{getattr(image, 'dtype', None)}: expected an array (height, width, 3) of uint8, BGR."
        )
    if rules.channel_order == "RGB":
        image = image[:, :, ::-1]
    height, width = image.shape[:2]
    new_height, new_width = resized_shape(height, width, rules)
    if new_height == 0 or new_width == 0:
        raise DeploymentError(
            f"an image of {width}x{height} pixels is too narrow: scaled to at most "
            f"{rules.shape[1] if rules.shape else rules.max_size} pixels nothing is left of it."
        )
    if rules.min_size > 0 or (new_height, new_width) != (
        height,
        width,
    ):  # at equal sizes Pillow copies
        resized = Image.fromarray(np.ascontiguousarray(image)).resize(
            (new_width, new_height), Image.Resampling.BILINEAR
        )
        image = np.asarray(resized)
    return np.ascontiguousarray(image.astype(np.float32).transpose(2, 0, 1))


def scale_back(
    boxes: np.ndarray, from_size: tuple[int, int], to_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the model's input in pixels of the original image, clipped to it.

    Args:
        boxes: (n, 4) float32, x0, y0, x1, y1.
        from_size, to_size: (height, width) of the model's input and of the original image.

    Returns:
        Boxes (n, 4) float32, and (n,) bool: which of them are not empty.
    """
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    boxes[:, 0::2] *= np.float32(to_size[1] / from_size[1])
    boxes[:, 1::2] *= np.float32(to_size[0] / from_size[0])
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, to_size[1])
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, to_size[0])
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
