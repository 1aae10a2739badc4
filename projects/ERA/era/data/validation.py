"""Checks of a COCO-format annotation file and its images, before Detectron2 reads them."""

import gc
import json
import logging
import math
import os
from collections.abc import Callable, Sequence

import numpy as np

from era.data.annotations import box_array, check_keypoints, check_masks, objects_on_pictures, show
from era.errors import UserError

logger = logging.getLogger(__name__)

KEY = "DATASETS.COCO_FORMAT"
_SAMPLE = 200  # image files looked up per dataset; a stat of each of COCO's 118,000 takes long


def check_annotation_file(
    name: str,
    json_file: str,
    image_root: str,
    needs_objects: bool,
    mask_format: str | None = None,
    num_keypoints: int | None = None,
    open_pictures: Callable[[str, list[dict]], None] | None = None,
) -> list[str]:
    """Check a COCO-format file and return its class names in Detectron2's order, by category id.

    Raises UserError when the file or folder is absent, when the content is not COCO detection
    data, or when no image is usable: its file must exist and, with ``needs_objects`` (training),
    it must have a non-crowd box with an area on it. Without ``needs_objects``
    (evaluation), annotations need ``area`` and ``iscrowd``, as pycocotools does. For a model with
    masks ``mask_format`` is INPUT.MASK_FORMAT, and annotations need a ``segmentation``; for one with keypoints
    ``num_keypoints`` is how many an object has.

    The file is parsed once. With ``open_pictures`` it is handed ``at`` (for messages) and the records of the pictures
    that may be read. Without, image files are looked up until one usable image is found, and for
    at most 200 others, spread evenly; a warning counts the absent ones among these.
    """
    at = f"dataset {name!r}: {json_file}"
    data = _read(name, json_file)
    class_names, category_ids = _check_lists(at, data, json_file)
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    usable = _check_annotations(at, data, sizes, category_ids, needs_objects)
    entries = data.get("annotations", [])
    check_masks(at, entries, sizes, mask_format if needs_objects or mask_format is None else "")
    check_keypoints(at, entries, num_keypoints)
    images = data["images"]
    if open_pictures is None:
        _check_image_files(at, images, image_root, usable if needs_objects else None)
        return class_names
    _check_image_folder(at, image_root, usable if needs_objects else None)
    if needs_objects:  # Detectron2 leaves the others out
        read = {entry["image_id"] for entry in entries if not entry.get("iscrowd", 0)}
        images = [image for image in images if image["id"] in read]
    open_pictures(at, records_of(images, image_root))
    return class_names


def read_pictures(name: str, json_file: str, image_root: str) -> list[dict]:
    """The pictures of a COCO-format file whatever its annotations, which are not looked at.

    Gives Detectron2's records without annotations: ``file_name``, ``height``, ``width``, ``image_id``. Raises
    UserError when the file or folder is absent or its list of images is not as it should be.
    """
    at = f"dataset {name!r}: {json_file}"
    images = _read(name, json_file, lists=("images",))["images"]
    _check_ids(at, "images", images)
    _check_pictures(at, images)
    _check_image_files(at, images, image_root, None)
    return records_of(images, image_root)


def records_of(images: list[dict], image_root: str) -> list[dict]:
    """Detectron2's records of a file's images, without annotations."""
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
        }
        for image in images
    ]


def _read(name: str, json_file: str, lists: Sequence[str] = ("images", "categories")) -> dict:
    """The file's content, which has these lists; with categories annotations too, where COCO itself has them."""
    at = f"dataset {name!r}: annotation file {json_file}"
    if not os.path.isfile(json_file):
        raise UserError(f"{at} does not exist: correct its path in {KEY}")
    collecting = gc.isenabled()
    gc.disable()  # it would go over millions of new objects in vain: a third of the time
    try:
        with open(json_file, encoding="utf-8") as file:
            data = json.load(file)
    except OSError as error:
        raise UserError(f"{at} cannot be read ({error}): correct its permissions") from error
    except (ValueError, RecursionError) as error:  # ValueError: of the syntax or the encoding
        raise UserError(
            f"{at} is not JSON ({error}): give a COCO-format annotation file"
        ) from error
    finally:
        if collecting:
            gc.enable()
    # COCO's own test sets come as image_info_*.json, which have no annotations.
    lists = list(lists)
    if "categories" in lists and not os.path.basename(json_file).startswith("image_info"):
        lists.insert(1, "annotations")
    absent = [k for k in lists if not isinstance(data, dict) or not isinstance(data.get(k), list)]
    if absent:
        raise UserError(
            f"{at} is not in COCO format, for it has no list {' and no list '.join(absent)}: "
            f"expected a JSON object with the lists {', '.join(lists)}"
        )
    return data


def _check_lists(at: str, data: dict, json_file: str) -> tuple[list[str], set]:
    """Check images and categories, and all ids; return class names and category ids."""
    seen: dict[str, set] = {}
    for part in ("images", "annotations", "categories"):
        # COCO 2014's own minival files repeat annotation ids; Detectron2 lets them pass.
        lenient = part == "annotations" and "minival" in json_file
        seen[part] = _check_ids(at, part, data.get(part, []), may_repeat=lenient)
    for i, category in enumerate(data["categories"]):
        if not isinstance(category.get("name"), str) or not category["name"]:
            raise UserError(
                f"{at}: categories[{i}] has the name {show(category.get('name'))}: expected a "
                "non-empty string"
            )
    _check_pictures(at, data["images"])
    ordered = sorted(data["categories"], key=lambda category: category["id"])
    return [c["name"] for c in ordered], seen["categories"]


