"""Masks as polygons along the edges of pixels, COCO's form of a segmentation."""

import cv2
import numpy as np


def mask_polygons(mask: np.ndarray) -> list[list[int]]:
    """Polygons that cover a mask exactly: rasterised by pycocotools they give it back.

    COCO's polygons know no holes, so a region with one is cut in two through the hole.

    Args:
        mask: (H, W) bool.

    Returns:
        One ``[x0, y0, x1, y1, ...]`` in pixels for each connected region, of at least four corners.
    """
    # On the doubled mask the pixels of a contour are 2x at a left or upper edge and 2x + 1 at a right
    # or lower one; halved and rounded up both are the coordinate of the edge itself.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    edges = [(contour[:, 0] + 1) // 2 for contour in contours]
    for points, (_, _, _, parent) in zip(edges, tree[0] if contours else (), strict=True):
        if parent >= 0:  # the edge of a hole
            left = mask.copy()
            left[:, (points[:, 0].min() + points[:, 0].max()) // 2 :] = False
            return mask_polygons(left) + mask_polygons(mask & ~left)
    corners = (points[(points != np.roll(points, 1, axis=0)).any(1)] for points in edges)
    return [points.flatten().tolist() for points in corners]
