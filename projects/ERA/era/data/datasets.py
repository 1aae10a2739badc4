"""COCO-format data of one's own, named in the config, and checks that run before training.

``DATASETS.COCO_FORMAT`` lists [name, annotation file, image folder] triples; no code is needed.
Every mistake is told as one `UserError` before a model is built. Paths are local.
"""

import gc
import itertools
import json
import logging
import math
import os

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from era.data import toy
from era.errors import UserError

logger = logging.getLogger(__name__)

KEY = "DATASETS.COCO_FORMAT"
_SAMPLE = 200  # image files looked up per dataset; a stat of each of COCO's 118,000 takes long
_own: dict[str, tuple[str, str]] = {}  # name -> absolute (annotation file, image folder)


def register_from_config(cfg) -> None:
    """Register every triple of ``cfg.DATASETS.COCO_FORMAT`` with Detectron2's catalogs.

    The files are not read here. The same triple may come again. Raises UserError, before anything
    is registered, for a triple of another form and for a name that means another dataset.
    """
    new: dict[str, tuple[str, str]] = {}
    if not isinstance(cfg.DATASETS.COCO_FORMAT, (list, tuple)):
        raise UserError(
            f"{KEY} is {cfg.DATASETS.COCO_FORMAT!r}: write a list of "
            "[name, annotation file, image folder] triples"
        )
    for i, entry in enumerate(cfg.DATASETS.COCO_FORMAT):
        whole = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not whole or not all(isinstance(part, str) and part.strip() for part in entry):
            raise UserError(
                f"{KEY}[{i}] is {_show(entry)}: write it as three non-empty strings, "
                "[name, annotation file, image folder]"
            )
        name, *paths = entry
        json_file, image_root = (os.path.abspath(os.path.expanduser(path)) for path in paths)
        known = new.get(name) or (_own.get(name) if name in DatasetCatalog else None)
        if (name in DatasetCatalog or known) and known != (json_file, image_root):
            raise UserError(
                f"{KEY}[{i}] names {name!r}, but that name already belongs to "
                + (f"{known[0]} with images in {known[1]}" if known else "another dataset")
                + ": choose another name"
            )
        new[name] = (json_file, image_root)
    for name, (json_file, image_root) in new.items():
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, json_file, image_root)
            _own[name] = (json_file, image_root)


def check_annotation_file(
    name: str, json_file: str, image_root: str, needs_objects: bool
) -> list[str]:
    """Check a COCO-format file and return its class names in Detectron2's order, by category id.

    Raises UserError when the file or folder is absent, when the content is not COCO detection
    data, or when no image is usable: its file must exist and, with ``needs_objects`` (training),
    it must have a non-crowd box of positive width and height. Without ``needs_objects``
    (evaluation), annotations need ``area`` and ``iscrowd``, as pycocotools does.

    The file is parsed once. Image files are looked up until one usable image is found, and for
    at most 200 others, spread evenly; a warning counts the absent ones among these.
    """
    at = f"dataset {name!r}: {json_file}"
    data = _read(name, json_file)
    image_ids, class_names, category_ids = _check_lists(at, data, json_file)
    usable = _check_annotations(at, data, image_ids, category_ids, needs_objects)
    _check_image_files(at, data["images"], image_root, usable if needs_objects else None)
    return class_names


def check_datasets(cfg, for_training: bool) -> list[str] | None:
    """Check the sets of ``cfg.DATASETS.TEST`` and, for training, ``TRAIN``; return their classes.

    Generated sets are made first. Sets without a COCO-format file (or in LVIS's variant of it)
    are only asked for their class names; None means that no set knows any. Raises UserError for
    an empty TRAIN in training, an unknown name, a bad file, or class names that differ.
    """
    if for_training and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name at least one dataset to train on")
    keys = ("TRAIN", "TEST") if for_training else ("TEST",)
    first, classes = None, None
    for key in keys:
        names = cfg.DATASETS[key]
        if isinstance(names, str):
            raise UserError(f"DATASETS.{key} is the string {names!r}: write a list, ({names!r},)")
        for name in dict.fromkeys(names):
            found = _check_dataset(f"DATASETS.{key}", name, needs_objects=key == "TRAIN")
            if found is None:
                continue
            if classes is None:
                first, classes = name, found
            elif found != classes:
                raise UserError(
                    f"DATASETS.{key}: the classes of {name!r} and {first!r} differ "
                    f"({_difference(found, classes)}): use sets with the same class names in "
                    "the same order of category ids"
                )
    return classes


