"""Settings from data, devices and time: each choice by itself, on numbers worked by hand."""

import numpy as np
import pytest

from era.distil import anchors, choices
from era.distil.anchors import Anchors
from era.distil.annotations import Split, divide
from era.distil.request import read_time
from era.errors import UserError


@pytest.mark.parametrize(
    ("pictures", "kept"), [(2, 1), (3, 1), (10, 2), (499, 100), (500, 50), (118_000, 5000)]
)
def test_a_part_is_kept_for_validation(pictures, kept):
    assert choices.kept_for_validation(pictures) == kept


def test_input_size_follows_pictures_objects_and_device():
    photos = np.array([[4000, 3000]] * 5)
    large, small = np.full(10, 200.0), np.full(10, 10.0)
    assert choices.input_size(photos, large, "cuda") == (
        800,
        1056,
    )  # 800 * 4/3 = 1066.7 -> 33.3 * 32
    assert choices.input_size(photos, large, "cpu") == (480, 640)
    toy = np.array([[128, 128]] * 5)
    assert choices.input_size(toy, large, "cpu") == (128, 128)
    assert choices.input_size(toy, small, "cpu") == (192, 192)  # 16 / 10, to 32: 204.8 -> 192
    assert choices.input_size(toy, np.full(3, 2.0), "cpu") == (256, 256)  # at most twice
    assert choices.input_size(np.array([[3000, 300]]), large, "cuda") == (288, 480)  # at most 5 : 3


def test_training_sizes():
    assert choices.training_sizes(800) == (640, 672, 704, 736, 768, 800)  # COCO's recipes
    assert choices.training_sizes(128) == (128,)


def test_batch_size():
    coco = (800, 1333)
    assert choices.batch_size(coco, 1000, 8, 80.0) == 16  # the recipes'
    assert choices.batch_size(coco, 1000, 1, 80.0) == 16
    assert choices.batch_size(coco, 1000, 1, 11.0) == 3
    assert choices.batch_size(coco, 1000, 1, 2.0) == 1
    assert choices.batch_size(coco, 5, 2, 80.0) == 4  # even shares, and no picture twice
    assert choices.batch_size((128, 128), 1000, 1, None) == 7
    assert choices.batch_size((480, 640), 1000, 1, None) == 1


def test_learning_rate():
    rate = choices.learning_rate
    assert rate(0.02, 16, from_random=False, is_teacher=False) == pytest.approx(0.02)
    assert rate(0.02, 4, from_random=True, is_teacher=False) == pytest.approx(0.01)
    assert rate(0.02, 8, from_random=True, is_teacher=True) == pytest.approx(0.0025)


def test_usual_iterations():
    def usual(pictures, batch=16, from_random=False, is_teacher=False):
        return choices.usual_iterations(
            pictures, batch, from_random=from_random, is_teacher=is_teacher
        )

    assert usual(118_000) == 88_500  # 12 passes: COCO's 1x
    assert usual(1000) == 6250  # 100 passes
    assert usual(29_500) == 44_250  # a quarter of the pictures: twice the passes
    assert usual(10) == 500  # 8,000 pictures
    assert usual(1000, is_teacher=True) == 3125 and usual(1000, from_random=True) == 12_500
    assert usual(10, batch=500) == 100


def test_time_shortens_and_lengthens_all_trainings_alike():
    # 1000 * 1 s + 2000 * 2 s = 5000 s of steps; 0.95 * 4000 s - 1300 s = 2500 s for them.
    assert choices.in_time([1000, 2000], [1.0, 2.0], 1300.0, 4000.0) == [500, 1000]
    assert choices.in_time([1000, 2000], [1.0, 2.0], 0.0, 1e9) == [
        3000,
        6000,
    ]  # three times at most
    with pytest.raises(UserError, match="--time is 10 min, too short: expected at least 18 min"):
        choices.in_time(
            [1000, 2000], [1.0, 2.0], 500.0, 600.0
        )  # (500 + 5000 * 0.1) / 0.95 = 1053 s
    with pytest.raises(UserError, match="too short"):
        choices.in_time([1000], [1.0], 500.0, 100.0)


