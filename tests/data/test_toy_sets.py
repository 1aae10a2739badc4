"""The toy data's further sets: few labels, and pictures to choose settings on."""

import dataclasses
import json

import pytest
from builders import digest
from detectron2.data import DatasetCatalog, MetadataCatalog

from era.data import toy

SPEC = toy.ToySpec(train_images=5, val_images=3, image_size=64)


@pytest.fixture
def few(monkeypatch):
    """The subset of few labels, made of two pictures so that a test is fast; the rest are the others."""
    for name, change in (("era_toy_train_200", {"first": 2}), ("era_toy_train_rest", {"skip": 2})):
        monkeypatch.setitem(toy.NAMES, name, dataclasses.replace(toy.NAMES[name], **change))


@pytest.fixture(autouse=True)
def _registered(tmp_path):
    toy.register(tmp_path, SPEC)
    yield
    toy.register()


def test_the_first_pictures_of_training_are_a_set_without_copies(tmp_path, few):
    before = digest(toy.ensure(tmp_path, SPEC))
    every, first = DatasetCatalog.get("era_toy_train"), DatasetCatalog.get("era_toy_train_200")
    assert first == every[:2] and any(record["annotations"] for record in first)
    after = digest(tmp_path / "era_toy")
    assert after.keys() - before.keys() == {"annotations/train_200.json"}
    assert {name: after[name] for name in before} == before
    meta = MetadataCatalog.get("era_toy_train_200")
    assert meta.image_root == MetadataCatalog.get("era_toy_train").image_root
    assert toy.NAMES["era_toy_train"].first is None


def test_few_labels_and_the_rest_are_all_training_pictures(tmp_path, few):
    every = DatasetCatalog.get("era_toy_train")
    first, rest = (DatasetCatalog.get(f"era_toy_train_{name}") for name in ("200", "rest"))
    assert (len(first), len(rest)) == (2, 3) and first + rest == every
    assert any(record["annotations"] for record in rest)
    coco = json.loads((tmp_path / "era_toy/annotations/train_rest.json").read_text())
    assert coco["info"]["description"].endswith("; all but the first 2 pictures")


def test_two_hundred_pictures_are_few_labels():
    assert toy.NAMES["era_toy_train_200"].first == toy.NAMES["era_toy_train_rest"].skip == 200


def test_settings_are_chosen_on_pictures_of_their_own(tmp_path):
    before = digest(toy.ensure(tmp_path, SPEC))
    records = DatasetCatalog.get("era_toy_tune")
    assert len(records) == SPEC.val_images == 3
    after = digest(tmp_path / "era_toy")
    added = after.keys() - before.keys()
    assert added == {"annotations/tune.json", *(f"tune/{i:06d}.jpg" for i in range(3))}
    assert {name: after[name] for name in before} == before  # data that is there is extended
    pictures = [value for name, value in after.items() if name.endswith("jpg")]
    assert len(set(pictures)) == len(pictures)  # in neither of the others
    assert json.loads((tmp_path / "era_toy/annotations/tune.json").read_text())["annotations"]
    again = digest(toy.generate(tmp_path / "other", SPEC))
    assert again == before
    toy.register(tmp_path / "other", SPEC)
    DatasetCatalog.get("era_toy_tune")
    assert digest(tmp_path / "other" / "era_toy") == after


def test_a_kill_in_between_leaves_nothing_half_done(tmp_path, monkeypatch):
    toy.ensure(tmp_path, SPEC)
    (tmp_path / "era_toy" / "tune").mkdir()  # the pictures' folder came, the annotations did not
    (tmp_path / "era_toy" / "tune" / "old.jpg").touch()
    assert len(DatasetCatalog.get("era_toy_tune")) == 3
    assert not (tmp_path / "era_toy" / "tune" / "old.jpg").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"era_toy", ".era_toy.lock"}


def test_another_spec_replaces_the_further_sets_too(tmp_path, few):
    DatasetCatalog.get("era_toy_train_200"), DatasetCatalog.get("era_toy_tune")
    toy.register(tmp_path, dataclasses.replace(SPEC, seed=1))
    toy.prepare("era_toy_val")
    assert not (tmp_path / "era_toy" / "annotations" / "tune.json").exists()
    assert len(DatasetCatalog.get("era_toy_tune")) == 3


def test_the_origin_of_a_set_names_no_place(tmp_path):
    origins = {name: toy.origin(name) for name in toy.NAMES}
    assert str(tmp_path) not in json.dumps(origins)
    assert len({json.dumps(origin) for origin in origins.values()}) == 5
    assert origins["era_toy_train_200"]["set"] == {  # what kept results were made from
        "file": "train_200", "split": "train", "first": 200,
    }  # fmt: skip
    toy.register(tmp_path / "elsewhere", SPEC)
    assert toy.origin("era_toy_train") == origins["era_toy_train"]
    toy.register(tmp_path, dataclasses.replace(SPEC, seed=1))
    assert toy.origin("era_toy_val") != origins["era_toy_val"]
