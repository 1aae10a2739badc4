"""Checks of a COCO-format file's annotations: boxes, masks and keypoints that would end a run hours later."""

import contextlib
import itertools
import logging
import math

import numpy as np

from era.data.rle import checked_rle
from era.errors import UserError

logger = logging.getLogger(__name__)


def show(value) -> str:
    """A value of a user's file for a message, cut to 80 characters."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def box_array(at: str, entries: list[dict]) -> np.ndarray:
    """The boxes (n, 4), float64: x, y, width, height in pixels.

    Raises UserError for one that is not four finite numbers; ``at`` names the file.
    """
    boxes = [entry.get("bbox") for entry in entries]
    values = None
    # Whole columns at once: one Python step per annotation and test would take long on COCO.
    if (
        set(map(type, boxes)) <= {list}
        and set(map(len, boxes)) <= {4}
        and set(map(type, itertools.chain.from_iterable(boxes))) <= {int, float}
    ):
        with contextlib.suppress(OverflowError):  # an integer beyond every float
            values = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    if values is None or not np.isfinite(values).all():
        i = next(i for i, box in enumerate(boxes) if not _is_box(box))
        raise UserError(
            f"{at}: annotations[{i}] has the bbox {show(boxes[i])}: expected four finite numbers, "
            "[x, y, width, height] in pixels"
        )
    return values


def objects_on_pictures(at: str, entries: list[dict], boxes: np.ndarray, sizes: dict) -> np.ndarray:
    """Which boxes (n, 4) have an area on their picture; the others are counted in one warning.

    Args:
        sizes: (width, height) by image id.

    Returns:
        (n,) bool.
    """
    limits = np.array([sizes[entry["image_id"]] for entry in entries], dtype=float).reshape(-1, 2)
    ends = boxes[:, :2] + boxes[:, 2:]
    empty = (boxes[:, 2:] <= 0).any(axis=1)
    outside = ~empty & ((ends <= 0) | (boxes[:, :2] >= limits)).any(axis=1)
    # Rounding puts many boxes of COCO a fraction of a pixel beyond the edge.
    beyond = ~empty & ~outside & ((boxes[:, :2] < -1) | (ends > limits + 1)).any(axis=1)
    kinds = {
        "have a width or height of 0 or less": empty,
        "lie outside their picture": outside,
        "reach out of it by more than a pixel": beyond,
    }
    found = [
        f"{mask.sum()} {words} (first: annotations[{mask.argmax()}], {boxes[mask.argmax()].tolist()})"
        for words, mask in kinds.items()
        if mask.any()
    ]
    if found:
        logger.warning(
            "%s: of %d boxes %s; the first two kinds are left out of training, the last is cut at the edge: correct "
            "them, above all if they are many",
            *(at, len(entries), ", ".join(found)),
        )
    return ~empty & ~outside


def check_masks(at: str, entries: list[dict], sizes: dict, mask_format: str | None) -> None:
    """Every mask that there is can be read, whether it is trained on or not, for pycocotools reads it in any case.

    Raises UserError for polygons that are no lists of three or more finite points near the picture, and for run
    lengths that are none of the picture.

    Args:
        sizes: (width, height) by image id.
        mask_format: INPUT.MASK_FORMAT if masks are trained on, "" if they are evaluated alone: every annotation
            needs one then; None for a model without masks.
    """
    for i, entry in enumerate(entries):
        mask = entry.get("segmentation")
        if not mask or not isinstance(mask, (list, dict)):
            if mask_format is None and (mask is None or mask == [] or mask == {}):
                continue
            needed = "MODEL.MASK_ON True needs polygons or run lengths for each annotation"
            raise UserError(
                f"{at}: annotations[{i}] has the segmentation {show(mask)}: {needed}; add them, or set "
                "MODEL.MASK_ON False"
                if mask_format is not None
                else f"{at}: annotations[{i}] has the segmentation {show(mask)}: expected polygons or run lengths; "
                "correct it, or remove it"
            )
        if mask_format == "polygon" and isinstance(mask, dict) and not entry.get("iscrowd"):
            raise UserError(
                f"{at}: annotations[{i}] has its segmentation in run lengths, which INPUT.MASK_FORMAT "
                "polygon cannot be trained on: set INPUT.MASK_FORMAT bitmask"
            )
        width, height = sizes[entry["image_id"]]
        try:
            if isinstance(mask, dict):
                checked_rle(mask, height, width)
            elif not (type(mask) is list and all(_is_polygon(p, width, height) for p in mask)):
                raise ValueError(
                    "its polygons are no lists of three or more points near the picture"
                )
        except ValueError as error:
            raise UserError(
                f"{at}: annotations[{i}] has a segmentation that is no mask of its picture of {width} x {height} "
                f"({error}): correct it, or remove the annotation"
            ) from error


def check_keypoints(at: str, entries: list[dict], count: int | None) -> None:
    """Keypoints are x, y and visibility of each, for Detectron2 reads them in any case.

    Raises UserError for others.

    Args:
        count: of a model with keypoints, how many an object has; None for a model without.
    """
    for i, entry in enumerate(entries):
        values = entry.get("keypoints")
        if not values and (count is None or entry.get("iscrowd")):
            continue
        fits = (
            type(values) is list
            and len(values) % 3 == 0
            and set(map(type, values)) <= {int, float}
            and all(map(math.isfinite, values))
            and set(values[2::3]) <= {0, 1, 2}
        )
        if not fits or (count is not None and len(values) != 3 * count):
            raise UserError(
                f"{at}: annotations[{i}] has the keypoints {show(values)}: expected x, y and visibility (0, 1 or 2) "
                f"of {'each keypoint' if count is None else f'{count} (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)'}; "
                "correct them, or remove the annotation"
            )


def _is_polygon(points, width: float, height: float) -> bool:
    """Detectron2 leaves out polygons with fewer points; the C code of pycocotools takes room for the length."""
    if type(points) is not list or not set(map(type, points)) <= {int, float}:
        return False
    if len(points) < 6:
        return True  # left out
    return (
        len(points) % 2 == 0
        and -width <= min(points[::2]) <= max(points[::2]) <= 2 * width
        and -height <= min(points[1::2]) <= max(points[1::2]) <= 2 * height
        and math.isfinite(math.fsum(points))  # NaN passes comparisons of others
    )


def _is_box(box) -> bool:
    return (
        type(box) is list
        and len(box) == 4
        and all(type(v) in (int, float) and abs(v) < 1e300 for v in box)
    )
