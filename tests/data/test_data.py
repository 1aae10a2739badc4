"""The generated toy dataset, and the checks on COCO-format data of one's own."""

import contextlib
import copy
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from builders import TOY, digest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from era.config import load_config
from era.data import datasets as coco
from era.data import folders, toy
from era.data.toy.polygons import mask_polygons
from era.data.validation import check_annotation_file
from era.errors import UserError

SPEC = toy.ToySpec(train_images=4, val_images=2)
COCO_SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "coco_sample"


@pytest.fixture(autouse=True)
def clean_catalogs():
    """Forget what a test registers, and give the toy names their default source back."""
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        coco._own.pop(name, None)
    toy.register()


# ---- the toy dataset: content --------------------------------------------------------------------


def test_same_seed_gives_same_bytes_and_another_seed_others(tmp_path):
    first = digest(toy.generate(tmp_path / "a", SPEC))
    assert digest(toy.generate(tmp_path / "b", SPEC)) == first
    assert len(first) == 4 + 2 + 2 + 1  # images, annotation files, spec.json
    assert len({value for key, value in first.items() if key.endswith("jpg")}) == 6
    other = digest(toy.generate(tmp_path / "c", dataclasses.replace(SPEC, seed=1)))
    assert other.keys() == first.keys()
    assert not set(other.values()) & set(first.values())


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path):
    few = digest(toy.generate(tmp_path / "a", SPEC))
    more = digest(toy.generate(tmp_path / "b", dataclasses.replace(SPEC, train_images=6)))
    assert few["train/000003.jpg"] == more["train/000003.jpg"]


def test_generation_leaves_global_random_state_alone(tmp_path):
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    toy.generate(tmp_path, SPEC)
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(), states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_boxes_are_tight_around_visible_pixels():
    count = 0
    for index in range(60):
        image, owner, objects = toy.render(toy.ToySpec(), "train", index)
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        assert set(np.unique(owner)) - {-1} == set(range(len(objects)))
        for i, found in enumerate(objects):
            pixels = [
                (x, y) for y, row in enumerate(owner.tolist()) for x, o in enumerate(row) if o == i
            ]
            xs, ys = zip(*pixels, strict=True)
            box = [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]
            assert found["bbox"] == box and found["area"] == len(pixels)
            assert min(box[2:]) >= toy.ToySpec().min_side
            count += 1
    assert count > 80  # a test of nothing would pass too


def test_boxes_fit_what_the_picture_shows(tmp_path):
    """Plain objects in even light: a threshold on the written JPEG finds the same boxes."""
    plain = {"texture": 0.0, "lighting": 0.0, "colour_cast": 0.0, "blur": 0.0, "noise": 0.0}
    spec = toy.ToySpec(
        train_images=20, val_images=1, max_objects=1, empty_fraction=0, distractors=0,
        min_contrast=130.0, **plain,
    )  # fmt: skip
    folder = toy.generate(tmp_path, spec)
    data = json.loads((folder / "annotations" / "train.json").read_text())
    assert len(data["annotations"]) == len(data["images"]) == 20
    for image, found in zip(data["images"], data["annotations"], strict=True):
        pixels = cv2.imread(str(folder / "train" / image["file_name"])).astype(float)
        x, y, w, h = found["bbox"]
        outside = np.ones(pixels.shape[:2], bool)
        outside[max(y - 3, 0) : y + h + 3, max(x - 3, 0) : x + w + 3] = False
        distance = np.linalg.norm(pixels - np.median(pixels[outside], 0), axis=2)
        rows, columns = np.nonzero(distance > 60)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(seen - [x, y, x + w, y + h]).max() <= 1


def rasterise(polygons, height, width):
    """The mask that COCO's tools make of polygons, (height, width) bool."""
    rles = coco_masks.frPyObjects(polygons, height, width)
    return coco_masks.decode(coco_masks.merge(rles)).astype(bool)


