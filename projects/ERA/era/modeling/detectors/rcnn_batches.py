"""Inference of Faster, Mask and Cascade R-CNN over a batch in one piece, see :mod:`~era.modeling.detectors.batches`."""

from __future__ import annotations

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor

from era.errors import UserError
from era.modeling.detectors.batches import (
    LOWEST,
    BatchDetections,
    Batches,
    choose,
    clip,
    decode,
    pool,
    rois_of,
    smaller,
    suppress,
    take,
)


class RCNNBatches(Batches):
    """``find_top_rpn_proposals`` and ``fast_rcnn_inference`` of Detectron2, with the pictures as an axis."""

    def check_batches(self) -> None:
        """An RPN and plain ROI heads with ROIAlign; masks of a head with layers that end in classes."""
        heads = self.model.roi_heads
        masks = heads.mask_on and not (
            isinstance(heads.mask_head, BaseMaskRCNNHead)
            and isinstance(heads.mask_pooler, ROIPooler)
        )
        if not self.has_plain_heads() or masks:
            found = f"a {type(heads.mask_head).__name__}" if masks else self._describe_heads()
            raise UserError(
                f"the student has {found}, and a graph over batches is for an RPN with StandardROIHeads or CascadeROIHeads and "
                "Mask R-CNN's own mask head: export it for one picture a call (without --batch and --shape)."
            )

    def detect_batch(
        self, features: dict[str, Tensor], sizes: Tensor, *, fixed: bool
    ) -> BatchDetections:
        """Proposals, then the box heads one after the other on all of them."""
        heads = self.model.roi_heads
        maps = [features[level] for level in heads.box_in_features]
        proposals, is_proposal, is_settled = self._batch_proposals(features, sizes, fixed=fixed)
        shape = (proposals.shape[0], proposals.shape[1], -1)
        boxes, by_stage = proposals, []
        for head, predictor in self.box_stages:
            if by_stage:
                proposals = clip(boxes, sizes)
            logits, deltas = predictor(
                head(pool(heads.box_pooler, maps, rois_of(proposals), fixed=fixed))
            )
            boxes = predictor.box2box_transform.apply_deltas(deltas, proposals.reshape(-1, 4))
            boxes = boxes.reshape(shape)  # (N, P, 4) or (N, P, 4K)
            scores = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(-1)
            by_stage.append(scores.reshape(shape))
        scores = sum(by_stage) * (1.0 / len(by_stage))
        is_proposal = is_proposal & boxes.isfinite().all(2) & scores.isfinite().all(2)
        count = self.num_classes
        scores = torch.where(is_proposal[:, :, None], scores[:, :, :-1], LOWEST).flatten(1)
        of_class = boxes.shape[2] != 4  # else one box for all classes
        boxes = clip(boxes.reshape(shape[0], -1, 4), sizes)

        def proposal_at(rows: Tensor) -> Tensor:
            return torch.div(rows, count, rounding_mode="trunc")

        found = choose(
            scores,
            lambda rows: take(boxes, rows if of_class else proposal_at(rows)),
            lambda rows: rows - proposal_at(rows) * count,
            num_classes=count,
            fixed=fixed,
            **self.thresholds,
        )
        found.complete = found.complete & is_settled
        return found

    def _batch_proposals(
        self, features: dict[str, Tensor], sizes: Tensor, *, fixed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, P, 4) by falling objectness, (N, P) bool which of them are proposals, (N,) bool whether NMS has ended."""
        rpn = self.model.proposal_generator
        anchors = rpn.anchor_generator([features[level] for level in rpn.in_features])
        by_level, deltas = self.predict_anchors(features)
        is_settled = torch.ones_like(sizes[:, 0], dtype=torch.bool)
        scores, boxes = [], []
        for logits, by_anchor, own_anchors in zip(by_level, deltas, anchors, strict=True):
            most = smaller(logits.shape[1], rpn.pre_nms_topk[False], fixed=fixed)
            own, order = logits.topk(most, dim=1)
            at = decode(rpn.box2box_transform, take(by_anchor, order), own_anchors.tensor, order)
            is_finite = at.isfinite().all(2) & own.isfinite()
            at = clip(at, sizes)
            is_box = (at[..., 2:] - at[..., :2] > rpn.min_box_size).all(2) & is_finite
            own = torch.where(is_box, own, LOWEST)
            at = torch.where(is_box[:, :, None], at, 0.0)
            kept, ended = suppress(at, own, rpn.nms_thresh, fixed=fixed)
            is_settled = is_settled & ended
            scores.append(torch.where(kept, own, LOWEST))
            boxes.append(at)
        scores, boxes = torch.cat(scores, 1), torch.cat(boxes, 1)
        most = smaller(scores.shape[1], rpn.post_nms_topk[False], fixed=fixed)
        scores, order = scores.topk(most, dim=1)
        return take(boxes, order), scores > LOWEST, is_settled

    def masks_at(
        self, features: dict[str, Tensor], rois: Tensor, classes: Tensor, *, fixed: bool
    ) -> Tensor:
        """The mask head's layers on the boxes, at each one's class."""
        heads = self.model.roi_heads
        maps = [features[level] for level in heads.mask_in_features]
        logits = heads.mask_head.layers(pool(heads.mask_pooler, maps, rois, fixed=fixed))
        if logits.shape[1] == 1:  # one mask for all classes
            return logits[:, 0].sigmoid()
        return logits[torch.arange(rois.shape[0], device=rois.device), classes].sigmoid()
