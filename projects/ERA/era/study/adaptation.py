"""MTPD's adaptation cost, how far one detector's maps are from another's, and the order of teachers that follows.

Inspired by Cao et al., "Learning Lightweight Object Detectors via Multi-Teacher Progressive Distillation", arXiv
2308.09105, whose code for this part was not released: that the cost is the smallest loss of a learned 1x1 map between
frozen maps, and that teachers are chosen backwards from the strongest one, is from memory. How the loss is standardised
(:class:`Moments`), and what is said of teachers that shorten no way (:func:`no_nearer`), is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

MAX_POSITIONS = (
    4096  # of a picture at a level; of a larger map every second, third, ... row and column counts
)
# Directions of the maps with less than this share of the largest one's variance are rounding, and explain nothing.
RANK_TOLERANCE = 1e-10


class Moments:
    """First and second moments of several detectors' maps at one level, over positions of pictures, in float64.

    With ``a``, ``b`` the vectors of detectors A and B at a position, and the sums over all positions of all pictures

    ``cost(A, B) = min_{W, w} sum |W a + w - b|^2 / sum |b - mean(b)|^2``,

    the loss of the best 1x1 convolution over that of the best constant, ``1 - R^2``. It is 0 where B's maps are a linear
    image of A's, near 1 where A's say nothing of B's, and independent of either one's scale, so that levels and teachers
    compare; within B channels count by their variance, as in the squared error that MGD takes. The minimum is exact, from
    the normal equations, and nothing is trained. It is fitted and measured on the same n positions: were these
    independent, it would be too small by ``C_A / n`` of itself; neighbours are not, so keep n well above C_A.

    Args:
        channels: of each detector's maps.

    Attributes:
        count: n, positions so far.
    """

    def __init__(self, channels: Sequence[int]):
        total = sum(channels)
        starts = [sum(channels[:i]) for i in range(len(channels) + 1)]
        self.parts = [slice(a, b) for a, b in pairwise(starts)]
        self.count = 0
        self._sum = torch.zeros(total, dtype=torch.float64)
        self._products = torch.zeros(total, total, dtype=torch.float64)

    def add(self, maps: Sequence[Tensor]) -> None:
        """Count the maps of the same pictures in, one a detector, each (B, C_i, H, W)."""
        size = maps[0].shape[-2] * maps[0].shape[-1]
        step = math.ceil(math.sqrt(size / MAX_POSITIONS))
        thinned = torch.cat([m[..., ::step, ::step].double() for m in maps], dim=1)
        vectors = thinned.movedim(1, -1).flatten(0, -2)  # (positions, sum of C_i)
        self.count += len(vectors)
        self._sum += vectors.sum(0).cpu()
        self._products += (vectors.T @ vectors).cpu()

    def costs(self) -> list[list[float]]:
        """From every detector (row) to every other (column)."""
        mean = self._sum / self.count
        covariance = self._products / self.count - torch.outer(mean, mean)
        return [[least_squares_cost(covariance, a, b) for b in self.parts] for a in self.parts]


def least_squares_cost(covariance: Tensor, a: slice, b: slice) -> float:
    """The share, 0 to 1, of the variance of some variables that a linear map of others leaves.

    Args:
        covariance: of all of them, float64.
        a, b: which explain and which are explained; 0 where the latter do not vary.
    """
    own, cross, total = covariance[a, a], covariance[a, b], covariance[b, b].trace()
    if total <= 0:
        return 0.0
    scale = own.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    values, vectors = torch.linalg.eigh(own / torch.outer(scale, scale))
    kept = values > RANK_TOLERANCE * values[-1].clamp_min(0)
    projected = vectors[:, kept].T @ (cross / scale[:, None])
    explained = (projected.square() / values[kept, None]).sum()
    return (1 - explained / total).clamp(0, 1).item()


def teacher_order(costs: Mapping[str, Mapping[str, float]], strongest: str) -> list[str]:
    """Teachers from weak to strong, chosen backwards and greedily: from the strongest on, the one before a teacher is
    that of the smallest cost to it among those which are not in the sequence yet.

    Args:
        costs: from a teacher to another, by their names, in the order in which equal costs are taken.
        strongest: the last one's name.
    """
    found = [strongest]
    left = [name for name in costs if name != strongest]
    while left:
        left.remove(best := min(left, key=lambda name: costs[name][found[0]]))
        found.insert(0, best)
    return found


def no_nearer(
    costs: Mapping[str, Mapping[str, float]], student: str, order: Sequence[str]
) -> list[str]:
    """Teachers of a sequence that are as far from the next one as the student itself, or farther: by this cost they
    shorten no way. The paper, as far as it is remembered, has no such test; it changes no order."""
    return [a for a, b in pairwise(order) if costs[a][b] >= costs[student][b]]
