"""ERA's feature, residual and TWI losses from narrow factors of the estimates."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from era.losses import level_mean
from era.methods.era.fast.factored import FactoredEstimates, factored_estimates
from era.methods.era.fast.heads import FastHeads
from era.methods.era.fast.levers import ALL_ON, Levers
from era.methods.era.fast.residual import estimate_distances
from era.methods.era.losses import distances, feature_loss, residual_loss
from era.methods.era.mbrnet import FeatureEstimator
from era.methods.era.twi import judge_weights, twi_loss
from era.modeling.detectors import Detector, Recording
from era.modeling.detectors.rcnn import RCNN
from era.modeling.step import Step

logger = logging.getLogger(__name__)


class FastTerms:
    """Stands for ``ERA._terms``: the same losses from narrow factors of the estimates.

    Args:
        estimator: adapter and MBRNet.
        judge, student: teacher and student.
        judged_parts: of the teacher's heads.
        samples_per_image: as in :func:`era.methods.era.twi.twi_loss`.
        compiled: factor the estimates through ``torch.compile``.
        levers: what is switched on.
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
    ):
        self.estimator = estimator
        self.judge = judge
        self.judged_parts = tuple(judged_parts)
        self.samples_per_image = samples_per_image
        self.levers = levers
        factor = torch.compile(factored_estimates, dynamic=True) if compiled else factored_estimates
        self._factor = factor
        self.heads = None
        if self.judged_parts and isinstance(judge, RCNN) and isinstance(student, RCNN):
            self.heads = FastHeads(judge, student, samples_per_image, levers)
            logger.info("TWI: %s", self.heads.describe())

    def __call__(self, step: Step, scales: Sequence[float]) -> tuple[dict[str, Tensor], Tensor]:
        """Losses by term without their weights, and the distances of all estimates, (levels, N + 1)."""
        fused = self.levers.fused_branches
        estimates = self._factor(self.estimator, step.student.features, fused=fused)
        terms, measured = self._feature_terms(estimates, step.teacher_features, scales)
        for part in self.judged_parts:
            terms[f"twi_{part}"] = self._twi(part, estimates, judge_weights(scales), step.student)
        return terms, measured

    def _feature_terms(
        self, estimates: FactoredEstimates, target: dict[str, Tensor], scales: Sequence[float]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Feature and residual losses, and the distances."""
        if not self.levers.narrow_residual:
            dense = estimates.dense()
            cumulative = dense.cumulative()
            terms = {"feature": feature_loss(dense.zeroth, target)}
            if scales:
                terms["residual"] = residual_loss(dense.residuals, cumulative, target, scales)
            return terms, distances(cumulative, target)
        measured = torch.stack(
            [
                estimate_distances(
                    zeroth,
                    target[level],
                    estimates.factors.get(level),
                    estimates.projection,
                    estimates.num_branches,
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

    def _twi(
        self,
        part: str,
        estimates: FactoredEstimates,
        weights: list[float],
        recording: Recording,
    ) -> Tensor:
        if self.heads is not None and self.heads.knows(part):
            return self.heads.loss(part, estimates, weights, recording)
        return twi_loss(
            self.judge,
            part,
            estimates.dense().cumulative(),
            weights,
            recording,
            samples_per_image=self.samples_per_image,
        )
