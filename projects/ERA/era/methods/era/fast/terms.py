"""ERA's feature, residual, TWI and soft TWI losses from narrow factors of the estimates."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from era.losses import level_mean
from era.methods.era.fast.dense import FastDense
from era.methods.era.fast.factored import FactoredEstimates, factored_estimates, of_ends
from era.methods.era.fast.heads import FastHeads
from era.methods.era.fast.levers import ALL_ON, Levers
from era.methods.era.fast.residual import estimate_distances
from era.methods.era.losses import feature_terms
from era.methods.era.mbrnet import FeatureEstimator
from era.methods.era.twi import NO_SOFT_JUDGES, SoftJudges, ends, judge_weights, judgements
from era.modeling.detectors import Detector
from era.modeling.detectors.dense import Dense
from era.modeling.detectors.rcnn import RCNN
from era.modeling.step import Step

logger = logging.getLogger(__name__)


class FastTerms:
    """Stands for ``ERA._terms``: the same losses from narrow factors of the estimates.

    Args:
        estimator: adapter and MBRNet.
        judge, student: teacher and student.
        judged_parts: of the teacher's heads, against the ground truth.
        samples_per_image: as in :func:`era.methods.era.twi.twi_loss`.
        compiled: factor the estimates through ``torch.compile``.
        levers: what is switched on.
        soft: how the teacher's heads judge softly.
        judges_ends: judge ``e_0`` and ``e_N`` alone.
    """

    def __init__(
        self,
        estimator: FeatureEstimator,
        judge: Detector,
        student: Detector,
        judged_parts: Sequence[str],
        samples_per_image: int,
        *,
        compiled: bool = False,
        levers: Levers = ALL_ON,
        soft: SoftJudges = NO_SOFT_JUDGES,
        judges_ends: bool = False,
    ):
        self.estimator = estimator
        self.judge = judge
        self.judged_parts = tuple(judged_parts)
        self.samples_per_image = samples_per_image
        self.levers = levers
        self.soft = soft
        self.judges_ends = judges_ends
        factor = torch.compile(factored_estimates, dynamic=True) if compiled else factored_estimates
        self._factor = factor
        self.heads = None
        if self.judged_parts or soft.parts:
            if isinstance(judge, RCNN) and isinstance(student, RCNN):
                self.heads = FastHeads(judge, student, samples_per_image, levers, soft)
            elif isinstance(judge, Dense):
                self.heads = FastDense(judge, levers, soft)
        if self.heads is not None:
            logger.info("TWI: %s", self.heads.describe())

    def __call__(
        self,
        step: Step,
        scales: Sequence[float],
        deviation: dict[str, Tensor] | None = None,
        by_position: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses by term without their weights, and the distances of all estimates, (levels, N + 1).

        Args:
            deviation: ``sigma_T`` by level, where the target is standardised.
            by_position: :func:`~era.methods.era.standardise.emphasis` by level, where positions are weighted.
        """
        fused = self.levers.fused_branches
        estimates = self._factor(self.estimator, step.student.features, fused=fused)
        target = step.teacher_features
        terms, measured = self._feature_terms(estimates, target, scales, deviation, by_position)
        weights = judge_weights(scales)
        if self.judges_ends:
            estimates, weights = of_ends(estimates), ends(weights)
        for part in self.judge.parts:
            found = self._judgements(part, estimates, weights, step)
            terms |= {f"{kind}_{part}": loss for kind, loss in found.items()}
        return terms, measured

    def _feature_terms(
        self,
        estimates: FactoredEstimates,
        target: dict[str, Tensor],
        scales: Sequence[float],
        deviation: dict[str, Tensor] | None,
        by_position: dict[str, Tensor] | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Feature and residual losses, and the distances."""
        if not self.levers.narrow_residual:
            dense = estimates.dense()
            return feature_terms(
                dense.cumulative(), dense.residuals, target, scales, deviation, by_position
            )
        measured = torch.stack(
            [
                estimate_distances(
                    zeroth,
                    target[level],
                    estimates.factors.get(level),
                    estimates.projection,
                    estimates.num_branches,
                    None if deviation is None else deviation[level],
                    None if by_position is None else by_position[level],
                )
                for level, zeroth in estimates.zeroth.items()
            ]
        )  # MSE(e_i, F_T), each with gradient into its newest part alone
        terms = {"feature": level_mean(measured[:, 0])}
        if scales:
            by_branch = [level_mean(values) for values in measured[:, 1:].unbind(1)]
            total = sum(s * value for s, value in zip(scales, by_branch, strict=True))
            terms["residual"] = total / len(scales)
        return terms, measured.detach()

    def _judgements(
        self, part: str, estimates: FactoredEstimates, weights: list[float], step: Step
    ) -> dict[str, Tensor]:
        """As :func:`era.methods.era.twi.judgements`: by the fast heads what they know, the rest as defined."""
        hard, soft = step.labeled and part in self.judged_parts, part in self.soft.parts
        target, found = step.teacher_features, {}
        fast_hard = hard and self.heads is not None and self.heads.knows(part)
        fast_soft = soft and self.heads is not None and self.heads.knows_soft(part)
        if fast_hard or fast_soft:
            found = self.heads.losses(
                part,
                estimates,
                weights,
                step.student,
                hard=fast_hard,
                target=target if fast_soft else None,
            )
        hard, soft = hard and not fast_hard, soft and not fast_soft
        if hard or soft:
            found |= judgements(
                self.judge,
                part,
                estimates.dense().cumulative(),
                weights,
                target,
                step.student,
                samples_per_image=self.samples_per_image,
                hard=hard,
                soft=self.soft if soft else None,
            )
        return found
