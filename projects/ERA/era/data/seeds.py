"""Random numbers that follow from a run's seed and a place in the run, never from what was drawn before.

So a run that goes on from a checkpoint draws what it would have drawn, and the seed is all that must be kept.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# What a seed is derived for: the first of the parts of derived_seed.
STEP, ORDER, PICTURE, WORKERS, PRECISE_BN = range(5)


def derived_seed(purpose: int, *parts: int) -> int:
    """A seed of 32 bits out of a purpose and whole numbers from 0 on; as good as independent for different ones.

    Args:
        purpose: one of the constants of this module; each has a fixed number of parts.
    """
    return int(np.random.SeedSequence((purpose, *parts)).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's global random states, that of GPUs too."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def random_numbers_of(seed: int) -> Iterator[None]:
    """The global random states on the CPU are those of a seed inside, and as before afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
