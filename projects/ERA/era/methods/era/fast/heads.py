"""Teacher Weight Integration made cheap: the same losses and gradients as the plain reference, to rounding.

Three facts are used. The RPN's losses look at a few hundred sampled anchors an image, so its 3x3 conv is
needed at those positions alone. ROIAlign, a 1x1 conv and a fully connected layer are linear, so they can
be exchanged and multiplied out: with ``e_k = e_0 + sum_j P_j g_j`` the narrow maps ``g_j`` are pooled
instead of the wide estimates. And the student has pooled ``e_0`` already.
"""

from __future__ import annotations

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from era.losses import at_least_float32
from era.methods.era.fast.box_losses import box_losses, weighted_sum
from era.methods.era.fast.patches import gather_patches
from era.methods.era.mbrnet import FactoredEstimates
from era.methods.era.proposals import ChosenProposals, Stratum
from era.methods.era.twi import TeacherHeads
from era.modeling.detectors.rcnn import Recording


class FastTeacherHeads(TeacherHeads):
    """The teacher's heads on factored estimates; falls back to :class:`TeacherHeads` part by part.

    Args:
        rpn, roi_heads, proposals_per_image: as :class:`TeacherHeads`.
        student_pooler: the student's box pooler; its output on ``e_0`` is reused if it is equal.
        sparse_rpn: run the RPN head at the sampled positions alone.
        stacked_roi: one ROI pass for all estimates.
        fold: multiply the branches' last layers into the head's first fully connected layer where that
            is less arithmetic.

    The switches are there to measure what each is worth (``tools/benchmark.py``).
    """

    def __init__(
        self,
        rpn: RPN,
        roi_heads: StandardROIHeads,
        proposals_per_image: int = 0,
        *,
        student_pooler: ROIPooler | None = None,
        sparse_rpn: bool = True,
        stacked_roi: bool = True,
        fold: bool = True,
    ):
        super().__init__(rpn, roi_heads, proposals_per_image)
        self.sparse_rpn = sparse_rpn and knows_rpn_head(rpn)
        self.stacked_roi = stacked_roi and type(roi_heads.box_predictor) is FastRCNNOutputLayers
        self.fold = fold and ends_in_fc(roi_heads.box_head)
        self._laid_out: tuple | None = None
        self.reuses_pooling = student_pooler is not None and equal_poolers(
            student_pooler, roi_heads.box_pooler
        )

    def describe(self) -> str:
        """Which paths run, for the log."""
        rpn = "sparse" if self.sparse_rpn else "dense (reference)"
        roi = "stacked" if self.stacked_roi else "one by one (reference)"
        folded = "foldable" if self.stacked_roi and self.fold else "not folded"
        pooling = "reused" if self.stacked_roi and self.reuses_pooling else "its own"
        return f"RPN pass {rpn}; ROI pass {roi}, {folded}, e_0's pooling {pooling}"

    def rpn_loss(
        self, estimates: FactoredEstimates, weights: list[float], step: Recording
    ) -> Tensor:
        """As :meth:`TeacherHeads.rpn_loss`, of factored estimates."""
        if not self.sparse_rpn:
            return super().rpn_loss(estimates.dense().cumulative(), weights, step)
        labels = torch.stack(step.anchor_labels)
        image, anchor = (labels >= 0).nonzero(as_tuple=True)
        hidden, order, slots = self._rpn_hidden(estimates, image, anchor)
        image, anchor = image[order], anchor[order]
        target = labels[image, anchor]
        head, rows = self.rpn.rpn_head, torch.arange(len(slots), device=slots.device)
        logits = F.linear(
            hidden, head.objectness_logits.weight.flatten(1), head.objectness_logits.bias
        )
        logits = at_least_float32(logits[:, rows, slots])  # (K, P)
        deltas = F.linear(hidden, head.anchor_deltas.weight.flatten(1), head.anchor_deltas.bias)
        deltas = at_least_float32(deltas.unflatten(2, (-1, 4))[:, rows, slots])  # (K, P, 4)

        truth = target.to(logits.dtype).expand_as(logits)
        objectness = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(1)
        objects = (target == 1).nonzero(as_tuple=True)[0]
        image, anchor = image[objects], anchor[objects]
        boxes = Boxes.cat(step.anchors).tensor[anchor]
        matched = torch.stack(step.anchor_boxes)[image, anchor]
        location = box_losses(self.rpn, boxes, matched, deltas[:, objects])
        scale = self.rpn.loss_weight
        losses = (
            scale.get("loss_rpn_cls", 1.0) * objectness + scale.get("loss_rpn_loc", 1.0) * location
        )
        total = weighted_sum(losses, weights)
        return total / (step.anchors_per_image * len(step.anchor_labels))

    def _rpn_hidden(
        self, estimates: FactoredEstimates, image: Tensor, anchor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The RPN head's hidden layer for K = N + 1 estimates at P sampled anchors.

        Returns:
            hidden (K, P, C), after the ReLU; the order in which the anchors were taken (P,), by level;
            and each anchor's slot at its position (P,).
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
        counts = level_of.bincount(
            minlength=len(sizes)
        ).tolist()  # one wait for a GPU, not one a level
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
            patches = torch.cat(factors).unflatten(2, (estimates.num_branches, -1))  # (P, 9, N, h)
            patches = patches.permute(2, 0, 1, 3).flatten(2)  # (N, P, 9 * h)
            if estimates.projection is None:
                increments = F.linear(patches, kernel.flatten(1))
            else:
                own = (kernel @ estimates.projection).unflatten(3, (estimates.num_branches, -1))
                increments = torch.bmm(patches, own.permute(3, 1, 2, 4, 0).flatten(1, 3))
            hidden = torch.cat([hidden, increments]).cumsum(0)
        return torch.relu(hidden), order, torch.cat(slots)

    def roi_loss(
        self, estimates: FactoredEstimates, weights: list[float], step: Recording
    ) -> Tensor:
        """As :meth:`TeacherHeads.roi_loss`, of factored estimates."""
        if not self.stacked_roi:
            return super().roi_loss(estimates.dense().cumulative(), weights, step)
        everything, chosen = self.all(step), self.chosen(step)
        features = self._roi_features(estimates, everything, chosen, step)
        predictions = [at_least_float32(x) for x in self.roi_heads.box_predictor(features)]
        if not everything.strata:
            return sum(x.sum() * 0 for x in predictions)
        count = len(everything.rows)
        total = self._choice_loss([x[None, :count] for x in predictions], everything, weights[:1])
        if estimates.num_branches > 0:
            others = [x[count:].unflatten(0, (estimates.num_branches, -1)) for x in predictions]
            total = total + self._choice_loss(others, chosen, weights[1:])
        return total

    def _choice_loss(
        self, predictions: list[Tensor], chosen: ChosenProposals, weights: list[float]
    ) -> Tensor:
        """Of K estimates: logits (K, R, classes + 1) and deltas (K, R, 4 or 4 * classes)."""
        return sum(
            stratum.share
            * self._stratum_loss(*(x[:, stratum.indices] for x in predictions), stratum, weights)
            for stratum in chosen.strata
        )

    def _stratum_loss(
        self, logits: Tensor, deltas: Tensor, stratum: Stratum, weights: list[float]
    ) -> Tensor:
        """Detectron2's class and box loss of K estimates on the same proposals, weighted and summed.

        Args:
            logits, deltas: (K, R, classes + 1) and (K, R, 4 or 4 * classes).
            stratum: of R > 0 proposals.
        """
        predictor, proposals = self.roi_heads.box_predictor, stratum.proposals
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        matched = torch.cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        )
        if stratum.is_foreground is None:
            objects = (gt_classes < predictor.num_classes).nonzero(as_tuple=True)[0]
        else:  # known without a GPU being waited for
            objects = torch.arange(len(gt_classes) * stratum.is_foreground, device=logits.device)
        boxes, matched = boxes[objects], matched[objects]
        deltas = deltas[:, objects].unflatten(2, (-1, matched.shape[1]))  # (K, objects, K or 1, 4)
        slot = gt_classes[objects] if deltas.shape[2] > 1 else torch.zeros_like(objects)
        deltas = deltas[:, torch.arange(len(objects), device=objects.device), slot]
        if predictor.use_sigmoid_ce:
            classes = [predictor.sigmoid_cross_entropy_loss(own, gt_classes) for own in logits]
            classes = torch.stack(classes)
        else:
            labels = gt_classes.expand(len(logits), -1)
            classes = F.cross_entropy(logits.mT, labels, reduction="none").mean(1)
        location = box_losses(predictor, boxes, matched, deltas) / len(gt_classes)
        scale = predictor.loss_weight
        losses = scale.get("loss_cls", 1.0) * classes + scale.get("loss_box_reg", 1.0) * location
        return weighted_sum(losses, weights)

    def _roi_features(
        self,
        estimates: FactoredEstimates,
        everything: ChosenProposals,
        chosen: ChosenProposals,
        step: Recording,
    ) -> Tensor:
        """The box head's output, (R + N * R', D): ``e_0`` on all R proposals, then every other estimate
        on the R' chosen ones."""
        heads, levels = self.roi_heads, self.roi_heads.box_in_features
        if self.reuses_pooling:
            zeroth = estimates.adapter(step.roi_features)  # a 1x1 conv commutes with pooling
        else:
            boxes = [p.proposal_boxes for p in everything.proposals]
            zeroth = heads.box_pooler([estimates.zeroth[level] for level in levels], boxes)
        pooled = None
        if estimates.num_branches > 0:
            boxes = [p.proposal_boxes for p in chosen.proposals]
            pooled = heads.box_pooler([estimates.factors[level] for level in levels], boxes)
        if not self.fold:
            if pooled is not None:
                others = zeroth[chosen.rows] + projected(pooled, estimates).cumsum(0)
                zeroth = torch.cat([zeroth, others.flatten(0, 1)])
            return heads.box_head(zeroth)
        first, *rest = list(heads.box_head)[1:]  # after the flatten
        features = first(zeroth.flatten(1))
        if pooled is not None:
            increments = self._through_first_layer(pooled, estimates, first)
            others = features[chosen.rows] + increments.cumsum(0)
            features = torch.cat([features, others.flatten(0, 1)])
        for layer in rest:
            features = layer(features)
        return features

    def _through_first_layer(
        self, pooled: Tensor, estimates: FactoredEstimates, first: nn.Linear
    ) -> Tensor:
        """The first fully connected layer, without its bias, on every ``P_j`` of pooled maps.

        Args:
            pooled: ``g_1..g_N`` pooled, (R, N * h, S, S).
            first: maps C * S * S to D.

        Returns:
            (N, R, D). ``P_j`` is multiplied into the layer where that is less arithmetic.
        """
        count, projection = estimates.num_branches, estimates.projection
        if projection is None or not folding_pays(pooled, projection, first, count):
            return F.linear(projected(pooled, estimates).flatten(2), first.weight)
        # (N * h, C) times (C, S * S * D) gives every (h * S * S, D) without a copy
        folded = projection.T @ self._weight_by_channel(first, projection.shape[0])
        maps = pooled.unflatten(1, (count, -1)).flatten(2).transpose(0, 1)  # (N, R, h * S * S)
        return torch.bmm(maps, folded.view(count, maps.shape[2], first.out_features))

    def _weight_by_channel(self, first: nn.Linear, channels: int) -> Tensor:
        """The frozen weight (D, C * S * S) laid out as (C, S * S * D), made once."""
        weight = first.weight
        key = (weight.device, weight.dtype, weight._version)
        if self._laid_out is None or self._laid_out[0] != key:
            by_channel = weight.detach().unflatten(1, (channels, -1)).permute(1, 2, 0)
            self._laid_out = (key, by_channel.flatten(1).contiguous())
        return self._laid_out[1]


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


