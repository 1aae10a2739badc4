"""Detections of a batch of pictures in one piece, for graphs in which the number of pictures is an axis.

Detectron2's inference goes through a batch picture by picture, and a trace of that holds as many copies as its example had
pictures. Here every step is one operation over all pictures: what is no candidate is marked instead of removed, and a top-k
runs along the second axis. The same candidates are chosen by the same rules.

There are two forms. The loose one keeps whatever passes the threshold and suppresses by the runtime's own NMS. In the fixed
one no shape depends on the data, as TensorRT likes it: candidates are cut at :data:`CANDIDATES`, and NMS is :data:`ROUNDS`
products with a matrix of overlaps. Each picture's ``complete`` says whether neither of the two changed anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torchvision
from detectron2.layers import nonzero_tuple
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor
from torch.nn import functional as F

from era.errors import UserError

# Of the fixed form: candidates of a picture that NMS sees (TensorRT's top-k takes 3,840 at most), and its rounds. A round
# settles one more link of a chain of boxes that suppress one another; 10 were the most that were met (docs/deployment.md).
CANDIDATES = 2000
ROUNDS = 20
LOWEST = torch.finfo(torch.float32).min  # the score of what is no candidate


@dataclass
class BatchDetections:
    """What was found in N pictures, at most D in each, by falling score.

    Attributes:
        boxes: (N, D, 4) x0, y0, x1, y1 in pixels of the batch.
        scores: (N, D).
        classes: (N, D) long.
        is_found: (N, D) bool; the other rows are no detections.
        complete: (N,) bool: these are all that the detector's rules give.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    is_found: Tensor
    complete: Tensor


class Batches:
    """The part of the contract of graphs over batches; by default a family has none."""

    def check_batches(self) -> None:
        """Its inference can be written over a batch.

        Raises:
            UserError: it cannot; one sentence.
        """
        raise UserError(
            f"a {type(self).__name__} has no form for batches: export it for one picture a call (without --batch and --shape)."
        )

    def detect_batch(
        self, features: dict[str, Tensor], sizes: Tensor, *, fixed: bool
    ) -> BatchDetections:
        """What the heads of an eval-mode model detect on its own feature maps, as :meth:`Detector.detect_on` does.

        Args:
            features: level name to (N, C, H, W), all levels of the backbone.
            sizes: (N, 2) float32, height and width of each picture within the batch, pixels.
            fixed: whether no shape may depend on the data.
        """
        raise NotImplementedError(type(self).__name__)

    def masks_at(
        self, features: dict[str, Tensor], rois: Tensor, classes: Tensor, *, fixed: bool
    ) -> Tensor:
        """Probabilities (R, M, M) on M x M cells of each box, of a detector that predicts masks.

        Args:
            rois: (R, 5), index of the picture and box in pixels of the batch.
            classes: (R,) long.
        """
        raise NotImplementedError(type(self).__name__)


def smaller(size: int | Tensor, most: int, *, fixed: bool) -> int | Tensor:
    """The smaller of a size and a number; sizes are tensors while a graph with axes of any length is traced."""
    if isinstance(size, Tensor) and not fixed:
        return torch.clamp(size, max=most)
    return min(int(size), most)


def take(values: Tensor, order: Tensor) -> Tensor:
    """Rows of each picture: values (N, M) or (N, M, c) at order (N, k)."""
    if values.dim() == 3:
        order = order[:, :, None].expand(-1, -1, values.shape[2])
    return values.gather(1, order)


def decode(coder: object, deltas: Tensor, anchors: Tensor, order: Tensor) -> Tensor:
    """Boxes (N, k, 4) of deltas (N, k, 4), which belong to the anchors (A, 4) of rows ``order`` (N, k)."""
    boxes = coder.apply_deltas(deltas.reshape(-1, 4), anchors[order.flatten()])
    return boxes.reshape(deltas.shape)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (N, M, 4) cut to the pictures' sizes (N, 2), height and width."""
    height, width = sizes[:, None, 0], sizes[:, None, 1]
    return torch.minimum(
        boxes.clamp(min=0), torch.stack([width, height, width, height], 2).to(boxes)
    )


