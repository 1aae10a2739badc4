"""The tree data, from a wheel that is made here: no test needs a network."""

import dataclasses
import functools
import itertools
import json
import os
import re
import signal

import cv2
import numpy as np
import pytest
import trees_case
from builders import digest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from trees_case import PHOTOS, REGIONS, pixels_of

from era.config import load_config
from era.data import datasets, folders, made, trees
from era.data.trees import Photo, Region
from era.data.trees.cut import boxes_on, starts
from era.errors import UserError


@pytest.fixture
def serve(tmp_path):
    """Puts a wheel of some members at an address, and gives the spec that names it."""
    (tmp_path / "served").mkdir()
    return functools.partial(trees_case.serve, tmp_path / "served")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _registered():
    yield
    trees.register()


# ---- cutting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "expected"),
    [
        (20, 20, 8, [0]),
        (21, 20, 0, [0, 1]),
        (40, 20, 0, [0, 20]),
        (41, 20, 0, [0, 10, 21]),  # 10.5 goes to the even number
        (32, 20, 8, [0, 12]),
        (33, 20, 8, [0, 6, 13]),
        (400, 210, 70, [0, 95, 190]),
        (1249, 210, 0, [0, 208, 416, 623, 831, 1039]),  # the test photo's columns and rows
        (1035, 210, 0, [0, 206, 412, 619, 825]),
    ],
)
def test_where_tiles_start(length, tile, overlap, expected):
    assert starts(length, tile, overlap) == expected


def test_tiles_cover_a_side_and_overlap_as_they_should():
    for length, tile, overlap in itertools.product(range(20, 90), (20,), (0, 7, 19)):
        first = starts(length, tile, overlap)
        assert first[0] == 0 and first[-1] == length - tile
        assert all(b - a <= tile - overlap for a, b in itertools.pairwise(first))


def test_boxes_are_cut_at_the_border_and_kept_if_half_is_left():
    cases = [  # box on the photo; what the tile of 20 pixels at column 10, row 5 shows of it
        ((12, 8, 20, 18), (2, 3, 10, 13)),  # the whole of it
        ((10, 5, 30, 25), (0, 0, 20, 20)),  # all of the tile
        ((5, 10, 15, 20), (0, 5, 5, 15)),  # exactly half
        ((4, 10, 15, 20), None),  # 5 of 11 columns
        ((26, 10, 33, 20), (16, 5, 20, 15)),  # 4 of 7
        ((5, 0, 15, 10), None),  # a quarter, at the corner
        ((0, 0, 10, 5), None),  # it touches the corner from outside
        ((40, 40, 50, 50), None),
    ]
    boxes = np.array([box for box, _ in cases])
    found = boxes_on(boxes, 10, 5, 20, 0.5)
    assert found.tolist() == [list(expected) for _, expected in cases if expected]
    assert len(boxes_on(boxes, 10, 5, 20, 0.25)) == 6  # and 5 of 11, and a quarter
    assert boxes_on(np.zeros((0, 4), int), 10, 5, 20, 0.5).shape == (0, 4)


# ---- the sets ------------------------------------------------------------------------------------


def test_tiles_are_the_photos_pixels_and_boxes(serve, root):
    trees.register(root, serve())
    found = {name: DatasetCatalog.get(name) for name in trees.NAMES}
    assert {name: len(records) for name, records in found.items()} == {
        "era_trees_train": 2 * 4 + 1, "era_trees_tune": 3, "era_trees_test": 3,
    }  # fmt: skip
    photos = {photo.name: pixels_of(photo) for photo in PHOTOS}
    for record in itertools.chain.from_iterable(found.values()):
        photo, x, y = re.fullmatch(
            r"(\w+)_(\d{4})_(\d{4})\.png", os.path.basename(record["file_name"])
        ).groups()
        x, y = int(x), int(y)
        tile = cv2.imread(record["file_name"])[..., ::-1]
        np.testing.assert_array_equal(tile, photos[photo][y : y + 20, x : x + 20])
        assert (record["height"], record["width"]) == (20, 20)
    # 41 columns: tiles at 0, 10 and 21. The second box, columns 15 to 24, is half on the first and whole on the second.
    boxes = [[a["bbox"] for a in record["annotations"]] for record in found["era_trees_test"]]
    assert boxes == [
        [[0, 0, 10, 10], [15, 5, 5, 10]],
        [[5, 5, 10, 10]],
        [[12, 10, 8, 10]],
    ]
    # Of the box on rows 16 to 25, four fifths are trained on and none is tuned on: no half of it is left there.
    last = max(found["era_trees_train"], key=lambda record: "wood_0020_0004" in record["file_name"])
    assert [10, 12, 10, 8] in [a["bbox"] for a in last["annotations"]]
    tuned = [a["bbox"] for record in found["era_trees_tune"] for a in record["annotations"]]
    assert tuned == [[5, 6, 10, 10], [3, 4, 12, 12]]
    meta = MetadataCatalog.get("era_trees_test")
    assert tuple(meta.thing_classes) == ("tree",) and meta.evaluator_type == "coco"
    assert datasets.check_datasets(cfg_of("era_trees_train", "era_trees_test"), True) == ["tree"]


def cfg_of(train, test):
    cfg = load_config(None)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.MASK_ON = (train,), (test,), False
    return cfg


