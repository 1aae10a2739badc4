"""Training batches that can begin anywhere: which pictures a batch holds, and what an augmentation draws for each,
follow from the run's seed and the batch's number.

Detectron2's samplers and mappers are used as they are. Its loader groups decoded pictures by their shape and
augments out of one stream of random numbers a process, so that only going through all of it leads to its middle, and
several worker processes change the order. Here the grouping looks at the records' sizes, before anything is decoded.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from torch.utils import data as torchdata

from era import compat
from era.data.seeds import ORDER, PICTURE, WORKERS, derived_seed, random_numbers_of

logger = logging.getLogger(__name__)

LABELED, UNLABELED = 0, 1  # streams of pictures, each with an order of its own
TRIES = 3  # pictures that are tried where a mapper gives None

Place = tuple[int, int]  # index of a record; position in the order of all processes


class TrainLoader:
    """Endless batches of this process, lists of the model's inputs; ``iter`` begins at the batch that
    :meth:`begin_at` named.

    Args:
        records: Detectron2's; ``width`` and ``height`` are read with ``group_by_shape``.
        mapper: from a record to the model's input; None for a picture that is to be left out, and another is tried.
        sampler: called with the records, in all processes together, for the endless order of indices of this one. It
            draws from the global random states, which the seed determines.
        batch_size: pictures a batch of this process.
        group_by_shape: batches are of pictures wider than high, or of others, as Detectron2's are.
        workers: processes that decode and augment; they change neither order nor pixels.
        stream: :data:`LABELED` or :data:`UNLABELED`.
        seed: the run's; below 0 = one that all processes draw together when the first batch is asked for.
    """

    def __init__(
        self,
        records: list[dict],
        *,
        mapper: Callable[[dict], dict | None],
        sampler: Callable[[torchdata.Dataset], torchdata.Sampler],
        batch_size: int,
        group_by_shape: bool,
        workers: int,
        stream: int = LABELED,
        seed: int = -1,
    ):
        self.is_wide = (
            np.array([r["width"] > r["height"] for r in records]) if group_by_shape else None
        )
        self.records = DatasetFromList(records, copy=False)
        self.mapper, self.sampler = mapper, sampler
        self.batch_size, self.workers, self.stream = batch_size, workers, stream
        self.seed, self.first = seed, 0

    def begin_at(self, seed: int, batch: int) -> None:
        """From the next ``iter`` on: the order of this seed, from batch number ``batch`` on, counted from 0."""
        self.seed, self.first = seed, batch

    def __iter__(self) -> Iterator[list[dict]]:
        seed = self.seed if self.seed >= 0 else comm.shared_random_seed()
        workers = torch.Generator().manual_seed(derived_seed(WORKERS, seed, self.stream))
        return iter(
            torchdata.DataLoader(
                _Pictures(self.records, self.mapper, seed, self.stream),
                batch_sampler=_Endless(lambda: self.batches(seed)),
                num_workers=self.workers,
                collate_fn=_as_it_is,
                generator=workers,  # or it would draw from the global random state
            )
        )

    def batches(self, seed: int) -> Iterator[list[Place]]:
        """Places of the pictures, batch by batch, from :attr:`first` on. Nothing is decoded for those before."""
        with random_numbers_of(derived_seed(ORDER, seed, self.stream)):
            indices = self.sampler(self.records)
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        places = zip(indices, positions, strict=False)
        grouped = _grouped(places, self.batch_size, self.is_wide)
        return itertools.islice(grouped, self.first, None)


def _grouped(
    places: Iterator[Place], batch_size: int, is_wide: np.ndarray | None
) -> Iterator[list[Place]]:
    """Batches in the order in which they become full."""
    waiting: tuple[list[Place], list[Place]] = ([], [])
    for place in places:
        group = waiting[is_wide is not None and bool(is_wide[place[0]])]
        group.append(place)
        if len(group) == batch_size:
            yield group.copy()
            group.clear()


class _Endless(torchdata.Sampler):
    """A sampler out of a function that makes its iterator."""

    def __init__(self, make: Callable[[], Iterator[list[Place]]]):
        self.make = make

    def __iter__(self) -> Iterator[list[Place]]:
        return self.make()


class _Pictures(torchdata.Dataset):
    """Mapped pictures by their place."""

    def __init__(self, records: DatasetFromList, mapper, seed: int, stream: int):
        self.records, self.mapper, self.seed, self.stream = records, mapper, seed, stream

    def __getitem__(self, place: Place) -> dict:
        index, position = place
        with random_numbers_of(derived_seed(PICTURE, self.seed, self.stream, position)):
            for _ in range(TRIES):
                item = self.mapper(self.records[index])
                if item is not None:
                    return item
                index = np.random.randint(len(self.records))
        raise RuntimeError(
            f"none of {TRIES} pictures, the last one of index {index}, could be used"
        )


def _as_it_is(batch: list[dict]) -> list[dict]:
    return batch


def labeled_loader(cfg: CfgNode, records: list[dict], mapper, batch_size: int) -> TrainLoader:
    """Batches of labelled pictures in the order that ``DATALOADER.SAMPLER_TRAIN`` says.

    Args:
        records: of ``DATASETS.TRAIN``, :func:`era.data.datasets.labeled_records`.
        batch_size: pictures a batch over all processes.
    """
    return TrainLoader(
        records,
        mapper=mapper,
        sampler=lambda found: compat.training_sampler(cfg, found),
        batch_size=batch_size // comm.get_world_size(),
        group_by_shape=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        workers=cfg.DATALOADER.NUM_WORKERS,
        seed=cfg.SEED,
    )