def check_num_classes(class_names: list[str], num_classes: int, key: str) -> None:
    """Raise UserError unless a model has one output per class; ``key`` names whose setting it is."""
    if len(class_names) != num_classes:
        raise UserError(
            f"the {key} is {num_classes}, but the datasets have {len(class_names)} classes: set it to "
            f"{len(class_names)}, or choose the datasets that the model was made for"
        )


def _check_dataset(key: str, name: str, *, needs_objects: bool) -> list[str] | None:
    if name not in DatasetCatalog:
        raise UserError(
            f"{key} names {name!r}, which is not a registered dataset: add it to {KEY} as [name, "
            "annotation file, image folder], or use a built-in name such as coco_2017_train or "
            "era_toy_train"
        )
    if name in toy.NAMES:
        toy.prepare(name)
    meta = MetadataCatalog.get(name)
    json_file, image_root = meta.get("json_file"), meta.get("image_root")
    declared = meta.get("thing_classes")
    if not json_file or not image_root or meta.get("evaluator_type") == "lvis":
        return list(declared) if declared else None
    if name not in _own and not (os.path.isfile(json_file) and os.path.isdir(image_root)):
        root = os.environ.get("DETECTRON2_DATASETS")
        current = f"is {root!r}" if root is not None else "is not set, so ./datasets is used"
        missing = image_root if os.path.isfile(json_file) else json_file
        raise UserError(
            f"{key} names {name!r}, but {missing} does not exist: put the data there, or set "
            f"DETECTRON2_DATASETS (which {current}) to the folder that holds it before starting"
        )
    found = check_annotation_file(name, json_file, image_root, needs_objects)
    if declared and list(declared) != found:  # Detectron2 would stop at a bare assertion
        raise UserError(
            f"dataset {name!r}: the classes in {json_file} are not those that {name!r} stands for "
            f"({_difference(found, list(declared))}): register the file in {KEY} under a new name"
        )
    return found


def _read(name: str, json_file: str) -> dict:
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
    lists = ["images", "categories"]
    if not os.path.basename(json_file).startswith("image_info"):
        lists.insert(1, "annotations")
    absent = [k for k in lists if not isinstance(data, dict) or not isinstance(data.get(k), list)]
    if absent:
        raise UserError(
            f"{at} is not in COCO format, for it has no list {' and no list '.join(absent)}: "
            "expected a JSON object with the lists images, annotations and categories"
        )
    return data


def _check_lists(at: str, data: dict, json_file: str) -> tuple[set, list[str], set]:
    """Check images and categories, and all ids; return image ids, class names, category ids."""
    seen: dict[str, set] = {}
    for part in ("images", "annotations", "categories"):
        entries = data.get(part, [])
        if not entries and part != "annotations":
            raise UserError(f"{at} has an empty list {part}: expected at least one entry")
        ids = [e.get("id") if isinstance(e, dict) else None for e in entries]
        if not set(map(type, ids)) <= {int}:
            i = next(i for i, value in enumerate(ids) if type(value) is not int)
            raise UserError(
                f"{at}: {part}[{i}] has the id {_show(ids[i])}: expected an object with an "
                "integer id of its own"
            )
        seen[part] = set(ids)
        # COCO 2014's own minival files repeat annotation ids; Detectron2 lets them pass.
        lenient = part == "annotations" and "minival" in json_file
        if len(seen[part]) != len(ids) and not lenient:
            known: set = set()
            twice = next(v for v in ids if v in known or known.add(v))
            raise UserError(f"{at}: the id {twice} occurs twice in {part}: number each entry once")
    for i, category in enumerate(data["categories"]):
        if not isinstance(category.get("name"), str) or not category["name"]:
            raise UserError(
                f"{at}: categories[{i}] has the name {_show(category.get('name'))}: expected a "
                "non-empty string"
            )
    for i, image in enumerate(data["images"]):
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
            if not isinstance(value, (int, float)) or not value > 0:
                raise UserError(
                    f"{at}: images[{i}] has the {side} {_show(value)}: expected a number of pixels"
                )
    ordered = sorted(data["categories"], key=lambda category: category["id"])
    return seen["images"], [c["name"] for c in ordered], seen["categories"]