def test_polygons_are_the_visible_pixels():
    pieces = []
    for index in range(60):
        _, owner, objects = toy.render(toy.ToySpec(), "train", index)
        for i in range(len(objects)):
            polygons = mask_polygons(owner == i)
            np.testing.assert_array_equal(rasterise(polygons, *owner.shape), owner == i)
            assert all(len(p) >= 8 and len(p) % 2 == 0 for p in polygons)
            pieces.append(len(polygons))
    assert len(pieces) > 80 and max(pieces) > 1  # rings, and objects that others cut in two


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_polygons_of_any_mask_are_exact(share):
    """Random pixels: single ones, corners that touch, holes within holes, the image's edges."""
    mask = np.random.default_rng(0).random((23, 31)) < share
    polygons = mask_polygons(mask)
    np.testing.assert_array_equal(rasterise(polygons, 23, 31), mask)
    assert mask_polygons(np.zeros((4, 5), bool)) == []
    assert mask_polygons(np.ones((4, 5), bool)) == [[0, 0, 0, 4, 5, 4, 5, 0]]


def test_pictures_and_boxes_are_those_of_the_first_version():
    """Results on the toy data stay comparable: written down before there were polygons."""
    expected = [  # mean red, green and blue; class, box and area of each object
        ([97.99, 44.74, 49.66], [(1, [73, 82, 52, 46], 723), (0, [84, 63, 44, 54], 1914),
                                 (0, [2, 35, 50, 49], 1923)]),
        ([124.42, 175.78, 118.17], [(5, [27, 48, 64, 66], 2940), (4, [38, 0, 27, 23], 380),
                                    (5, [4, 20, 22, 20], 301)]),
    ]  # fmt: skip
    for index, (colour, objects) in enumerate(expected):
        image, _, found = toy.render(toy.ToySpec(), "train", index)
        assert image.mean((0, 1)) == pytest.approx(
            colour, abs=0.02
        )  # sines differ between processors
        assert [(o["category"], o["bbox"], o["area"]) for o in found] == objects


def test_ground_truth_as_detections_is_ap_100(tmp_path):
    folder = toy.generate(tmp_path, dataclasses.replace(SPEC, val_images=12))
    truth = COCO(str(folder / "annotations" / "val.json"))
    found = [{**a, "segmentation": truth.annToRLE(a), "score": 1.0} for a in truth.anns.values()]
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)


def test_only_a_model_with_masks_is_given_polygons(tmp_path):
    toy.register(tmp_path, SPEC)
    records = [r for r in DatasetCatalog.get("era_toy_train") if r["annotations"]]
    for config, has_masks in (("mask_plain", True), ("plain", False)):
        mapper = DatasetMapper(load_config(str(TOY / f"{config}.yaml")), is_train=True)
        assert mapper(records[0])["instances"].has("gt_masks") == has_masks


def test_classes_are_balanced_and_some_images_are_empty():
    spec = toy.ToySpec(empty_fraction=0.1)
    pictures = [toy.render(spec, "val", i)[2] for i in range(150)]
    share = np.bincount([o["category"] for p in pictures for o in p], minlength=8)
    assert share.min() > 0.5 * share.mean() and len(share) == len(toy.CLASSES)
    assert 3 <= sum(not p for p in pictures) <= 40
    assert max(len(p) for p in pictures) <= spec.max_objects


def test_pycocotools_and_detectron2_read_it(tmp_path, monkeypatch):
    toy.register(None, SPEC)  # before the variable is set: the paths must follow it
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    records = DatasetCatalog.get("era_toy_train")
    meta = MetadataCatalog.get("era_toy_train")
    assert meta.json_file == str(tmp_path / "era_toy" / "annotations" / "train.json")
    assert meta.image_root == str(tmp_path / "era_toy" / "train")
    assert meta.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(8)}
    assert tuple(meta.thing_classes) == toy.CLASSES and meta.evaluator_type == "coco"
    api = COCO(meta.json_file)
    assert len(records) == len(api.imgs) == 4
    assert sum(len(r["annotations"]) for r in records) == len(api.anns) > 0
    for record in records:
        assert cv2.imread(record["file_name"]).shape[:2] == (record["height"], record["width"])


def test_preview_is_a_grid_of_enlarged_images(tmp_path):
    grid = toy.preview(tmp_path, 2, 3, spec=SPEC)  # four images, two blank tiles
    assert grid.shape == (2 * 3 * 128, 3 * 3 * 128, 3) and grid.dtype == np.uint8


# ---- the toy dataset: files ----------------------------------------------------------------------


