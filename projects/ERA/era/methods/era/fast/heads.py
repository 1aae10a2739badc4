"""Teacher Weight Integration of R-CNN heads made cheap: the numbers of :mod:`era.methods.era.twi`, to rounding.

Three facts are used. The RPN's losses look at a few hundred sampled anchors an image, so its 3x3 conv is
needed at those positions alone. ROIAlign and a 1x1 conv are linear and commute: with
``e_i = e_0 + sum_{j<=i} P_j g_j`` the narrow maps ``g_j`` are pooled in the place of the wide estimates. And
the student has pooled ``e_0`` already.
"""

from __future__ import annotations

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from era.losses import at_least_float32
from era.methods.era.fast.factored import FactoredEstimates
from era.methods.era.fast.levers import ALL_ON, Levers
from era.methods.era.fast.rpn import (
    hard_losses,
    knows_rpn_head,
    predict_sampled,
    sampled_anchors,
    soft_losses,
)
from era.methods.era.twi import NO_SOFT_JUDGES, SoftJudges
from era.modeling.detectors.box_losses import box_losses
from era.modeling.detectors.proposals import ProposalSample, Stratum
from era.modeling.detectors.rcnn import RCNN
from era.modeling.detectors.rcnn_losses import RCNNRecording, boxes_and_truth, deltas_of_class
from era.modeling.detectors.rcnn_soft import StageTargets, soft_proposal_losses
from era.modeling.detectors.recording import SAMPLED_POSITIONS, Predictions


