"""The mapper that says what a picture's pixels are, for the teacher's cache."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from builders import tiny_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from PIL import Image

from era.data.keyed import KeyedMapper, training_mapper
from era.data.pictures import PictureMapper


@pytest.fixture
def record(tmp_path):
    return picture(tmp_path / "one.png", seed=0)


def picture(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return {"file_name": str(path), "height": 40, "width": 60, "image_id": 1, "annotations": []}


def mapper_with(*augmentations):
    return KeyedMapper(
        DatasetMapper(is_train=True, augmentations=list(augmentations), image_format="BGR")
    )


def test_off_the_mapper_makes_no_keys():
    assert type(training_mapper(tiny_cfg())) is PictureMapper
    assert type(training_mapper(tiny_cfg("plain"))) is PictureMapper
    on = training_mapper(tiny_cfg("era", "MODEL.TEACHER.CACHE", "memory"))
    assert type(on) is KeyedMapper


def test_pictures_and_random_numbers_are_those_of_the_plain_mapper(record):
    cfg = tiny_cfg("era", "INPUT.MIN_SIZE_TRAIN", "(24, 32, 48)")
    plain = training_mapper(cfg)
    cfg.MODEL.TEACHER.CACHE = "memory"
    keyed = training_mapper(cfg)
    results = []
    for mapper in (plain, keyed):
        np.random.seed(0)
        results.append([mapper(record) for _ in range(12)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert set(b) - set(a) == {"picture_key"}
    keys = {item["picture_key"]: item["image"] for item in results[1]}
    sizes = {tuple(image.shape) for image in keys.values()}
    assert len(sizes) > 1 and len(keys) > len(sizes), "sizes and flips are keys of their own"
    for item in results[1]:
        assert torch.equal(keys[item["picture_key"]], item["image"])


def test_a_key_says_what_the_pixels_are_not_what_the_file_is_called(tmp_path):
    mapper = mapper_with()
    first = picture(tmp_path / "a.png", seed=0)
    key = mapper(first)["picture_key"]
    assert mapper(picture(tmp_path / "b.png", seed=0))["picture_key"] == key
    stat = os.stat(tmp_path / "a.png")
    again = picture(tmp_path / "a.png", seed=1)  # the same name, size and age
    os.utime(tmp_path / "a.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert mapper(again)["picture_key"] != key


def test_a_flip_is_another_key_and_flipped_twice_the_same(record):
    plain = mapper_with()(record)["picture_key"]
    turned = mapper_with(T.RandomFlip(1.0))(record)["picture_key"]
    upright = mapper_with(T.RandomFlip(1.0, horizontal=False, vertical=True))(record)["picture_key"]
    assert len({plain, turned, upright}) == 3
    twice = mapper_with(T.RandomFlip(1.0), T.RandomFlip(1.0))(record)
    assert twice["picture_key"] == plain


@pytest.mark.parametrize(
    "augmentation, name",
    [
        (T.RandomCrop("absolute", (20, 20)), "RandomCrop"),
        (T.RandomBrightness(0.5, 1.5), "RandomBrightness"),
        (T.RandomRotation([10, 20]), "RandomRotation"),
        (T.FixedSizeCrop((50, 70)), "FixedSizeCrop"),
        (T.RandomApply(T.RandomContrast(0.5, 1.5), prob=1.0), "RandomApply"),
    ],
)
def test_what_cannot_be_keyed_is_named(record, augmentation, name):
    mapper = mapper_with(T.RandomFlip(1.0), augmentation, T.Resize((32, 32)))
    item = mapper(record)
    assert item["unkeyed_by"] == name and "picture_key" not in item


def test_an_augmentation_that_did_nothing_forbids_no_key(record):
    mapper = mapper_with(T.RandomApply(T.RandomContrast(0.5, 1.5), prob=0.5))
    np.random.seed(0)
    items = [mapper(record) for _ in range(20)]
    keyed = [item for item in items if "picture_key" in item]
    assert 0 < len(keyed) < 20 and len({item["picture_key"] for item in keyed}) == 1


def test_the_configs_crop_is_one(record):
    cfg = tiny_cfg("era", "MODEL.TEACHER.CACHE", "memory", "INPUT.CROP.ENABLED", "True")
    assert training_mapper(cfg)(record)["unkeyed_by"] == "RandomCrop"
