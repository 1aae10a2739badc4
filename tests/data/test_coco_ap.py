"""COCO AP of boxes and masks by hand, and masks out of untrusted files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from era.data.coco_ap import coco_metrics
from era.data.rle import checked_rle, run_lengths
from era.errors import UserError

SQUARE = [10, 10, 40, 40]  # 1600 px: medium


def polygon(x, y, w, h) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rle(x, y, w, h) -> dict:
    mask = np.zeros((80, 100), np.uint8)
    mask[y : y + h, x : x + w] = 1
    found = coco_mask.encode(np.asfortranarray(mask))
    return {"size": found["size"], "counts": found["counts"].decode()}


@pytest.fixture
def annotations(tmp_path):
    """Two images of one square each: a disk (3) and a ring (7)."""
    objects = [
        {"id": i, "image_id": i, "category_id": c, "bbox": SQUARE, "area": 1600, "iscrowd": 0}
        | {"segmentation": polygon(*SQUARE)}
        for i, c in ((1, 3), (2, 7))
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in (1, 2)]
    categories = [{"id": 3, "name": "disk"}, {"id": 7, "name": "ring"}]
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"images": images, "annotations": objects, "categories": categories})
    )
    return str(path)


def detection(image: int, category: int, box=SQUARE, **more) -> dict:
    return {"image_id": image, "category_id": category, "score": 0.9, "bbox": box, **more}


def test_boxes(annotations):
    # The disk exactly; the ring 40 x 28 of 40 x 40: IoU 0.7, right at 5 of 10 thresholds.
    found = [detection(1, 3), detection(2, 7, [10, 10, 40, 28])]
    got = coco_metrics(annotations, found)
    assert got["AP-disk"] == pytest.approx(100) and got["AP-ring"] == pytest.approx(50)
    assert got["AP"] == got["APm"] == pytest.approx(75)
    assert got["AP50"] == pytest.approx(100) and got["AP75"] == pytest.approx(50)
    assert "APs" not in got and "APl" not in got  # no such object
    assert coco_metrics(annotations, found, image_ids=[1])["AP"] == pytest.approx(100)
    named = coco_metrics(annotations, found, class_names={3: "a", 7: "b"})
    assert named["AP-a"] == got["AP-disk"]


def test_masks_are_judged_by_their_own_pixels(annotations):
    # The box is exact, the mask its upper 28 rows.
    found = [detection(1, 3, segmentation=rle(10, 10, 40, 28))]
    before = json.dumps(found)
    assert coco_metrics(annotations, found)["AP-disk"] == pytest.approx(100)
    masks = coco_metrics(annotations, found, iou_type="segm")
    assert masks["AP-disk"] == pytest.approx(50) and masks["AP-ring"] == 0
    # By its mask (20 x 20 = 400 px) the second one is small: it is no false alarm among medium ones.
    small = [detection(1, 3, segmentation=rle(60, 10, 20, 20)), *found]
    small[0]["score"] = 0.95
    assert coco_metrics(annotations, small, iou_type="segm")["APm"] == pytest.approx(25)
    assert json.dumps(found) == before


def test_nothing_found(annotations):
    for iou_type in ("bbox", "segm"):
        got = coco_metrics(annotations, [], iou_type=iou_type)
        assert got == dict.fromkeys(("AP", "AP50", "AP75", "APm", "AP-disk", "AP-ring"), 0.0)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (detection(9, 3), "image 9"),
        (detection(1, 4), "category 4"),
        (detection(1, 3), "no usable mask"),
        (detection(1, 3, segmentation={"size": [100, 80], "counts": "0"}), "its size is"),
    ],
)
def test_detections_of_other_data(annotations, found, said):
    with pytest.raises(UserError, match=said):
        coco_metrics(annotations, [found], iou_type="segm")


def test_run_lengths_are_pycocotools_own():
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(n) for n in generator.integers(1, 40, 2))
        mask = (generator.random((height, width)) > generator.random()).astype(np.uint8)
        mask = np.kron(mask, np.ones((1, 30), np.uint8))  # runs of several characters
        size = list(mask.shape)
        text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        runs = run_lengths(text)
        assert (mask == np.repeat(np.arange(len(runs)) % 2, runs).reshape(size[::-1]).T).all()
        for counts in (text, runs.tolist()):
            checked = checked_rle({"size": size, "counts": counts}, *size)
            assert (coco_mask.decode(checked) == mask).all()


@pytest.mark.parametrize(
    "counts",
    ["", "000", "P", "@P", "\x00", "é", "1" * 40, "o" * 40, "ooooooooO", [4, -4, 16], [17], [8.0, 8], None],
)  # fmt: skip
def test_bad_masks_never_reach_pycocotools(counts):
    """Of some of these, pycocotools makes a mask of memory that nobody wrote."""
    with pytest.raises(ValueError, match="its "):
        checked_rle({"size": [4, 4], "counts": counts}, 4, 4)


@pytest.mark.parametrize("value", [None, "x", [], {}, {"size": [1e9, 1], "counts": "0"}])
def test_other_things_than_masks(value):
    with pytest.raises(ValueError, match="its size is"):
        checked_rle(value, 4, 4)