def test_second_call_reuses_and_another_spec_regenerates(tmp_path, monkeypatch):
    folder = toy.ensure(tmp_path, SPEC)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    start = time.perf_counter()
    assert toy.ensure(tmp_path, SPEC) == folder
    assert time.perf_counter() - start < 0.05
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    toy.ensure(tmp_path, dataclasses.replace(SPEC, val_images=1))
    assert len(list((folder / "val").iterdir())) == 1  # and nothing of the older data is left
    before = digest(folder)
    monkeypatch.setattr(toy, "GENERATOR_VERSION", -1)
    toy.ensure(tmp_path, dataclasses.replace(SPEC, val_images=1))
    assert digest(folder)["spec.json"] != before["spec.json"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "era_toy"] == [".era_toy.lock"]


@pytest.mark.parametrize("older", [False, True])
def test_a_crash_leaves_nothing_half_written(tmp_path, monkeypatch, older):
    kept = digest(toy.ensure(tmp_path, SPEC)) if older else {}
    wanted = dataclasses.replace(SPEC, seed=5)
    write, calls = toy._write_image, []

    def crash(*args):
        calls.append(args)
        if len(calls) == 5:  # the training images are there, one of validation is not
            raise RuntimeError("power cut")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(toy, "_write_image", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            toy.ensure(tmp_path, wanted)
    assert digest(tmp_path / "era_toy") == kept
    assert {path.name for path in tmp_path.iterdir()} - {"era_toy"} == {".era_toy.lock"}
    # A killed process cannot tidy up: the next one does.
    (tmp_path / ".era_toy.tmp" / "train").mkdir(parents=True)
    folder = toy.ensure(tmp_path, wanted)
    assert len(list((folder / "train").iterdir())) == 4
    assert not (tmp_path / ".era_toy.tmp").exists()


def _ensure_in_child(root, ready, written):
    """Count the splits that this process writes; run by the test below in a process of its own."""
    write, count = toy._write_split, []
    toy._write_split = lambda *args: (count.append(1), write(*args))
    ready.put(True)
    folder = toy.ensure(root, SPEC)
    assert len(digest(folder)) == 9  # whole on return
    written.put(len(count))


def test_two_processes_at_once_make_one_whole_dataset(tmp_path):
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit OpenCV's threads
    ready, written = spawn.Queue(), spawn.Queue()
    child = spawn.Process(target=_ensure_in_child, args=(tmp_path, ready, written))
    here = threading.Thread(target=toy.ensure, args=(tmp_path, SPEC))
    stamp = tmp_path / "era_toy" / "spec.json"
    with folders.lock(tmp_path, toy.FOLDER):  # until both processes wait for it
        child.start()
        assert ready.get(timeout=60)
        here.start()
        time.sleep(0.2)
        assert not stamp.exists()
    here.join(60)
    made = stamp.stat()
    assert written.get(timeout=60) in (0, 2)  # the whole of it or nothing
    child.join(60)
    assert child.exitcode == 0
    assert stamp.stat() == made  # whoever came second left it as it was
    assert digest(tmp_path / "era_toy") == digest(toy.generate(tmp_path / "alone", SPEC))


def test_what_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written below .*file.*DETECTRON2_DATASETS"):
        toy.ensure(tmp_path / "file", SPEC)
    (tmp_path / "era_toy").mkdir()
    (tmp_path / "era_toy" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"era_toy holds files that are not.*move it away"):
        toy.ensure(tmp_path, SPEC)
    assert (tmp_path / "era_toy" / "mine.txt").read_text() == "keep me"


# ---- COCO-format data: the configuration ---------------------------------------------------------


def make_cfg(train=(), test=(), coco_format=()):
    return CfgNode(
        {
            "DATASETS": {
                "TRAIN": train,
                "TEST": test,
                "COCO_FORMAT": list(coco_format),
                "IMAGE_FOLDERS": [],
            },
            "MODEL": {"MASK_ON": False, "KEYPOINT_ON": False},
            "INPUT": {"MASK_FORMAT": "polygon", "ON_BAD_IMAGE": "stop"},
        }
    )


@pytest.fixture
def good(tmp_path):
    """A small, correct COCO-format dataset: its content; its files lie in tmp_path."""
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((20, 30, 3), np.uint8))
    box = {"bbox": [1, 2.5, 10, 8], "area": 80, "iscrowd": 0}
    data = {
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 20, "width": 30},
            {"id": 3, "file_name": "b.jpg", "height": 20, "width": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 20, **box},
            {"id": 2, "image_id": 7, "category_id": 4, **box},
        ],
        # Not sorted by id, and with gaps: Detectron2 sorts them.
        "categories": [{"id": 20, "name": "dog"}, {"id": 4, "name": "cat"}],
    }
    (tmp_path / "good.json").write_text(json.dumps(data))
    return data


