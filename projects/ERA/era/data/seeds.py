"""Random numbers that follow from a run's seed and a place in the run, never from what was drawn before.

So a run that goes on from a checkpoint draws what it would have drawn, and the seed is all that must be kept.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from era.devices import seed_devices

# What a seed is derived for: the first of the parts of derived_seed.
STEP, ORDER, PICTURE, WORKERS, PRECISE_BN = range(5)
_SPARE = np.random.MT19937(
    0
)  # takes numpy's place for a while: reading and writing its state takes 20 times as long


def derived_seed(purpose: int, *parts: int) -> int:
    """A seed of 32 bits out of a purpose and whole numbers from 0 on; as good as independent for different ones.

    Args:
        purpose: one of the constants of this module; each has a fixed number of parts.
    """
    digest = hashlib.blake2b(repr((purpose, *parts)).encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "big")


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's global random states, those of GPUs in use too.

    ``torch.manual_seed`` would do the same in a hundred times the time where no GPU is in use.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    seed_devices(seed)


@contextmanager
def random_numbers_of(seed: int) -> Iterator[None]:
    """The global random states on the CPU are those of a seed inside, and as before afterwards."""
    python, numpy, of_torch = (
        random.getstate(),
        np.random.get_bit_generator(),
        torch.get_rng_state(),
    )
    random.seed(seed)
    np.random.set_bit_generator(np.random.MT19937(0) if numpy is _SPARE else _SPARE)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_bit_generator(numpy)
        torch.set_rng_state(of_torch)