def ends_in_fc(box_head: nn.Module) -> bool:
    """Whether a box head is fully connected layers alone, the first right after the pooling."""
    return (
        type(box_head) is FastRCNNConvFCHead
        and len(box_head) > 1
        and isinstance(box_head[0], nn.Flatten)
        and isinstance(box_head[1], nn.Linear)
    )


def equal_poolers(own: ROIPooler, other: ROIPooler) -> bool:
    """Whether two poolers give equal output on equal maps."""
    same = ("output_size", "min_level", "max_level", "canonical_level", "canonical_box_size")
    if type(own) is not type(other) or any(getattr(own, k) != getattr(other, k) for k in same):
        return False
    return [repr(p) for p in own.level_poolers] == [repr(p) for p in other.level_poolers]


def projected(pooled: Tensor, estimates: FactoredEstimates) -> Tensor:
    """``d_1..d_N`` pooled, (N, R, C, S, S), from ``g_1..g_N`` pooled, (R, N * h, S, S)."""
    count, projection = estimates.num_branches, estimates.projection
    if projection is not None:
        kernels = torch.cat(projection.chunk(count, dim=1))[:, :, None, None]  # (N * C, h, 1, 1)
        pooled = F.conv2d(pooled, kernels, groups=count)
    return pooled.unflatten(1, (count, -1)).transpose(0, 1)


def folding_pays(pooled: Tensor, projection: Tensor, first: nn.Linear, count: int) -> bool:
    """Whether multiplying ``P_j`` into the layer is less arithmetic, forward and backward together.

    Folded: the product and its gradient cost 2 C h D a bin, the pass over R rows 3 R h D. Otherwise:
    2 R C D for the layer (it is frozen) and about 4 R C h for the projection.
    """
    rows, narrow = pooled.shape[0], pooled.shape[1] // count
    wide, out = projection.shape[0], first.out_features
    return narrow * out * (2 * wide + 3 * rows) < rows * wide * (2 * out + 4 * narrow)
