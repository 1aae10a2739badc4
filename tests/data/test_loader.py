"""Training batches that begin anywhere: the same pictures, in the same order, with the same random numbers."""

import itertools
import random

import numpy as np
import pytest
import torch
from builders import tiny_cfg
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from era.data.datasets import labeled_records, register_from_config
from era.data.loader import UNLABELED, TrainLoader, labeled_loader
from era.data.seeds import PICTURE, STEP, derived_seed, random_numbers_of, seed_all

RECORDS = [{"width": 30 + 7 * i % 20, "height": 40, "id": i} for i in range(11)]


def drawn(record):
    """A mapper that only draws."""
    return {**record, "drawn": (np.random.rand(), random.random(), torch.rand(()).item())}


def loader(*, mapper=drawn, workers=0, grouped=True, **options):
    return TrainLoader(
        RECORDS,
        mapper=mapper,
        sampler=lambda records: TrainingSampler(len(records), seed=3),
        batch_size=2,
        group_by_shape=grouped,
        workers=workers,
        **options,
    )


def some(batches, count):
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("grouped", [True, False])
def test_a_loader_begins_where_it_is_told_to(grouped):
    from_the_start = loader(grouped=grouped)
    from_the_start.begin_at(5, 0)
    batches = some(from_the_start, 40)
    for first in (1, 7, 30):
        later = loader(grouped=grouped)
        later.begin_at(5, first)
        assert some(later, 10) == batches[first : first + 10]
    again = [item["drawn"] for batch in batches for item in batch if item["id"] == 4]
    assert len(again) == len(set(again)) > 5  # another time, other random numbers


def test_worker_processes_change_nothing():
    results = []
    for workers in (0, 2):
        found = loader(workers=workers)
        found.begin_at(5, 3)
        results.append(some(found, 8))
    assert results[0] == results[1]


def test_the_groups_are_detectron2s():
    order = (RECORDS[i] for i in TrainingSampler(len(RECORDS), seed=3))
    expected = some(AspectRatioGroupedDataset(order, 2), 30)
    assert some(loader(mapper=dict, seed=5), 30) == expected
    shapes = [{r["width"] > r["height"] for r in batch} for batch in expected]
    assert all(len(shape) == 1 for shape in shapes) and {True} in shapes and {False} in shapes


def test_processes_share_one_order_and_draw_for_themselves(monkeypatch):
    whole = loader(grouped=False, seed=5)
    batches = some(whole, 10)
    shares = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append([item for batch in some(loader(grouped=False, seed=5), 5) for item in batch])
    together = [item for pair in zip(*shares, strict=True) for item in pair]
    assert together == [item for batch in batches for item in batch]


def test_streams_and_seeds_draw_other_numbers():
    def first(**options):
        return some(loader(**options), 1)[0][0]["drawn"]

    assert len({first(seed=5), first(seed=6), first(seed=5, stream=UNLABELED)}) == 3
    assert derived_seed(STEP, 1, 2, 0) != derived_seed(PICTURE, 1, 2, 0)
    assert derived_seed(STEP, 1, 2, 0) == derived_seed(STEP, 1, 2, 0) < 2**32


def test_the_global_random_state_is_left_alone():
    seed_all(7)
    expected = drawn({})
    seed_all(7)
    assert len(some(loader(seed=5), 5)) == 5
    assert drawn({}) == expected
    with pytest.raises(KeyError), random_numbers_of(3):
        raise KeyError
    seed_all(7)
    assert drawn({}) == expected


def test_a_picture_that_a_mapper_leaves_out_is_replaced():
    def but_four(record):
        return None if record["id"] == 4 else drawn(record)

    batches = some(loader(mapper=but_four, seed=5, grouped=False), 40)
    assert all(len(batch) == 2 for batch in batches) and 4 not in {
        item["id"] for batch in batches for item in batch
    }
    later = loader(mapper=but_four, grouped=False)
    later.begin_at(5, 20)
    assert some(later, 20) == batches[20:]
    with pytest.raises(RuntimeError, match="none of 3 pictures"):
        some(loader(mapper=lambda record: None, seed=5), 1)


SAMPLERS = {
    "TrainingSampler": [],
    "RepeatFactorTrainingSampler": ["DATALOADER.REPEAT_THRESHOLD", "0.5"],
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_detectron2s_samplers_go_on(sampler, tiny_data):
    """Also without SEED, by the one that was drawn."""
    cfg = tiny_cfg("plain", *tiny_data, "DATALOADER.SAMPLER_TRAIN", sampler, *SAMPLERS[sampler])
    cfg.SEED = -1
    register_from_config(cfg)

    def names(first, count):
        found = labeled_loader(cfg, labeled_records(cfg), lambda record: record, 2)
        found.begin_at(9, first)
        return [[record["file_name"] for record in batch] for batch in some(found, count)]

    seed_all(1)
    batches = names(0, 20)
    seed_all(2)
    assert names(7, 13) == batches[7:]
    assert len({name for batch in batches for name in batch}) == 12
