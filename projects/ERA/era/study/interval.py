"""Gains over seeds: paired differences, and what they say of the next seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
DRAWS = 10_000
FEWEST = 3  # differences from which on there is an interval
METHOD = (
    "Gain: mean over seeds of AP minus the AP of the reference from the same seed. Interval: "
    f"{LEVEL:.0%}, percentile bootstrap of that mean: {DRAWS:,} times as many differences as there are "
    f"seeds are drawn with replacement (generator seed 0); none below {FEWEST} seeds, and of exactly 3 it "
    "is the smallest and the largest difference. It covers the seeds of training alone, not other data."
)


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean; None for fewer than :data:`FEWEST` differences.

    Args:
        differences: one a seed, in points of AP.

    Returns:
        The smallest means that at least 2.5 % and at least 97.5 % of the drawn means do not exceed.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < FEWEST:
        return None
    chosen = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    means = values[np.sort(chosen, axis=1)].mean(axis=1)
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(means, tails, method="inverted_cdf")
    return float(low), float(high)