def test_no_pixel_is_in_two_splits(serve, root):
    trees.register(root, serve())
    seen = {}
    for name in trees.NAMES:
        for record in DatasetCatalog.get(name):
            photo, x, y = os.path.basename(record["file_name"])[:-4].split("_")
            pixels = itertools.product(range(int(x), int(x) + 20), range(int(y), int(y) + 20))
            seen.setdefault(name, set()).update((photo, *pixel) for pixel in pixels)
    assert all(not seen[a] & seen[b] for a, b in itertools.combinations(seen, 2))
    assert {photo for photo, _, _ in seen["era_trees_test"]} == {"hill"}
    assert sum(map(len, seen.values())) == sum(p.width * p.height for p in PHOTOS)  # and all are


def test_the_real_photos_are_apart():
    by_split = {s: {r.photo for r in trees.DEFAULT.regions if r.split == s} for s in trees.SPLITS}
    assert by_split["test"] == {"2019_YELL_2_541000_4977000_image_crop"}
    assert not by_split["test"] & (by_split["train"] | by_split["tune"])
    assert len(by_split["train"]) == 3 and by_split["tune"] < by_split["train"]
    assert {p.name for p in trees.DEFAULT.photos} == set.union(*by_split.values())
    assert trees.DEFAULT.url.startswith("https://files.pythonhosted.org/")
    # The names hold the corner of a square of 1 km in metres: 12 km between the squares' nearest sides.
    east = [int(name.split("_")[3]) for name in set.union(*by_split.values()) if "YELL" in name]
    assert abs(east[0] - east[1]) - 1000 == 12000


@pytest.mark.parametrize(
    "region",
    [
        Region("tune", "wood", 20, 44),  # rows that are trained on
        Region("tune", "hill", 0, 20),  # the test photo
        Region("test", "grove", 0, 20),
        Region("test", "wood", 24, 44),  # a training photo's other rows
        Region("tune", "wood", 24, 43),  # too low for a tile
        Region("tune", "wood", 30, 50),  # not on the photo
        Region("tune", "meadow", 0, 20),
        Region("val", "wood", 24, 44),
    ],
)
def test_a_spec_that_mixes_what_is_seen_is_none(serve, region):
    others = tuple(r for r in REGIONS if r.split != "tune")
    with pytest.raises(ValueError, match=region.photo):
        dataclasses.replace(serve(), regions=(*others, region))


def test_a_photo_narrower_than_a_tile_is_none(serve):
    with pytest.raises(ValueError, match=r"grove.*too small for a tile"):
        dataclasses.replace(serve(), photos=(PHOTOS[0], Photo("grove", 19, 20), PHOTOS[2]))


def test_ground_truth_as_detections_is_ap_100(serve, root):
    folder = trees.ensure(root, serve())
    truth = COCO(str(folder / "annotations" / "test.json"))
    evaluation = COCOeval(
        truth, truth.loadRes([{**a, "score": 1.0} for a in truth.anns.values()]), "bbox"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_the_origin_of_a_set_names_no_place(serve, root):
    spec = serve()
    trees.register(root, spec)
    origins = {name: made.origin(name) for name in trees.NAMES}
    assert len({json.dumps(origin) for origin in origins.values()}) == 3
    assert not root.exists() and str(root.parent) not in json.dumps(origins)  # nothing is fetched
    trees.register(root / "elsewhere", dataclasses.replace(spec, url="file:///other/place.whl"))
    assert made.origin("era_trees_test") == origins["era_trees_test"]
    for change in ({"sha256": "0" * 64}, {"tile": 16}, {"overlap": 4}, {"min_visible": 0.4}):
        trees.register(root, dataclasses.replace(spec, **change))
        assert made.origin("era_trees_train") != origins["era_trees_train"]
    assert made.origin("coco_2017_val") is None
    made.prepare("coco_2017_val")  # nothing is made for a name of another kind


# ---- whole or not at all -------------------------------------------------------------------------


@pytest.mark.parametrize("older", [False, True])
def test_a_kill_in_between_leaves_nothing_half_written(serve, root, older):
    spec = serve()
    kept = digest(trees.ensure(root, dataclasses.replace(spec, tile=16))) if older else {}
    child = os.fork()
    if child == 0:
        written = []

        def write(path, _image):
            path.write_bytes(b"half of a tile")
            written.append(path)
            if len(written) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            trees._write_image = write
            trees.ensure(root, spec)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list((root / ".era_trees.tmp" / "train").iterdir())) == 5  # the kill came in between
    assert digest(root / "era_trees") == kept
    folder = trees.ensure(root, spec)  # and what it left is cleared away
    assert digest(folder) == digest(trees.ensure(root / "again", spec))
    rest = {path.name for path in root.iterdir()} - {"again"}
    assert rest == {"era_trees", ".era_trees.lock"}


def test_what_cannot_be_written_is_told(serve, root):
    root.mkdir()
    (root / "file").write_text("")
    with pytest.raises(UserError, match=r"the tree dataset cannot be written below .*file"):
        trees.ensure(root / "file", serve())
    (root / "era_trees").mkdir()
    (root / "era_trees" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"era_trees holds files that are not the tree dataset"):
        trees.ensure(root, serve())
    assert (root / "era_trees" / "mine.txt").read_text() == "keep me"


def test_it_lies_where_detectron2_looks(serve, root, monkeypatch):
    trees.register(None, serve())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    trees.prepare("era_trees_tune")
    assert MetadataCatalog.get("era_trees_tune").image_root == str(root / "era_trees" / "tune")
    assert folders.place(None) == root