def test_evaluations_and_patience():
    assert choices.evaluations(10_000, 1.0, 1.0) == 20
    assert choices.evaluations(1000, 1.0, 10.0) == 10  # a tenth of the time
    assert choices.evaluations(1000, 1.0, 1e6) == 4 and choices.evaluations(2, 1.0, 1.0) == 2
    assert [choices.patience(n) for n in (2, 4, 20)] == [2, 2, 10]
    assert [choices.warm_up(n) for n in (100, 50_000)] == [10, 1000]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("40 s", 40), ("90 min", 5400)],
)
def test_time_is_read(text, seconds):
    assert read_time(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2 days", "-1h", "0m", "2h and more"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UserError, match=r"--time is .*: expected a duration"):
        read_time(text)


@pytest.mark.parametrize(
    ("seconds", "words"), [(3, "10 s"), (41, "50 s"), (840, "14 min"), (7500, "2 h 05 min")]
)
def test_durations_in_words(seconds, words):
    assert choices.in_words(seconds) == words


# ---- anchors -------------------------------------------------------------------------------------

COCO = Anchors(((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)), (0.5, 1.0, 2.0))


def test_cover_is_the_mean_of_the_best_iou():
    square = Anchors(((32.0,),), (1.0,))
    assert anchors.cover(square, np.array([[32.0, 32.0]])) == pytest.approx(1.0)
    # 16 x 16 inside: a quarter; 64 x 32 around: a half.
    assert anchors.cover(square, np.array([[16.0, 16.0], [64.0, 32.0]])) == pytest.approx(0.375)
    assert anchors.cover(COCO, np.array([[64 * 2**0.5, 64 / 2**0.5]])) == pytest.approx(1.0)


def test_fitted_anchors_are_the_middles_of_equal_parts():
    sides = np.linspace(20.0, 100.0, 1001)
    boxes = np.stack([sides, sides], axis=1)
    found = anchors.fit(boxes, [8, 16, 32, 64])
    assert found.sizes == ((30.0,), (50.0,), (70.0,), (90.0,)) and found.ratios == (1.0, 1.0, 1.0)
    octave = anchors.fit(boxes, [8, 16], sizes=2)
    assert octave.sizes == ((40.0, 57.0), (80.0, 113.0))  # times the root of two


def test_no_level_has_anchors_below_its_stride():
    boxes = np.full((10, 2), 20.0)
    assert anchors.fit(boxes, [4, 8, 16, 32, 64]).sizes == ((20.0,), (20.0,), (20.0,), (32.0,), (64.0,))  # fmt: skip


def test_own_anchors_are_taken_where_they_fit_better():
    rng = np.random.default_rng(0)
    wide = np.stack([rng.uniform(40, 80, 500), rng.uniform(8, 12, 500)], axis=1)
    found, why = anchors.choose(COCO, wide, [4, 8, 16, 32, 64])
    assert found != COCO and len(found.sizes) == 5 and len(found.ratios) == 3
    assert anchors.cover(found, wide) > anchors.cover(COCO, wide) + 0.1
    assert f"the teacher's {anchors.cover(COCO, wide):.2f}" in why
    exact = np.repeat(COCO.shapes(), 4, axis=0)
    assert anchors.choose(COCO, exact, [4, 8, 16, 32, 64])[0] == COCO


# ---- the split -----------------------------------------------------------------------------------


def _split(classes: list[tuple[int, ...]]) -> Split:
    """A picture for each entry, with an object of each of its classes."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": 9, "height": 9} for i in range(len(classes))
    ]
    entries = [
        {"id": 10 * i + c, "image_id": i, "category_id": c, "bbox": [0, 0, 5, 5], "iscrowd": 0}
        for i, found in enumerate(classes)
        for c in found
    ]
    categories = [{"id": c, "name": f"c{c}"} for c in (1, 2, 3)]
    return Split({"images": images, "annotations": entries, "categories": categories}, "photos")


def _files(split: Split) -> set[str]:
    return {i["file_name"] for i in split.content["images"]}


def test_the_split_follows_from_the_seed_and_loses_nothing():
    whole = _split([(1,)] * 30 + [()] * 10)
    train, val = divide(whole, 1)
    assert (train.pictures, val.pictures) == (32, 8) and val.with_objects == 6
    assert _files(train).isdisjoint(_files(val)) and len(_files(train) | _files(val)) == 40
    assert len(train.content["annotations"]) + len(val.content["annotations"]) == 30
    assert _files(divide(whole, 1)[1]) == _files(val) != _files(divide(whole, 2)[1])


def test_every_class_has_a_picture_to_train_on():
    whole = _split([(1,)] * 8 + [(1, 2), (3,)])
    for seed in range(20):
        train, val = divide(whole, seed)
        assert {a["category_id"] for a in train.objects} == {1, 2, 3} and val.with_objects >= 1


def test_a_file_that_stands_twice_is_on_one_side():
    whole = _split([(1,)] * 10)
    whole.content["images"].append(whole.content["images"][0] | {"id": 99})
    for seed in range(10):
        train, val = divide(whole, seed)
        assert _files(train).isdisjoint(_files(val)) and train.pictures + val.pictures == 11


def test_one_picture_is_too_few_to_divide():
    with pytest.raises(UserError, match="--data has 1 picture with objects: expected at least 2"):
        divide(_split([(1,), (), ()]), 1)
