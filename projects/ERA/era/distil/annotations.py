"""The data that a student is made for: checked, measured, and divided into training and validation."""

from __future__ import annotations

import functools
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from era.config import get_era_cfg
from era.data.annotations import check_masks
from era.data.pictures import check_pictures
from era.data.validation import KEY, check_annotation_file
from era.distil.choices import kept_for_validation
from era.errors import UserError
from era_runtime.manifest import sha256_file

FOLDER = "data"  # below the output
SPLIT_FILE = "split.json"


@dataclass(frozen=True)
class Split:
    """One of the two sets.

    Attributes:
        content: of a COCO-format file, every annotation with its area and iscrowd.
        images: folder of the pictures.
    """

    content: dict[str, Any]
    images: str

    @property
    def pictures(self) -> int:
        """How many."""
        return len(self.content["images"])

    @functools.cached_property
    def objects(self) -> list[dict]:
        """Annotations that are trained on: no crowds, and boxes with an area."""
        entries = self.content["annotations"]
        return [a for a in entries if not a["iscrowd"] and min(a["bbox"][2:]) > 0]

    @property
    def with_objects(self) -> int:
        """Pictures that are trained on."""
        return len({a["image_id"] for a in self.objects})

    @property
    def sides(self) -> np.ndarray:
        """(n, 2) float: width and height of the pictures in pixels."""
        return np.array([(i["width"], i["height"]) for i in self.content["images"]], dtype=float)

    @property
    def boxes(self) -> np.ndarray:
        """(m, 2) float: width and height of the objects in pixels."""
        return np.array([a["bbox"][2:] for a in self.objects], dtype=float).reshape(-1, 2)

    def scaled_boxes(self, size: tuple[int, int]) -> np.ndarray:
        """:attr:`boxes` in pixels of the model's input.

        Args:
            size: of the shorter edge, and of the longer at most.
        """
        sides = {i["id"]: sorted((i["width"], i["height"])) for i in self.content["images"]}
        scales = [
            min(size[0] / sides[a["image_id"]][0], size[1] / sides[a["image_id"]][1])
            for a in self.objects
        ]
        return self.boxes * np.array(scales).reshape(-1, 1)

    @property
    def classes(self) -> list[str]:
        """Names in Detectron2's order, by category id."""
        return [c["name"] for c in sorted(self.content["categories"], key=lambda c: c["id"])]


@dataclass(frozen=True)
class Data:
    """Both sets, and how they came about.

    Attributes:
        seed: that the split was drawn from; None where a validation set was given.
        has_masks: whether every object has polygons.
        sources: SHA-256 of the annotation files, by path.
    """

    train: Split
    val: Split
    seed: int | None
    has_masks: bool
    sources: dict[str, str]

    def notes(self) -> list[str]:
        """What a user should know of classes that are rare."""
        found = []
        for name, split in (("training", self.train), ("validation", self.val)):
            seen = {a["category_id"] for a in split.objects}
            lost = [c["name"] for c in self.train.content["categories"] if c["id"] not in seen]
            if lost:
                found.append(f"no object of {', '.join(lost[:5])}{', ...' * (len(lost) > 5)} in {name}: "
                             f"{'it cannot be learnt' if name == 'training' else 'its AP is not known'}")  # fmt: skip
        return found


def read_data(data: tuple[str, str], val: tuple[str, str] | None, seed: int) -> Data:
    """Read and check the data, and divide it where there is no validation set.

    Args:
        data, val: annotation file and folder of pictures.
        seed: of the split.

    Raises:
        UserError: a file that cannot be used, one picture where there should be two, sets of different classes, or
            pictures in both.
    """
    whole = _read("--data", *data)
    sources = {data[0]: sha256_file(data[0])}
    if val is None:
        train, kept = divide(whole, seed)
    else:
        train, kept = whole, _read("--val", *val)
        sources[val[0]] = sha256_file(val[0])
        _check_apart(train, kept)
    return Data(train, kept, seed if val is None else None, _has_masks(whole), sources)


