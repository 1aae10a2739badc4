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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A dozen toy images as COCO-format data of one's own: the overrides that name them."""
    from era.data.toy import ToySpec, generate

    root = tmp_path_factory.mktemp("data") / "toy"
    generate(root, ToySpec(train_images=12, val_images=4, image_size=64))
    folder = next(p for p in (root, root / "era_toy") if (p / "annotations").is_dir())
    triples = [
        [f"tiny_{s}", str(folder / "annotations" / f"{s}.json"), str(folder / s)]
        for s in ("train", "val")
    ]
    return [
        "DATASETS.COCO_FORMAT", str(triples),
        "DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)",
        "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    ]  # fmt: skip
