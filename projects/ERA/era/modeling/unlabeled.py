"""Pictures without labels in a batch: told apart, given what the teacher detects to sample by, and weighted."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.structures import Instances
from torch import Tensor

UNLABELED = "unlabeled"  # of an input's dict: True where there is no ground truth


def split_by_labels(batched_inputs: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """A batch's inputs with ground truth, and those that say ``"unlabeled": True``, each in its order."""
    parts: tuple[list[dict], list[dict]] = [], []
    for item in batched_inputs:
        parts[bool(item.get(UNLABELED))].append(item)
    return parts


def pseudo_labels(detections: Instances, min_score: float) -> Instances:
    """Detections of at least ``min_score`` in the form of ground truth: ``gt_boxes`` (n, 4), pixels of the same
    image, and ``gt_classes`` (n,).

    Boxes without area are left out: Detectron2 adds ground truth to the proposals, and cannot encode them.
    """
    kept = (detections.scores >= min_score) & detections.pred_boxes.nonempty()
    found = Instances(detections.image_size)
    found.gt_boxes = detections.pred_boxes[kept]
    found.gt_classes = detections.pred_classes[kept]
    return found


def mean_over_images(
    labeled: dict[str, Tensor], unlabeled: dict[str, Tensor], counts: tuple[int, int]
) -> dict[str, Tensor]:
    """Losses of two parts of a batch as those of the batch: ``(n_l L_l + n_u L_u) / (n_l + n_u)`` where both parts
    have a loss of that name; a loss that one part alone has is that part's, with its full weight.

    Args:
        labeled, unlabeled: losses by name, ``L_l`` and ``L_u``, each a mean over its part's images.
        counts: ``n_l`` and ``n_u``, images of the parts, above 0.
    """
    n_l, n_u = counts
    both = {
        name: (n_l * loss + n_u * unlabeled[name]) / (n_l + n_u)
        for name, loss in labeled.items()
        if name in unlabeled
    }
    return {**labeled, **unlabeled, **both}
