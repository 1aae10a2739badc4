"""How the teacher has its maps compared: in units of its own deviation by channel, weighted by what it sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from era.losses import at_least_float32
from era.methods.shared import mean_over_processes

MOMENTUM = 0.01  # weight of the newest batch after the first 1 / MOMENTUM of them
# A channel's variance counts as at least this part of the mean variance, over all channels and levels: an
# error in a channel that the teacher hardly uses, or on a level of one position, is not blown up without limit.
SMALLEST_PART = 1e-4


class TeacherDeviation(nn.Module):
    """``sigma_T``, the standard deviation of every channel of the teacher's maps, by level.

    The variance is the mean over B, H, W (padding included) around the channel's mean in the batch, averaged
    over the first ``1 / momentum`` batches and from then on exponentially with weight ``momentum`` for the newest.
    It comes from the teacher alone: no gradient, nothing to train, and the batch in hand counts too; a batch's
    pictures without labels are a batch of their own.

    With several processes the batch's variance is the mean of every process's own (one all-reduce of levels
    x channels numbers a step), so all of them scale by the same numbers, and any may save them.

    Args:
        levels: names of the levels.
        channels: C_T.
        momentum: above 0, at most 1.

    Attributes:
        variance: buffer (levels, C_T), the running variance.
        batches: buffer, how many batches it has seen.
    """

    def __init__(self, levels: Sequence[str], channels: int, momentum: float = MOMENTUM):
        super().__init__()
        self.levels = tuple(levels)
        self.momentum = momentum
        self.register_buffer("variance", torch.zeros(len(self.levels), channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take one batch in.

        Args:
            target: ``F_T``, level name to (B, C_T, H, W).

        Returns:
            ``sigma_T`` with this batch in it, level name to (C_T,), above 0.
        """
        maps = [at_least_float32(target[level]) for level in self.levels]
        newest = torch.stack([x.var((0, 2, 3), correction=0) for x in maps]).to(self.variance)
        mean_over_processes(newest)
        self.batches += 1
        weight = self.batches.reciprocal().clamp(min=self.momentum).to(newest)
        self.variance.lerp_(newest, weight)
        smallest = SMALLEST_PART * self.variance.mean() + 1e-12
        deviation = self.variance.maximum(smallest).sqrt()
        return dict(zip(self.levels, deviation.unbind(), strict=True))


@torch.no_grad()
def emphasis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``sqrt(w / mean w)``: maps times this have the mean square ``sum_x w(x) |.(x)|^2 / (C sum_x w(x))``, the sums over
    the positions of a level in the whole batch.

    Uniform weights give 1, the plain mean; weights that are all 0 give 0. With several processes the mean is that of
    every process's own (one all-reduce of a number a level), so that the batch may be split among them.

    Args:
        weights: ``w``, level name to (B, 1, H, W), at least 0, constants.
    """
    means = torch.stack([w.mean() for w in weights.values()])
    means = mean_over_processes(means).clamp(min=torch.finfo(means.dtype).tiny)
    pairs = zip(weights.items(), means.unbind(), strict=True)
    return {level: (w / mean).sqrt() for (level, w), mean in pairs}