def test_own_data_by_config(tmp_path, good):
    other = copy.deepcopy(good)
    other["annotations"] = []  # an evaluation set may hold no object
    (tmp_path / "val.json").write_text(json.dumps(other))
    triples = [
        ["my_train", str(tmp_path / "good.json"), str(tmp_path / "images")],
        ["my_val", str(tmp_path / "val.json"), str(tmp_path / "images")],
    ]
    cfg = make_cfg(["my_train"], ["my_val"], triples)
    coco.register_from_config(cfg)
    coco.register_from_config(cfg)  # the same again is no mistake
    assert coco.check_datasets(cfg, for_training=True) == ["cat", "dog"]
    assert coco.check_datasets(make_cfg(["nobody"], ["my_val"]), for_training=False)
    records = DatasetCatalog.get("my_train")
    assert MetadataCatalog.get("my_train").thing_classes == ["cat", "dog"]
    assert [a["category_id"] for r in records for a in r["annotations"]] == [1, 0]
    coco.check_num_classes(["cat", "dog"], 2, "student")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("coco.json", "COCO_FORMAT is 'coco.json'.*list of"),
        ([["my_set", "a.json"]], r"COCO_FORMAT\[0\].*3 non-empty strings"),
        ([["my_set", "a.json", ""]], r"COCO_FORMAT\[0\].*3 non-empty strings"),
        (["my_set"], r"COCO_FORMAT\[0\] is 'my_set'.*3 non-empty strings"),
        ([["my_set", "a.json", 5]], r"COCO_FORMAT\[0\].*3 non-empty strings"),
        # Names that are taken: by Detectron2, by this project, by another triple.
        ([["coco_2017_val", "a.json", "im"]], "coco_2017_val.*already belongs.*another name"),
        ([["era_toy_val", "a.json", "im"]], "era_toy_val.*already belongs.*another name"),
        (
            [["my_set", "a.json", "im"], ["my_set", "b.json", "im"]],
            r"COCO_FORMAT\[1\].*already belongs to .*a\.json.*another name",
        ),
    ],
)
def test_bad_triples(entries, words):
    cfg = make_cfg()
    cfg.DATASETS.COCO_FORMAT = entries
    with pytest.raises(UserError, match=words):
        coco.register_from_config(cfg)
    assert "my_set" not in DatasetCatalog  # nothing is registered halfway


def put(part, index, key, value):
    """A change that sets one key of one entry."""

    def change(data):
        data[part][index][key] = value

    return change


def drop(part, *path):
    """A change that removes a list, or one key of one of its entries."""

    def change(data):
        if path:
            del data[part][path[0]][path[1]]
        else:
            del data[part]

    return change


def empty(part):
    return lambda data: data[part].clear()