def _check_ids(at: str, part: str, entries: list, *, may_repeat: bool = False) -> set:
    """Every entry of a list is an object with an integer id of its own; return the ids."""
    if not entries and part != "annotations":
        raise UserError(f"{at} has an empty list {part}: expected at least one entry")
    ids = [e.get("id") if isinstance(e, dict) else None for e in entries]
    if not set(map(type, ids)) <= {int}:
        i = next(i for i, value in enumerate(ids) if type(value) is not int)
        raise UserError(
            f"{at}: {part}[{i}] has the id {show(ids[i])}: expected an object with an "
            "integer id of its own"
        )
    if len(set(ids)) != len(ids) and not may_repeat:
        known: set = set()
        twice = next(v for v in ids if v in known or known.add(v))
        raise UserError(f"{at}: the id {twice} occurs twice in {part}: number each entry once")
    return set(ids)


def _check_pictures(at: str, images: list[dict]) -> None:
    """Every image has the name of a file inside its folder, and a size."""
    for i, image in enumerate(images):
        path = image.get("file_name")
        if not isinstance(path, str) or not path:
            raise UserError(f"{at}: images[{i}] has no file_name: give its path in the folder")
        # A cheap test first: nearly every name passes it.
        if path[0] in "/\\" or ".." in path or ":" in path[:2]:
            plain = os.path.normpath(path.replace("\\", "/"))
            if plain.startswith("/") or plain.split("/")[0] == ".." or ":" in path[:2]:
                raise UserError(
                    f"{at}: images[{i}] has the file_name {path!r}, which leads out of the image "
                    "folder: write paths relative to that folder, without '..'"
                )
        for side in ("height", "width"):
            value = image.get(side)
            if not isinstance(value, (int, float)) or not 0 < value < 1 << 31 or value % 1:
                raise UserError(
                    f"{at}: images[{i}] has the {side} {show(value)}: expected a whole number of pixels"
                )


def _check_annotations(
    at: str, data: dict, sizes: dict, category_ids: set, needs_objects: bool
) -> set:
    """Check every annotation; return the ids of images with a non-crowd box that has an area on them."""
    entries = data.get("annotations", [])
    # Whole columns at once: one Python step per annotation and test would take long on COCO.
    for key, known, part in (
        ("image_id", sizes.keys(), "images"),
        ("category_id", category_ids, "categories"),
    ):
        column = [entry.get(key) for entry in entries]
        if not (set(map(type, column)) <= {int} and set(column) <= known):
            wrong = (i for i, v in enumerate(column) if type(v) is not int or v not in known)
            i = next(wrong)
            raise UserError(
                f"{at}: annotations[{i}] has the {key} {show(column[i])}, which is no id in "
                f"{part}: correct it, or remove the annotation"
            )
    boxes = box_array(at, entries)
    ignored = next((i for i, entry in enumerate(entries) if entry.get("ignore")), None)
    if ignored is not None:
        raise UserError(
            f"{at}: annotations[{ignored}] has the key 'ignore', which Detectron2 does not "
            "support: set iscrowd to 1 instead, or remove the annotation"
        )
    if not needs_objects:
        i = next((i for i, entry in enumerate(entries) if not _is_scored(entry)), None)
        if i is not None:
            raise UserError(
                f"{at}: annotations[{i}] has the area {show(entries[i].get('area'))} and the "
                f"iscrowd {show(entries[i].get('iscrowd'))}: to evaluate, give each annotation "
                "its area in square pixels and iscrowd 0 or 1"
            )
    if not needs_objects and any(entry.get("id") == 0 for entry in entries):
        logger.warning(
            "%s has an annotation with the id 0, which pycocotools counts as not found even when "
            "it is: number annotations from 1 for a right AP",
            at,
        )
    good = objects_on_pictures(at, entries, boxes, sizes)
    good &= np.array([not entry.get("iscrowd", 0) for entry in entries], dtype=bool)
    return {entries[i]["image_id"] for i in np.flatnonzero(good)}


def _check_image_folder(at: str, image_root: str, usable: set | None) -> None:
    """The folder is there, and something in it can be trained on (``usable``; None where that does not matter)."""
    if not os.path.isdir(image_root):
        raise UserError(
            f"{at}: its image folder {image_root} does not exist: correct its path in {KEY}"
        )
    if usable is not None and not usable:
        raise UserError(
            f"{at} has no object to train on: expected at least one annotation with iscrowd 0 and "
            "a bbox of positive width and height on its picture"
        )


def _check_image_files(at: str, images: list[dict], image_root: str, usable: set | None) -> None:
    """Look for one image file that serves (any, if ``usable`` is None), and sample the others."""
    _check_image_folder(at, image_root, usable)

    def exists(image: dict) -> bool:
        return os.path.isfile(os.path.join(image_root, image["file_name"]))

    if not any(exists(image) for image in images if usable is None or image["id"] in usable):
        kind = "image" if usable is None else "image with an object"
        raise UserError(
            f"{at}: not one {kind} exists in the image folder {image_root} (for example "
            f"{images[0]['file_name']} of {len(images)}): correct the folder in {KEY}"
        )
    sample = images[:: math.ceil(len(images) / _SAMPLE)]
    absent = [image["file_name"] for image in sample if not exists(image)]
    if absent:
        logger.warning(
            "%s: %d of %d image files looked up do not exist in %s (such as %s); reading one "
            "will stop the run",
            *(at, len(absent), len(sample), image_root, absent[0]),
        )


def _is_scored(entry: dict) -> bool:
    """Whether an annotation has what pycocotools reads without a default."""
    area = entry.get("area")
    return type(area) in (int, float) and math.isfinite(area) and entry.get("iscrowd") in (0, 1)