def suppress(
    boxes: Tensor,
    scores: Tensor,
    threshold: float,
    *,
    fixed: bool,
    classes: Tensor | None = None,
    num_classes: int = 1,
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression within each picture, and within each class if there are any.

    Args:
        boxes: (N, M, 4), by falling score.
        scores: (N, M); :data:`LOWEST` = no candidate.
        threshold: IoU above which the lower of two is dropped.
        classes: (N, M) long.

    Returns:
        (N, M) bool, which are kept; (N,) bool, whether that is the end of it.
    """
    if fixed:
        return _suppress_by_rounds(boxes, scores, threshold, classes)
    by_class = scores[:, None]
    if classes is not None:
        labels = torch.arange(num_classes, device=classes.device)[None, :, None]
        by_class = torch.where(classes[:, None] == labels, by_class, LOWEST)
    picked = _SelectedBoxes.apply(boxes, by_class, threshold)
    rows = picked[:, 0] * scores.shape[1] + picked[:, 2]
    ones = torch.ones_like(rows, dtype=scores.dtype)
    kept = torch.zeros_like(scores).flatten().scatter(0, rows, ones).reshape(scores.shape)
    return kept > 0, torch.ones_like(scores[:, 0], dtype=torch.bool)


class _SelectedBoxes(torch.autograd.Function):
    """ONNX's NonMaxSuppression, which takes batches and classes: (S, 3) of picture, class and box."""

    @staticmethod
    def forward(ctx, boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        picked = []
        for picture, by_class in enumerate(scores):
            for label, own in enumerate(by_class):
                candidates = nonzero_tuple(own > LOWEST)[0]
                found = torchvision.ops.nms(boxes[picture][candidates], own[candidates], threshold)
                place = torch.tensor([picture, label]).expand(len(found), 2)
                picked.append(torch.cat([place, candidates[found][:, None]], 1))
        return torch.cat(picked)

    @staticmethod
    def symbolic(graph, boxes, scores, threshold: float):
        def constant(value, dtype):
            return graph.op("Constant", value_t=torch.tensor([value], dtype=dtype))

        most = constant(torch.iinfo(torch.int64).max, torch.int64)
        limits = (constant(threshold, torch.float32), constant(LOWEST, torch.float32))
        return graph.op("NonMaxSuppression", boxes, scores, most, *limits)


def _suppress_by_rounds(
    boxes: Tensor, scores: Tensor, threshold: float, classes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A box is kept where no kept box before it overlaps it: asked of all boxes at once, from "all are kept" on, until
    nothing changes. What does not change any more is the greedy choice, by induction over the ranks."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    sides = (high - low).clamp(min=0)
    inter = sides[..., 0] * sides[..., 1]
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    overlaps = inter / (areas[:, :, None] + areas[:, None] - inter) > threshold
    if classes is not None:
        overlaps = overlaps & (classes[:, :, None] == classes[:, None])
    count = int(boxes.shape[1])
    stops = overlaps.to(boxes) * torch.ones(count, count, device=boxes.device).triu(1)
    candidates = (scores > LOWEST).to(boxes)[:, None]
    before = kept = candidates
    for _ in range(ROUNDS):
        before, kept = kept, candidates * F.relu(1 - kept @ stops)
    return kept[:, 0] > 0.5, (before - kept).abs().sum((1, 2)) == 0


def choose(
    scores: Tensor,
    boxes_at: Callable[[Tensor], Tensor],
    classes_at: Callable[[Tensor], Tensor],
    *,
    num_classes: int,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    fixed: bool,
) -> BatchDetections:
    """Detections out of all candidates of each picture: threshold, NMS by class, the best.

    Args:
        scores: (N, M); :data:`LOWEST` = no candidate.
        boxes_at, classes_at: from rows (N, k) to boxes (N, k, 4) and classes (N, k) there.
        max_detections: of a picture; below 0 = all.
    """
    passing = (scores > score_threshold).sum(1)
    limit = (
        smaller(scores.shape[1], CANDIDATES, fixed=True) if fixed else passing.max().clamp(min=1)
    )
    scores, order = scores.topk(limit, dim=1)
    scores = torch.where(scores > score_threshold, scores, LOWEST)
    boxes, classes = boxes_at(order), classes_at(order)
    kept, is_settled = suppress(
        boxes, scores, nms_threshold, fixed=fixed, classes=classes, num_classes=num_classes
    )
    most = limit if max_detections < 0 else smaller(limit, max_detections, fixed=fixed)
    scores, order = torch.where(kept, scores, LOWEST).topk(most, dim=1)
    is_found = scores > LOWEST
    complete = is_settled
    if fixed and max_detections < 0:
        complete = complete & (passing <= limit)
    elif fixed:  # the best are there also where candidates behind them were cut
        complete = complete & ((passing <= limit) | (is_found.sum(1) >= max_detections))
    scores = torch.where(is_found, scores, 0.0)
    return BatchDetections(take(boxes, order), scores, take(classes, order), is_found, complete)


def rois_of(boxes: Tensor) -> Tensor:
    """Boxes (N, P, 4) as (N * P, 5), with the index of the picture before each."""
    pictures = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    pictures = torch.zeros_like(boxes[:, :, :1]) + pictures[:, None, None]
    return torch.cat([pictures, boxes], 2).reshape(-1, 5)


def pool(pooler: ROIPooler, maps: Sequence[Tensor], rois: Tensor, *, fixed: bool) -> Tensor:
    """What an FPN's pooler makes of boxes, (R, C, S, S), each on the level of its size.

    Args:
        rois: (R, 5), index of the picture and box in pixels of the batch.
        fixed: pool every box on every level and choose then; off its level a box has no size, which costs nothing where
            the number of samples follows the size (``POOLER_SAMPLING_RATIO`` 0).
    """
    poolers = list(pooler.level_poolers)
    if len(poolers) == 1:
        return poolers[0](maps[0], rois)
    levels = assign_boxes_to_levels(
        [Boxes(rois[:, 1:])],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
    if fixed:
        nowhere = rois * torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], device=rois.device)
        pooled = None
        for level, (own, feature_map) in enumerate(zip(poolers, maps, strict=True)):
            is_here = (levels == level)[:, None]
            found = own(feature_map, torch.where(is_here, rois, nowhere))
            pooled = (
                found if pooled is None else torch.where(is_here[:, :, None, None], found, pooled)
            )
        return pooled
    pooled = rois.new_zeros((rois.shape[0], maps[0].shape[1], *pooler.output_size))
    for level, (own, feature_map) in enumerate(zip(poolers, maps, strict=True)):
        here = nonzero_tuple(levels == level)[0]
        pooled = pooled.index_put((here,), own(feature_map, rois[here]))
    return pooled
