"""Keep every test on one thread, seeded, and apart from the user's datasets and runs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # subprocesses inherit it; two cores are often shared

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo():
    """Root of the repository."""
    from pathlib import Path

    return Path(__file__).resolve().parent.parent
