"""ERA as README.md writes it, without any of the levers that make it cheap."""

from __future__ import annotations

from torch import Tensor

from era.losses import level_mean, mse, residual_mse
from era.methods import ERA
from era.methods.era.fast.heads import FastTeacherHeads
from era.modeling.step import DistillationStep


class PlainLossERA(ERA):
    """ERA with its feature and residual losses by plain autograd on the wide maps ``d_i``, ``e_i``.

    With plain :class:`era.methods.era.twi.TeacherHeads` as judges, nothing is factored, sparse or stacked: the reference.
    """

    def losses(self, step: DistillationStep) -> dict[str, Tensor]:
        """The losses of :meth:`ERA.losses`, without its statistics."""
        if isinstance(self.heads, FastTeacherHeads):
            judged = self.estimator.factored(step.student.features)
            dense = judged.dense()
            cumulative = dense.cumulative()
        else:
            dense = self.estimator(step.student.features)
            judged = cumulative = dense.cumulative()
        levels, targets, losses = self.estimator.levels, step.teacher_features, {}
        if self.feature_weight > 0:
            values = [mse(dense.zeroth[level], targets[level]) for level in levels]
            losses["loss_era_feature"] = self.feature_weight * level_mean(values)
        if self.residual_weight > 0 and self.scales:
            total = 0.0
            for scale, d, e in zip(self.scales, dense.residuals, cumulative[:-1], strict=True):
                values = [residual_mse(d[level], e[level], targets[level]) for level in levels]
                total = total + scale * level_mean(values)
            losses["loss_era_residual"] = self.residual_weight / len(self.scales) * total
        if self.heads is not None:
            self._twi_losses(losses, step, judged)
        if self.kd_weight > 0:
            losses["loss_era_kd"] = self.kd_weight * self._kd_loss(step)
        return losses
