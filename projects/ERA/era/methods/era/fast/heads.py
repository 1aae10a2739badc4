"""Teacher Weight Integration of R-CNN heads made cheap: the numbers of :mod:`era.methods.era.twi`, to rounding.

Three facts are used. The RPN's losses look at a few hundred sampled anchors an image, so its 3x3 conv is
needed at those positions alone. ROIAlign and a 1x1 conv are linear and commute: with
``e_i = e_0 + sum_{j<=i} P_j g_j`` the narrow maps ``g_j`` are pooled in the place of the wide estimates. And
the student has pooled ``e_0`` already.
"""

from __future__ import annotations

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from era.losses import at_least_float32
from era.methods.era.fast.factored import FactoredEstimates
from era.methods.era.fast.levers import ALL_ON, Levers
from era.methods.era.fast.patches import gather_patches
from era.modeling.detectors.box_losses import box_losses
from era.modeling.detectors.proposals import ProposalSample, Stratum
from era.modeling.detectors.rcnn import RCNN
from era.modeling.detectors.rcnn_losses import RCNNRecording, boxes_and_truth, deltas_of_class


class FastHeads:
    """The teacher's heads on factored estimates, as far as their parts are known.

    Args:
        judge: the teacher.
        student: whose box pooler's output on ``e_0`` is used again if the teacher's gives the same.
        samples_per_image: as in :func:`era.methods.era.twi.twi_loss`.
        levers: what is switched on.
    """

    def __init__(
        self,
        judge: RCNN,
        student: RCNN,
        samples_per_image: int,
        levers: Levers = ALL_ON,
    ):
        self.judge = judge
        self.rpn = judge.model.proposal_generator
        self.roi_heads = judge.model.roi_heads
        self.samples_per_image = samples_per_image
        self.sparse_rpn = levers.sparse_rpn and knows_rpn_head(self.rpn)
        self.stacked_roi = (
            levers.stacked_roi and type(self.roi_heads.box_predictor) is FastRCNNOutputLayers
        )
        self.reuses_pooling = levers.reuse_pooling and equal_poolers(
            student.model.roi_heads.box_pooler, self.roi_heads.box_pooler
        )

    def describe(self) -> str:
        """Which paths run, for the log."""
        rpn = "sparse" if self.sparse_rpn else "dense (as defined)"
        roi = "stacked" if self.stacked_roi else "one by one (as defined)"
        pooling = "reused" if self.stacked_roi and self.reuses_pooling else "its own"
        return f"RPN pass {rpn}; ROI pass {roi}, e_0's pooling {pooling}"

    def knows(self, part: str) -> bool:
        """Whether this part of the heads has a fast path; the definition serves for the others."""
        return {"rpn": self.sparse_rpn, "roi": self.stacked_roi}[part]

    def loss(
        self,
        part: str,
        estimates: FactoredEstimates,
        weights: list[float],
        recording: RCNNRecording,
    ) -> Tensor:
        """As :func:`era.methods.era.twi.twi_loss`, of factored estimates and a part that it knows."""
        by_part = {"rpn": self._rpn_loss, "roi": self._roi_loss}
        return by_part[part](estimates, weights, recording)

    # ---- RPN: N + 1 estimates at A sampled anchors -------------------------------------------------

    def _rpn_loss(
        self, estimates: FactoredEstimates, weights: list[float], recording: RCNNRecording
    ) -> Tensor:
        labels = torch.stack(recording.anchor_labels)
        image, anchor = (labels >= 0).nonzero(as_tuple=True)
        hidden, order, slots = self._rpn_hidden(estimates, image, anchor)
        image, anchor = image[order], anchor[order]
        target = labels[image, anchor]
        head, rows = self.rpn.rpn_head, torch.arange(len(slots), device=slots.device)
        logits = F.linear(
            hidden, head.objectness_logits.weight.flatten(1), head.objectness_logits.bias
        )
        logits = at_least_float32(logits[:, rows, slots])  # (N + 1, A)
        deltas = F.linear(hidden, head.anchor_deltas.weight.flatten(1), head.anchor_deltas.bias)
        deltas = at_least_float32(deltas.unflatten(2, (-1, 4))[:, rows, slots])  # (N + 1, A, 4)

        truth = target.to(logits.dtype).expand_as(logits)
        objectness = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(1)
        objects = (target == 1).nonzero(as_tuple=True)[0]
        image, anchor = image[objects], anchor[objects]
        boxes = Boxes.cat(recording.anchors).tensor[anchor]
        matched = torch.stack(recording.anchor_boxes)[image, anchor]
        location = box_losses(self.rpn, boxes, matched, deltas[:, objects]).sum(1)
        scale = self.rpn.loss_weight
        losses = (
            scale.get("loss_rpn_cls", 1.0) * objectness + scale.get("loss_rpn_loc", 1.0) * location
        )
        total = weighted_sum(losses, weights)
        return total / (recording.anchors_per_image * len(recording.anchor_labels))

    def _rpn_hidden(
        self, estimates: FactoredEstimates, image: Tensor, anchor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The RPN head's hidden layer of every estimate at A sampled anchors.

        Returns:
            hidden (N + 1, A, C), after the ReLU; the order in which the anchors were taken (A,), by level;
            and each anchor's slot at its position (A,).
        """
        conv = self.rpn.rpn_head.conv
        per_position = self.rpn.rpn_head.objectness_logits.out_channels
        sizes = [estimates.zeroth[level].shape[-2:] for level in self.rpn.in_features]
        starts, end = [], 0
        for height, width in sizes:
            starts.append(end)
            end += height * width * per_position
        bounds = torch.tensor(starts[1:], device=anchor.device)
        level_of = torch.bucketize(anchor, bounds, right=True)
        order = level_of.argsort(stable=True)
        # one wait for a GPU, not one a level
        counts = level_of.bincount(minlength=len(sizes)).tolist()
        zeroth, factors, slots = [], [], []
        for level, (_, width), start, own in zip(
            self.rpn.in_features, sizes, starts, order.split(counts), strict=True
        ):
            position = (anchor[own] - start) // per_position
            where = image[own], position // width, position % width
            zeroth.append(gather_patches(estimates.zeroth[level], *where))
            if estimates.num_branches > 0:
                factors.append(gather_patches(estimates.factors[level], *where))
            slots.append((anchor[own] - start) % per_position)
        kernel = conv.weight.permute(0, 2, 3, 1)  # (out, 3, 3, in)
        hidden = F.linear(torch.cat(zeroth).flatten(1), kernel.flatten(1), conv.bias)[None]
        if estimates.num_branches > 0:
            patches = torch.cat(factors).unflatten(2, (estimates.num_branches, -1))  # (A, 9, N, h)
            patches = patches.permute(2, 0, 1, 3).flatten(2)  # (N, A, 9 * h)
            if estimates.projection is None:
                increments = F.linear(patches, kernel.flatten(1))
            else:
                own = (kernel @ estimates.projection).unflatten(3, (estimates.num_branches, -1))
                increments = torch.bmm(patches, own.permute(3, 1, 2, 4, 0).flatten(1, 3))
            hidden = torch.cat([hidden, increments]).cumsum(0)
        return torch.relu(hidden), order, torch.cat(slots)

    # ---- ROI heads: e_0 on all R proposals, e_1..e_N on a sample of them -----------------------------

    def _roi_loss(
        self, estimates: FactoredEstimates, weights: list[float], recording: RCNNRecording
    ) -> Tensor:
        of_zeroth, of_others = recording.sample(0), recording.sample(self.samples_per_image)
        pooled = self._pooled(estimates, of_zeroth, of_others, recording)
        features = self.roi_heads.box_head(pooled)
        predictions = [at_least_float32(x) for x in self.roi_heads.box_predictor(features)]
        if not of_zeroth.strata:  # no proposal at all
            return sum(x.sum() * 0 for x in predictions)
        count = len(of_zeroth.rows)
        total = self._sample_loss([x[None, :count] for x in predictions], of_zeroth, weights[:1])
        if estimates.num_branches > 0:
            others = [x[count:].unflatten(0, (estimates.num_branches, -1)) for x in predictions]
            total = total + self._sample_loss(others, of_others, weights[1:])
        return total

    def _pooled(
        self,
        estimates: FactoredEstimates,
        of_zeroth: ProposalSample,
        of_others: ProposalSample,
        recording: RCNNRecording,
    ) -> Tensor:
        """Pooled maps, (R + N * R', C_T, S, S): ``e_0`` on all R proposals, then every other estimate on the
        R' of the sample."""
        heads, levels = self.roi_heads, self.roi_heads.box_in_features
        if self.reuses_pooling:
            zeroth = estimates.adapter(recording.roi_features)  # a 1x1 conv commutes with pooling
        else:
            boxes = [p.proposal_boxes for p in of_zeroth.proposals]
            zeroth = heads.box_pooler([estimates.zeroth[level] for level in levels], boxes)
        if estimates.num_branches == 0:
            return zeroth
        boxes = [p.proposal_boxes for p in of_others.proposals]
        narrow = heads.box_pooler([estimates.factors[level] for level in levels], boxes)
        others = zeroth[of_others.rows] + projected(narrow, estimates).cumsum(0)
        return torch.cat([zeroth, others.flatten(0, 1)])

    def _sample_loss(
        self, predictions: list[Tensor], sample: ProposalSample, weights: list[float]
    ) -> Tensor:
        """Of E estimates: logits (E, R, K + 1) and deltas (E, R, 4 or 4K), K classes."""
        return sum(
            stratum.share
            * self._stratum_loss(*(x[:, stratum.indices] for x in predictions), stratum, weights)
            for stratum in sample.strata
        )

    def _stratum_loss(
        self, logits: Tensor, deltas: Tensor, stratum: Stratum, weights: list[float]
    ) -> Tensor:
        """Detectron2's class and box loss of E estimates on the same proposals, weighted and summed.

        Args:
            logits, deltas: (E, R, K + 1) and (E, R, 4 or 4K).
            stratum: of R > 0 proposals.
        """
        predictor = self.roi_heads.box_predictor
        gt_classes = torch.cat([p.gt_classes for p in stratum.proposals])
        boxes, matched = boxes_and_truth(stratum.proposals)
        if stratum.is_foreground is None:
            objects = (gt_classes < predictor.num_classes).nonzero(as_tuple=True)[0]
        else:  # known without a GPU being waited for
            objects = torch.arange(len(gt_classes) * stratum.is_foreground, device=logits.device)
        boxes, matched = boxes[objects], matched[objects]
        deltas = deltas_of_class(deltas[:, objects], gt_classes[objects], matched.shape[1])
        if predictor.use_sigmoid_ce:
            classes = [predictor.sigmoid_cross_entropy_loss(own, gt_classes) for own in logits]
            classes = torch.stack(classes)
        else:
            labels = gt_classes.expand(len(logits), -1)
            classes = F.cross_entropy(logits.mT, labels, reduction="none").mean(1)
        location = box_losses(predictor, boxes, matched, deltas).sum(1) / len(gt_classes)
        scale = predictor.loss_weight
        losses = scale.get("loss_cls", 1.0) * classes + scale.get("loss_box_reg", 1.0) * location
        return weighted_sum(losses, weights)


def knows_rpn_head(rpn: RPN) -> bool:
    """Whether the sparse pass can stand for the RPN's head: one 3x3 conv, ReLU, two 1x1 convs."""
    head = rpn.rpn_head
    conv = getattr(head, "conv", None)
    return (
        type(head) is StandardRPNHead
        and isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and getattr(conv, "norm", None) is None
        and isinstance(getattr(conv, "activation", None), nn.ReLU)
    )


def equal_poolers(own: ROIPooler, other: ROIPooler) -> bool:
    """Whether two poolers give equal output on equal maps."""
    same = ("output_size", "min_level", "max_level", "canonical_level", "canonical_box_size")
    if type(own) is not type(other) or any(getattr(own, k) != getattr(other, k) for k in same):
        return False
    return [repr(p) for p in own.level_poolers] == [repr(p) for p in other.level_poolers]


def projected(pooled: Tensor, estimates: FactoredEstimates) -> Tensor:
    """``d_1..d_N`` pooled, (N, R, C_T, S, S), from ``g_1..g_N`` pooled, (R, N * h, S, S)."""
    count, projection = estimates.num_branches, estimates.projection
    if projection is not None:
        kernels = torch.cat(projection.chunk(count, dim=1))[:, :, None, None]  # (N * C_T, h, 1, 1)
        pooled = F.conv2d(pooled, kernels, groups=count)
    return pooled.unflatten(1, (count, -1)).transpose(0, 1)


def weighted_sum(losses: Tensor, weights: list[float]) -> Tensor:
    """One loss an estimate, (N + 1,), times its weight, summed."""
    return sum(weight * loss for weight, loss in zip(weights, losses.unbind(), strict=True))