def divide(whole: Split, seed: int) -> tuple[Split, Split]:
    """Training and validation: a part of the pictures with objects and the same part of those without, drawn from the
    seed; of a class that would be in no picture of training, one is given back.

    Raises:
        UserError: fewer than two pictures have objects.
    """
    classes = defaultdict(set)  # of a file, for one may stand twice in the list
    file_of = {image["id"]: image["file_name"] for image in whole.content["images"]}
    for entry in whole.objects:
        classes[file_of[entry["image_id"]]].add(entry["category_id"])
    files = list(dict.fromkeys(file_of.values()))
    groups = [[f for f in files if f in classes], [f for f in files if f not in classes]]
    if len(groups[0]) < 2:
        raise UserError(
            f"--data has {len(groups[0])} picture with objects: expected at least 2, one to train on and one to validate "
            "with; add pictures, or name a validation set with --val."
        )
    kept: list[str] = []
    rng = random.Random(seed)
    part = kept_for_validation(len(files)) / len(files)
    for group in groups:
        rng.shuffle(group)
        least = 1 if group is groups[0] else 0
        kept += group[: min(max(least, round(part * len(group))), len(group) - least)]
    kept = _give_back(kept, groups[0], classes)
    chosen = set(kept)
    return _part(whole, lambda f: f not in chosen), _part(whole, lambda f: f in chosen)


def _give_back(kept: list[str], files: Sequence[str], classes: dict[str, set]) -> list[str]:
    """What stays in validation when every class has a picture to train on; where that leaves it without an object, it
    gets another picture, if there is one, whose classes training has elsewhere too."""
    chosen = set(kept)
    train = [f for f in files if f not in chosen]
    seen = Counter(c for f in train for c in classes[f])
    for category in sorted(set().union(*classes.values())):
        if not seen[category]:
            holder = next(f for f in kept if category in classes.get(f, ()))
            kept = [f for f in kept if f != holder]
            train.append(holder)
            seen.update(classes[holder])
    if not any(f in classes for f in kept):
        spare = (f for f in train if all(seen[c] > 1 for c in classes[f]))
        kept = [*kept, next(spare, train[0])]
    return kept


def _part(whole: Split, takes) -> Split:
    images = [i for i in whole.content["images"] if takes(i["file_name"])]
    ids = {i["id"] for i in images}
    entries = [a for a in whole.content["annotations"] if a["image_id"] in ids]
    return Split(whole.content | {"images": images, "annotations": entries}, whole.images)


def write_data(data: Data, folder: Path) -> None:
    """Write both sets as COCO-format files, and how they were divided, into ``folder``/data."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", data.train), ("val", data.val)):
        (place / f"{name}.json").write_text(json.dumps(split.content), encoding="utf-8")
    about = {
        "sources": data.sources,
        "seed": data.seed,
        "train": sorted(i["file_name"] for i in data.train.content["images"]),
        "val": sorted(i["file_name"] for i in data.val.content["images"]),
    }
    (place / SPLIT_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _read(option: str, file: str, images: str) -> Split:
    """One file, checked as training checks it; pictures that cannot be used are left out with a warning, as later."""
    try:
        check_annotation_file(
            option, file, images, needs_objects=True,
            open_pictures=functools.partial(check_pictures, skipping(get_era_cfg())),
        )  # fmt: skip
    except UserError as e:  # told of a config's entry, which nobody wrote here
        sentence = str(e).removeprefix(f"dataset {option!r}: ").replace(KEY, option)
        raise UserError(f"{option}: {sentence.rstrip('.')}.") from e
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    first = 1 - min((a["id"] for a in content["annotations"]), default=1)
    for entry in content["annotations"]:
        if type(entry.get("area")) not in (int, float):
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
        entry["iscrowd"] = 1 if entry.get("iscrowd") else 0
        if first > 0:  # pycocotools counts the id 0 as not found
            entry["id"] += first
    return Split(content, images)


def skipping(cfg: CfgNode) -> CfgNode:
    """The config, in place, with pictures that cannot be used left out."""
    cfg.INPUT.ON_BAD_IMAGE = "skip"
    return cfg


def _has_masks(split: Split) -> bool:
    if not all(isinstance(a.get("segmentation"), list) and a["segmentation"] for a in split.objects):  # fmt: skip
        return False
    sizes = {i["id"]: (i["width"], i["height"]) for i in split.content["images"]}
    try:
        check_masks("--data", split.content["annotations"], sizes, "polygon")
    except UserError:
        return False
    return True


def _check_apart(train: Split, val: Split) -> None:
    if train.classes != val.classes:
        raise UserError(
            f"--val has the classes {', '.join(val.classes)[:80]} and --data {', '.join(train.classes)[:80]}: expected the "
            "same names in the same order of category ids; correct the one or the other."
        )

    def paths(split: Split) -> set[str]:
        return {
            os.path.realpath(os.path.join(split.images, i["file_name"]))
            for i in split.content["images"]
        }

    if both := sorted(paths(train) & paths(val)):
        raise UserError(
            f"--val has {len(both)} pictures of --data, such as {both[0]}: expected others, or its AP says nothing; leave "
            "--val out, and a part of --data is kept apart."
        )