BAD_CONTENT = [
    # (change to the good file, checked for training, words of the sentence)
    (drop("images"), True, "not in COCO format.*no list images"),
    (drop("annotations"), True, "not in COCO format.*no list annotations"),
    (drop("categories"), True, "not in COCO format.*no list categories"),
    (lambda d: d.update(images={}), True, "not in COCO format.*no list images"),
    (empty("images"), True, "empty list images"),
    (empty("categories"), True, "empty list categories"),
    (drop("categories", 1, "id"), True, r"categories\[1\] has the id missing"),
    (drop("categories", 0, "name"), True, r"categories\[0\] has the name missing"),
    (put("categories", 0, "id", "20"), True, r"categories\[0\] has the id '20'.*integer"),
    (put("categories", 1, "id", 20), True, "id 20 occurs twice in categories"),
    (put("images", 1, "id", 7), True, "id 7 occurs twice in images"),
    (put("annotations", 1, "id", 1), True, "id 1 occurs twice in annotations"),
    (drop("annotations", 0, "id"), True, r"annotations\[0\] has the id missing"),
    (lambda d: d["annotations"].append(5), True, r"annotations\[2\] has the id missing"),
    (put("annotations", 1, "image_id", 99), True, r"annotations\[1\].*image_id 99.*images"),
    (put("annotations", 1, "category_id", 9), True, r"\[1\].*category_id 9.*categories"),
    (drop("annotations", 1, "category_id"), True, r"\[1\].*category_id missing.*categories"),
    (put("annotations", 1, "image_id", [7]), True, r"annotations\[1\].*image_id \[7\]"),
    (put("annotations", 1, "bbox", [1, 2, 3]), True, r"annotations\[1\].*four finite numbers"),
    (put("annotations", 0, "bbox", [1, 2, 3, "4"]), True, r"\[0\].*four finite numbers"),
    (put("annotations", 0, "bbox", [1, 2, float("nan"), 4]), True, r"nan.*four finite numbers"),
    (drop("annotations", 0, "bbox"), False, r"annotations\[0\].*bbox missing"),
    (put("annotations", 0, "ignore", 1), True, r"annotations\[0\].*'ignore'.*iscrowd"),
    (drop("annotations", 1, "area"), False, r"annotations\[1\].*area missing.*to evaluate"),
    (drop("annotations", 1, "iscrowd"), False, r"annotations\[1\].*iscrowd missing"),
    (drop("images", 0, "file_name"), True, r"images\[0\] has no file_name"),
    (put("images", 0, "file_name", "/etc/x.jpg"), True, r"images\[0\].*leads out of"),
    (put("images", 0, "file_name", "a/../../x.jpg"), True, r"images\[0\].*leads out of"),
    (put("images", 0, "file_name", "..\\x.jpg"), True, r"images\[0\].*leads out of"),
    (put("images", 0, "file_name", "C:\\x.jpg"), True, r"images\[0\].*leads out of"),
    (drop("images", 1, "height"), True, r"images\[1\] has the height missing.*pixels"),
    # Nothing to train on: no object at all, only crowds, only flat boxes, no image file.
    (empty("annotations"), True, "no object to train on"),
    (lambda d: [a.update(iscrowd=1) for a in d["annotations"]], True, "no object to train on"),
    (lambda d: [a.update(bbox=[1, 2, 0, 5]) for a in d["annotations"]], True, "no object to"),
    (put("images", 0, "file_name", "gone.jpg"), True, "not one image with an object exists"),
    (
        lambda d: [i.update(file_name=f"gone{i['id']}.jpg") for i in d["images"]],
        False,
        "not one image exists.*image folder",
    ),
]


@pytest.mark.parametrize(("change", "training", "words"), BAD_CONTENT)
def test_bad_annotation_files(tmp_path, good, change, training, words):
    change(good)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(good))
    with pytest.raises(UserError, match=words) as caught:
        check_annotation_file("my_set", str(path), str(tmp_path / "images"), training)
    assert str(path) in str(caught.value) and "'my_set'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist: correct its path in DATASETS.COCO_FORMAT"),
        (b"{'images': []}", "is not JSON"),
        (b"\xff\xd8\xff\xe0", "is not JSON"),  # a JPEG by mistake
        (b"[]", "not in COCO format"),
    ],
)
def test_files_that_are_no_coco_json(tmp_path, content, words):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        check_annotation_file("my_set", str(path), str(tmp_path), True)


def test_absent_image_folder(tmp_path, good):
    with pytest.raises(UserError, match=r"image folder .*elsewhere does not exist"):
        check_annotation_file(
            "my_set", str(tmp_path / "good.json"), str(tmp_path / "elsewhere"), False
        )


def test_what_only_deserves_a_warning(tmp_path, good, caplog):
    """Some image files absent, an annotation id 0, and a harmless '..' inside a name."""
    good["images"][1]["file_name"] = "x/../gone..jpg"
    good["annotations"][0]["id"] = 0
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(good))
    with caplog.at_level(logging.WARNING):
        check_annotation_file("my_set", str(path), str(tmp_path / "images"), False)
    assert "1 of 2 image files looked up do not exist" in caplog.text
    assert "id 0" in caplog.text