class FastHeads:
    """The teacher's heads on factored estimates, as far as their parts are known.

    Of a cascade of box heads only the soft judgements are known: the boxes of its later stages are then one set for all
    estimates, while against the ground truth each estimate makes its own.

    Args:
        judge: the teacher.
        student: whose box pooler's output on ``e_0`` is used again if the teacher's gives the same.
        samples_per_image: as in :func:`era.methods.era.twi.twi_loss`.
        levers: what is switched on.
        soft: how the heads judge softly.
    """

    def __init__(
        self,
        judge: RCNN,
        student: RCNN,
        samples_per_image: int,
        levers: Levers = ALL_ON,
        soft: SoftJudges = NO_SOFT_JUDGES,
    ):
        self.judge = judge
        self.rpn = judge.model.proposal_generator
        self.roi_heads = judge.model.roi_heads
        self.box_stages = judge.box_stages
        self.samples_per_image = samples_per_image
        self.soft = soft
        self.sparse_rpn = levers.sparse_rpn and knows_rpn_head(self.rpn)
        self.stacked_roi = levers.stacked_roi and all(
            type(stage.predictor) is FastRCNNOutputLayers for stage in self.box_stages
        )
        self.reuses_pooling = levers.reuse_pooling and equal_poolers(
            student.model.roi_heads.box_pooler, self.roi_heads.box_pooler
        )

    def describe(self) -> str:
        """Which paths run, for the log."""
        rpn = "sparse" if self.sparse_rpn else "dense (as defined)"
        roi = "stacked" if self.stacked_roi else "one by one (as defined)"
        pooling = "reused" if self.stacked_roi and self.reuses_pooling else "its own"
        soft = ""
        if "rpn" in self.soft.parts and not self.knows_soft("rpn"):
            soft = "; soft RPN pass dense (as defined)"
        if self.stacked_roi and not self.knows("roi"):
            roi = f"stacked by stage ({len(self.box_stages)}), against the ground truth one by one (as defined)"
        return f"RPN pass {rpn}; ROI pass {roi}, e_0's pooling {pooling}{soft}"

    def knows(self, part: str) -> bool:
        """Whether this part of the heads has a fast path; the definition serves for the others."""
        one_stage = len(self.box_stages) == 1
        return {"rpn": self.sparse_rpn, "roi": self.stacked_roi and one_stage}[part]

    def knows_soft(self, part: str) -> bool:
        """Whether this part has a fast path for soft judgements: dense heads at sampled positions alone."""
        known = {"rpn": self.sparse_rpn, "roi": self.stacked_roi}
        return known[part] and (part != "rpn" or self.soft.positions == SAMPLED_POSITIONS)

    def losses(
        self,
        part: str,
        estimates: FactoredEstimates,
        weights: list[float],
        recording: RCNNRecording,
        *,
        hard: bool = True,
        target: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """As :func:`era.methods.era.twi.twi_loss` under ``twi`` and :func:`era.methods.era.twi.soft_twi_loss` under
        ``soft``, of factored estimates and a part that it knows, from the same predictions.

        Args:
            hard: whether the ground truth is asked.
            target: ``F_T``, level name to (B, C_T, H, W), for soft judgements; None for none.
        """
        by_part = {"rpn": self._rpn_losses, "roi": self._roi_losses}
        return by_part[part](estimates, weights, recording, hard, target)

    # ---- RPN: N + 1 estimates at A sampled anchors -------------------------------------------------

    def _rpn_losses(
        self,
        estimates: FactoredEstimates,
        weights: list[float],
        recording: RCNNRecording,
        hard: bool,
        target: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        anchors = sampled_anchors(self.rpn, estimates.zeroth, recording.anchor_labels)
        predictions = predict_sampled(self.rpn, estimates, anchors)
        found = {}
        if hard:
            losses = hard_losses(self.rpn, *predictions, anchors, recording)
            normaliser = recording.anchors_per_image * len(recording.anchor_labels)
            found["twi"] = weighted_sum(losses, weights) / normaliser
        if target is not None:
            losses = soft_losses(self.rpn, *predictions, anchors, target)
            found["soft"] = weighted_sum(losses, weights)
        return found

    # ---- ROI heads: e_0 on all R proposals, e_1..e_N on a sample of them -----------------------------

    def _roi_losses(
        self,
        estimates: FactoredEstimates,
        weights: list[float],
        recording: RCNNRecording,
        hard: bool,
        target: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        if target is None:
            stages = [StageTargets(recording.proposals, None)]
        else:
            expected = self.judge.soft_targets("roi", target, recording)
            stages = self.judge.soft_stages(expected, recording)
        found = dict.fromkeys(
            (n for n, on in (("twi", hard), ("soft", target is not None)) if on), 0.0
        )
        for stage, (proposals, expected) in enumerate(stages):
            predictor = self.box_stages[stage].predictor
            pooled = self._pooled(estimates, proposals, recording)
            predictions = predictor(self.box_stages[stage].head(pooled))
            predictions = [at_least_float32(x) for x in predictions]
            groups = self._groups(predictions, weights, estimates.num_branches, recording)
            if not groups:  # no proposal at all
                nothing = sum(x.sum() * 0 for x in predictions)
                found = {name: loss + nothing for name, loss in found.items()}
                continue
            if hard:
                found["twi"] += sum(self._sample_loss(*group) for group in groups)
            if target is not None:
                losses = (self._soft_sample_loss(*group, expected, predictor) for group in groups)
                found["soft"] += sum(losses) / len(stages)
        return found

    def _groups(
        self,
        predictions: list[Tensor],
        weights: list[float],
        branches: int,
        recording: RCNNRecording,
    ) -> list[tuple[list[Tensor], ProposalSample, list[float]]]:
        """``e_0`` on all proposals and ``e_1..e_N`` on a part of them: predictions (E, R, ...), which proposals, and a
        weight an estimate; empty for no proposal."""
        of_zeroth, of_others = recording.sample(0), recording.sample(self.samples_per_image)
        if not of_zeroth.strata:
            return []
        count = len(of_zeroth.rows)
        groups = [([x[None, :count] for x in predictions], of_zeroth, weights[:1])]
        if branches > 0:
            others = [x[count:].unflatten(0, (branches, -1)) for x in predictions]
            groups.append((others, of_others, weights[1:]))
        return groups

    def _pooled(
        self,
        estimates: FactoredEstimates,
        proposals: list[Instances],
        recording: RCNNRecording,
    ) -> Tensor:
        """Pooled maps, (R + N * R', C_T, S, S): ``e_0`` on all R proposals, then every other estimate on the
        R' of the sample.

        Args:
            proposals: the step's, or what a cascade made of them.
        """
        heads, levels = self.roi_heads, self.roi_heads.box_in_features
        if self.reuses_pooling and proposals is recording.proposals:
            zeroth = estimates.adapter(recording.roi_features)  # a 1x1 conv commutes with pooling
        else:
            boxes = [p.proposal_boxes for p in proposals]
            zeroth = heads.box_pooler([estimates.zeroth[level] for level in levels], boxes)
        if estimates.num_branches == 0:
            return zeroth
        of_others = recording.sample(self.samples_per_image)
        boxes = [p.proposal_boxes for p in of_others.rows_of(proposals)]
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

    def _soft_sample_loss(
        self,
        predictions: list[Tensor],
        sample: ProposalSample,
        weights: list[float],
        expected: Predictions,
        predictor: FastRCNNOutputLayers,
    ) -> Tensor:
        """As :meth:`_sample_loss`, against a box head's outputs on ``F_T`` on all of the step's proposals."""
        values = soft_proposal_losses(
            predictor,
            *predictions,
            Predictions(*(x[sample.rows] for x in expected)),
            self.soft.temperature,
        )
        means = sum(s.share * values[:, s.indices].mean(1) for s in sample.strata)
        return weighted_sum(means, weights)

    def _stratum_loss(
        self, logits: Tensor, deltas: Tensor, stratum: Stratum, weights: list[float]
    ) -> Tensor:
        """Detectron2's class and box loss of E estimates on the same proposals, weighted and summed.

        Args:
            logits, deltas: (E, R, K + 1) and (E, R, 4 or 4K).
            stratum: of R > 0 proposals.
        """
        predictor = self.box_stages[0].predictor
        gt_classes = torch.cat([p.gt_classes for p in stratum.proposals])
        boxes, matched = boxes_and_truth(stratum.proposals)
        if stratum.is_foreground is None:
            objects = (gt_classes < predictor.num_classes).nonzero(as_tuple=True)[0]
        else:  # known without a GPU being waited for
            objects = torch.arange(len(gt_classes) * stratum.is_foreground, device=logits.device)
        total = len(
            gt_classes
        )  # those of a class that the judge does not know count, and add nothing
        if self.judge.known_classes is not None:
            known = self.judge.knows(gt_classes)
            objects = objects[known[objects]]
        boxes, matched = boxes[objects], matched[objects]
        deltas = deltas_of_class(deltas[:, objects], gt_classes[objects], matched.shape[1])
        if self.judge.known_classes is not None:
            logits, gt_classes = logits[:, known], gt_classes[known]
        if predictor.use_sigmoid_ce:
            classes = [predictor.sigmoid_cross_entropy_loss(own, gt_classes) for own in logits]
            classes = torch.stack(classes) * (len(gt_classes) / total)
        else:
            labels = gt_classes.expand(len(logits), -1)
            classes = F.cross_entropy(logits.mT, labels, reduction="none").sum(1) / total
        location = box_losses(predictor, boxes, matched, deltas).sum(1) / total
        scale = predictor.loss_weight
        losses = scale.get("loss_cls", 1.0) * classes + scale.get("loss_box_reg", 1.0) * location
        return weighted_sum(losses, weights)


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