def _check_annotations(
    at: str, data: dict, image_ids: set, category_ids: set, needs_objects: bool
) -> set:
    """Check every annotation; return the ids of images with a non-crowd box of positive size."""
    entries = data.get("annotations", [])
    # Whole columns at once: one Python step per annotation and test would take long on COCO.
    for key, known, part in (
        ("image_id", image_ids, "images"),
        ("category_id", category_ids, "categories"),
    ):
        column = [entry.get(key) for entry in entries]
        if not (set(map(type, column)) <= {int} and known.issuperset(column)):
            wrong = (i for i, v in enumerate(column) if type(v) is not int or v not in known)
            i = next(wrong)
            raise UserError(
                f"{at}: annotations[{i}] has the {key} {_show(column[i])}, which is no id in "
                f"{part}: correct it, or remove the annotation"
            )
    boxes = [entry.get("bbox") for entry in entries]
    values = None
    if (
        set(map(type, boxes)) <= {list}
        and set(map(len, boxes)) <= {4}
        and set(map(type, itertools.chain.from_iterable(boxes))) <= {int, float}
    ):
        values = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    if values is None or not np.isfinite(values).all():
        i = next(i for i, box in enumerate(boxes) if not _is_box(box))
        raise UserError(
            f"{at}: annotations[{i}] has the bbox {_show(boxes[i])}: expected four finite numbers, "
            "[x, y, width, height] in pixels"
        )
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
                f"{at}: annotations[{i}] has the area {_show(entries[i].get('area'))} and the "
                f"iscrowd {_show(entries[i].get('iscrowd'))}: to evaluate, give each annotation "
                "its area in square pixels and iscrowd 0 or 1"
            )
    if not needs_objects and any(entry.get("id") == 0 for entry in entries):
        logger.warning(
            "%s has an annotation with the id 0, which pycocotools counts as not found even when "
            "it is: number annotations from 1 for a right AP",
            at,
        )
    good = np.array([not entry.get("iscrowd", 0) for entry in entries], dtype=bool)
    good &= (values[:, 2] > 0) & (values[:, 3] > 0)
    return {entries[i]["image_id"] for i in np.flatnonzero(good)}


def _check_image_files(at: str, images: list[dict], image_root: str, usable: set | None) -> None:
    """Look for one image file that serves (any, if ``usable`` is None), and sample the others."""
    if not os.path.isdir(image_root):
        raise UserError(
            f"{at}: its image folder {image_root} does not exist: correct its path in {KEY}"
        )

    def exists(image: dict) -> bool:
        return os.path.isfile(os.path.join(image_root, image["file_name"]))

    if usable is not None and not usable:
        raise UserError(
            f"{at} has no object to train on: expected at least one annotation with iscrowd 0 and "
            "a bbox of positive width and height"
        )
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


def _is_box(box) -> bool:
    return (
        type(box) is list
        and len(box) == 4
        and all(type(v) in (int, float) and math.isfinite(v) for v in box)
    )


def _is_scored(entry: dict) -> bool:
    """Whether an annotation has what pycocotools reads without a default."""
    area = entry.get("area")
    return type(area) in (int, float) and math.isfinite(area) and entry.get("iscrowd") in (0, 1)


def _difference(found: list[str], expected: list[str]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} against {len(expected)} classes"
    i = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    return f"class {i} is {found[i]!r} against {expected[i]!r}"


def _show(value) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