def test_sets_that_do_not_fit_together(tmp_path, good, monkeypatch):
    folder = str(tmp_path / "images")
    fewer = copy.deepcopy(good)
    fewer["categories"].append({"id": 30, "name": "cow"})
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    good["categories"][1]["name"] = "Cat"
    (tmp_path / "renamed.json").write_text(json.dumps(good))
    names = ("good", "fewer", "renamed")
    triples = [[f"my_{name}", str(tmp_path / f"{name}.json"), folder] for name in names]
    coco.register_from_config(make_cfg(coco_format=triples))
    # As a built-in whose data was never downloaded, and one whose file has other classes.
    register_coco_instances("absent_builtin", {}, str(tmp_path / "no.json"), folder)
    classes = {"thing_classes": ["cat", "cow"]}
    register_coco_instances("swapped_builtin", classes, str(tmp_path / "good.json"), folder)
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data/here")
    cases = [
        ([], ["my_good"], "DATASETS.TRAIN is empty"),
        (["my_god"], [], "DATASETS.TRAIN names 'my_god'.*DATASETS.COCO_FORMAT.*built-in"),
        (["my_good"], ["my_god"], "DATASETS.TEST names 'my_god'"),
        ("my_good", [], r"DATASETS.TRAIN is the string.*\('my_good',\)"),
        (["my_good"], ["my_fewer"], "DATASETS.TEST.*'my_fewer' and 'my_good'.*3 against 2"),
        (["my_good", "my_renamed"], [], "class 0 is 'Cat' against 'cat'"),
        (["absent_builtin"], [], r"no\.json does not exist.*DETECTRON2_DATASETS.*'/data/here'"),
        (["swapped_builtin"], [], "class 1 is 'dog' against 'cow'.*COCO_FORMAT"),
    ]
    for train, test, words in cases:
        with pytest.raises(UserError, match=words):
            coco.check_datasets(make_cfg(train, test), for_training=True)


def test_a_model_with_masks_needs_masks(tmp_path, good):
    path = tmp_path / "good.json"
    cfg = make_cfg(["masked"], ["masked"], [["masked", str(path), str(tmp_path / "images")]])
    polygon = [[1, 2.5, 11, 2.5, 11, 10.5, 1, 10.5]]
    lengths = {"size": [20, 30], "counts": [0, 600]}
    cases = [  # masks of both annotations, INPUT.MASK_FORMAT, words of the sentence (none: no mistake)
        ([polygon, polygon], "polygon", ""),
        ([lengths, polygon], "bitmask", ""),
        (
            [polygon, None],
            "polygon",
            r"annotations\[1\] has the segmentation missing.*MASK_ON False",
        ),
        ([[], polygon], "bitmask", r"annotations\[0\] has the segmentation \[\].*MODEL.MASK_ON"),
        (
            [polygon, lengths],
            "polygon",
            r"annotations\[1\].*run lengths.*INPUT.MASK_FORMAT bitmask",
        ),
    ]
    cfg.MODEL.MASK_ON = True
    for masks, cfg.INPUT.MASK_FORMAT, words in cases:
        for annotation, mask in zip(good["annotations"], masks, strict=True):
            annotation["segmentation"] = mask
        path.write_text(json.dumps(good))
        coco.register_from_config(cfg)
        with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
            coco.check_datasets(cfg, for_training=True)
    cfg.MODEL.MASK_ON = False
    coco.check_datasets(cfg, for_training=True)


def test_number_of_classes():
    with pytest.raises(UserError, match=r"teacher's MODEL.ROI_HEADS.NUM_CLASSES is 80.* 2 .*to 2"):
        coco.check_num_classes(["cat", "dog"], 80, "teacher's MODEL.ROI_HEADS.NUM_CLASSES")


def test_toy_sets_are_made_before_they_are_checked(tmp_path):
    toy.register(tmp_path, SPEC)
    cfg = make_cfg(["era_toy_train"], ["era_toy_val"])
    assert coco.check_datasets(cfg, for_training=True) == list(toy.CLASSES)
    assert (tmp_path / "era_toy" / "spec.json").exists()


def test_real_coco_files():
    if not (COCO_SAMPLE / "coco").is_dir():
        pytest.skip(f"the sample of COCO photos is not at {COCO_SAMPLE}")
    # Detectron2 reads the variable when it is imported: hence a process of its own.
    code = """
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from era.data.datasets import check_datasets
cfg = get_cfg()
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
names = check_datasets(cfg, for_training=True)
assert len(names) == 80 and names[0] == "person" and names[79] == "toothbrush", names
assert len(DatasetCatalog.get("coco_2017_train")) == 10
"""
    environment = {**os.environ, "DETECTRON2_DATASETS": str(COCO_SAMPLE)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
