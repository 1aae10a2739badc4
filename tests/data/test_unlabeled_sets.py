"""Pictures without labels as data: folders, sets whose annotations are ignored, and mixed batches."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
from builders import tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.detection_utils import read_image
from detectron2.data.samplers import TrainingSampler
from PIL import Image

from era.data import datasets, toy
from era.data.loader import LABELED
from era.data.pictures import WatchedLoader
from era.data.seeds import ORDER, derived_seed, random_numbers_of
from era.data.unlabeled import MixedLoader, build_mixed_loader, check_unlabeled, pictures
from era.engine.schedule import scale_to_world
from era.engine.trainer import Trainer
from era.errors import UserError
from era.runs.identity import content

SPEC = toy.ToySpec(train_images=6, val_images=3, image_size=64)


@pytest.fixture(autouse=True)
def _clean_catalogs(tmp_path):
    before = set(DatasetCatalog)
    toy.register(tmp_path, SPEC)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        datasets._own.pop(name, None)
    toy.register()


@pytest.fixture
def photos(tmp_path):
    """A folder of five pictures of 40 x 30 pixels, and what is none of them."""
    folder = tmp_path / "photos"
    (folder / "inside.jpg").mkdir(parents=True)  # a folder
    rng = np.random.default_rng(0)
    for name in ("c.png", "a.jpg", "B.JPEG", "d.JPG", "e.jpg"):
        picture = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        exif = Image.Exif()
        if name == "d.JPG":
            exif[0x0112] = 6  # turned by a quarter
        picture.save(folder / name, exif=exif)
    (folder / "notes.txt").write_text("no picture")
    (folder / "._a.jpg").write_bytes(b"hidden, and no picture")
    return folder


def config(*opts, unlabeled=("photos",), train=("era_toy_train",), test=("era_toy_val",)):
    cfg = tiny_cfg("era", "INPUT.MIN_SIZE_TRAIN", "(64,)", *opts)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.DATASETS.UNLABELED = train, test, unlabeled
    return cfg


def with_folder(folder, *opts, **sets):
    cfg = config("DATASETS.IMAGE_FOLDERS", str([["photos", str(folder)]]), *opts, **sets)
    datasets.register_from_config(cfg)
    return cfg


# ---- folders ---------------------------------------------------------------------------------------


def test_a_folder_is_a_set_of_its_pictures_by_name(photos):
    cfg = with_folder(photos)
    found = DatasetCatalog.get("photos")
    assert [os.path.basename(r["file_name"]) for r in found] == [
        "B.JPEG",
        "a.jpg",
        "c.png",
        "d.JPG",
        "e.jpg",
    ]
    assert [r["image_id"] for r in found] == [1, 2, 3, 4, 5]
    for record in found:  # as Detectron2 will see it
        height, width = read_image(record["file_name"]).shape[:2]
        assert (record["height"], record["width"]) == (height, width)
    assert (found[3]["height"], found[3]["width"]) == (40, 30)
    datasets.register_from_config(cfg)  # the same entry may come again
    check_unlabeled(cfg)
    with pytest.raises(UserError, match=r"'photos', but that name already belongs to .*photos: "):
        with_folder(photos.parent)


def test_a_name_belongs_to_one_set(photos):
    cfg = config("DATASETS.IMAGE_FOLDERS", str([["mine", str(photos)]]), "DATASETS.COCO_FORMAT",
                 str([["mine", "a.json", str(photos)]]))  # fmt: skip
    with pytest.raises(
        UserError, match=r"IMAGE_FOLDERS\[0\] names 'mine'.*belongs to .*a\.json with"
    ):
        datasets.register_from_config(cfg)
    assert "mine" not in DatasetCatalog


def test_a_folders_content_is_its_names_and_sizes(photos, tmp_path):
    with_folder(photos)
    first = content("photos")
    assert first["a.jpg"] == (photos / "a.jpg").stat().st_size and len(first) == 5
    assert str(tmp_path) not in json.dumps(first)
    (photos / "a.jpg").write_bytes((photos / "a.jpg").read_bytes() + b"0")
    assert content("photos") != first


# ---- sets whose annotations are ignored --------------------------------------------------------------


def test_annotations_are_not_looked_at(photos, tmp_path):
    """A file whose annotations and categories nothing could be trained on."""
    images = [{"id": 7, "file_name": "a.jpg", "height": 30, "width": 40}]
    odd = {"images": images, "annotations": [{"image_id": "none", "bbox": 3}], "categories": 5}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    cfg = config(
        "DATASETS.COCO_FORMAT",
        str([["odd", str(tmp_path / "odd.json"), str(photos)]]),
        unlabeled=("odd",),
    )
    datasets.register_from_config(cfg)
    check_unlabeled(cfg)
    expected = {"file_name": str(photos / "a.jpg"), "height": 30, "width": 40, "image_id": 7}
    assert pictures("DATASETS.UNLABELED", "odd") == [expected]
    images[0]["file_name"] = "../a.jpg"
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    with pytest.raises(UserError, match="leads out of the image folder"):
        check_unlabeled(cfg)


def test_sets_that_only_code_knows(photos):
    record = {"file_name": str(photos / "a.jpg"), "height": 30, "width": 40, "image_id": "x"}
    DatasetCatalog.register(
        "by_code", lambda: [{**record, "annotations": [1], "sem_seg_file_name": "s.png"}]
    )
    assert pictures("DATASETS.UNLABELED", "by_code") == [record]


def test_pictures_that_are_tested_on_are_refused_through_a_link_too(photos, tmp_path):
    check_unlabeled(config(unlabeled=("era_toy_tune", "era_toy_train")))
    with pytest.raises(
        UserError, match=r"names 'era_toy_val'.*also in 'era_toy_val' of DATASETS\.TEST"
    ):
        check_unlabeled(config(unlabeled=("era_toy_tune", "era_toy_val")))
    os.symlink(toy.ensure(tmp_path, SPEC) / "val" / "000001.jpg", photos / "z.jpg")
    with pytest.raises(
        UserError, match=r"'photos', whose picture .*z\.jpg is also in 'era_toy_val'"
    ):
        check_unlabeled(with_folder(photos))


# ---- batches -----------------------------------------------------------------------------------------


def some(loader, count):
    return list(itertools.islice(iter(loader), count))


def test_a_batch_is_labelled_pictures_then_others(photos):
    cfg = with_folder(photos, "SOLVER.IMS_PER_BATCH", "10", "SOLVER.UNLABELED_PER_BATCH", "6",
                      "SOLVER.ACCUMULATION_STEPS", "2")  # fmt: skip
    seen = []
    for batch in some(Trainer.build_train_loader(cfg), 10):
        assert [bool(item.get("unlabeled")) for item in batch] == [False] * 2 + [True] * 3
        assert ["instances" in item for item in batch] == [True] * 2 + [False] * 3
        assert all(item["image"].shape[0] == 3 and "annotations" not in item for item in batch)
        seen += [os.path.basename(item["file_name"]) for item in batch[2:]]
    assert set(seen) == {"B.JPEG", "a.jpg", "c.png", "d.JPG", "e.jpg"}


def test_an_empty_list_gives_detectron2s_own_batches():
    """To the last bit where nothing is drawn for a picture; and the order of labelled pictures is kept where there
    are others too."""
    cfg = config("SOLVER.IMS_PER_BATCH", "3", "SOLVER.UNLABELED_PER_BATCH", "1",
                 "INPUT.RANDOM_FLIP", "none", "SEED", "5", unlabeled=())  # fmt: skip

    def order(loader, count):
        return [item for batch in some(loader, count) for item in batch]

    own = order(Trainer.build_train_loader(cfg), 4)
    with random_numbers_of(derived_seed(ORDER, 5, LABELED)):
        stock = order(build_detection_train_loader(cfg), 4)
    assert all("unlabeled" not in item for item in own) and len(own) == 12
    for a, b in zip(own, stock, strict=True):
        assert torch.equal(a["image"], b["image"]) and a["file_name"] == b["file_name"]
    cfg.DATASETS.UNLABELED = ("era_toy_tune",)
    mixed = order(Trainer.build_train_loader(cfg), 6)
    labeled = [item["file_name"] for item in mixed if not item.get("unlabeled")]
    assert labeled == [item["file_name"] for item in own]


def test_the_two_orders_have_seeds_of_their_own(monkeypatch):
    seeds, own = [], TrainingSampler.__init__

    def keep(self, *args, **kwargs):
        own(self, *args, **kwargs)
        seeds.append(self._seed)

    monkeypatch.setattr(TrainingSampler, "__init__", keep)
    loader = Trainer.build_train_loader(
        config("SOLVER.UNLABELED_PER_BATCH", "1", unlabeled=("era_toy_tune",))
    )
    loader.begin_at(3, 0)
    some(loader, 1)
    assert len(seeds) == 2 and seeds[0] != seeds[1]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_breaks_off_stops_the_run_with_one_sentence(photos, workers):
    """Its head is whole, so that the checks before the run cannot see it."""
    for name in ("a.jpg", "B.JPEG", "c.png", "d.JPG"):
        (photos / name).unlink()
    path = photos / "e.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    cfg = with_folder(photos, "DATALOADER.NUM_WORKERS", workers)
    check_unlabeled(cfg)
    endless = itertools.repeat([{}])
    with pytest.raises(UserError) as e:
        some(WatchedLoader(build_mixed_loader(cfg, endless, 1)), 1)
    assert str(e.value).startswith(f"the picture {path} cannot be read (") and "\n" not in str(
        e.value
    )


def test_a_loader_that_is_begun_again_begins_again():
    loader = MixedLoader([[1], [2]], [["a"], ["b"]])
    assert some(loader, 2) == some(loader, 2) == [[1, "a"], [2, "b"]]


def test_another_number_of_processes_keeps_the_part_of_a_batch(caplog):
    cfg = config("SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.IMS_PER_BATCH", "16",
                 "SOLVER.UNLABELED_PER_BATCH", "8", unlabeled=("era_toy_tune",))  # fmt: skip
    cfg.freeze()
    with caplog.at_level("INFO", logger="era.engine"):
        one = scale_to_world(cfg, 1)
    assert (one.SOLVER.IMS_PER_BATCH, one.SOLVER.UNLABELED_PER_BATCH) == (4, 2)
    assert one.is_frozen() and "UNLABELED_PER_BATCH 8 -> 2" in caplog.text
    assert scale_to_world(one, 1) is one and scale_to_world(cfg, 4) is cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.UNLABELED = ()
    assert scale_to_world(cfg, 1).SOLVER.UNLABELED_PER_BATCH == 8  # not read
