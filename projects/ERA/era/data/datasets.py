"""Data of one's own, named in the config, and checks that run before training.

``DATASETS.COCO_FORMAT`` lists [name, annotation file, image folder] triples, ``DATASETS.IMAGE_FOLDERS``
[name, folder] pairs of pictures without annotations; no code is needed.
Every mistake is told as one `UserError` before a model is built. Paths are local.
"""

import functools
import os

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances

from era.data import image_folders, made
from era.data.annotations import show
from era.data.pictures import check_pictures
from era.data.validation import KEY, check_annotation_file
from era.errors import UserError

UNLABELED_KEY = "DATASETS.UNLABELED"
COCO_PARTS = ("name", "annotation file", "image folder")
_own: dict[str, tuple[str, str]] = {}  # name -> absolute (annotation file, image folder)


def register_from_config(cfg) -> None:
    """Register what ``DATASETS.COCO_FORMAT`` and ``DATASETS.IMAGE_FOLDERS`` list with Detectron2's catalogs.

    The files are not read here. The same entry may come again. Raises UserError, before anything
    is registered, for an entry of another form and for a name that means another dataset.
    """
    new: dict[str, tuple[str, ...]] = {}
    for key, parts in ((KEY, COCO_PARTS), (image_folders.KEY, image_folders.PARTS)):
        entries, form = cfg.DATASETS[key.removeprefix("DATASETS.")], f"[{', '.join(parts)}]"
        if not isinstance(entries, (list, tuple)):
            raise UserError(f"{key} is {entries!r}: write a list of {form}")
        for i, entry in enumerate(entries):
            whole = isinstance(entry, (list, tuple)) and len(entry) == len(parts)
            if not whole or not all(isinstance(part, str) and part.strip() for part in entry):
                raise UserError(
                    f"{key}[{i}] is {show(entry)}: write it as {len(parts)} non-empty strings, {form}"
                )
            name, *paths = entry
            found = tuple(os.path.abspath(os.path.expanduser(path)) for path in paths)
            known = new.get(name) or _registered(name)
            if (name in DatasetCatalog or known) and known != found:
                raise UserError(
                    f"{key}[{i}] names {name!r}, but that name already belongs to "
                    f"{' with images in '.join(known) if known else 'another dataset'}: choose another name"
                )
            new[name] = found
    for name, paths in new.items():
        if len(paths) == 1:
            image_folders.on_bad_image[name] = cfg.INPUT.ON_BAD_IMAGE
        if name in DatasetCatalog:
            continue
        if len(paths) == 1:
            image_folders.register_folder(name, *paths)
        else:
            register_coco_instances(name, {}, *paths)
            _own[name] = paths


def _registered(name: str) -> tuple[str, ...] | None:
    """The paths of a set of one's own that is in the catalog."""
    if name not in DatasetCatalog:
        return None
    folder = image_folders.folder_of(name)
    return _own.get(name) if folder is None else (folder,)


def check_datasets(cfg, for_training: bool, *, pictures: bool = False) -> list[str] | None:
    """Check the sets of ``cfg.DATASETS.TEST`` and, for training, ``TRAIN``; return their classes.

    With ``pictures`` every picture's file is opened too, see `check_pictures`.
    Sets that are made on first use are made before. Sets without a COCO-format file (or in LVIS's variant of it)
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
            found = _check_dataset(cfg, f"DATASETS.{key}", name, key == "TRAIN", pictures)
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


def _check_dataset(
    cfg, key: str, name: str, needs_objects: bool, pictures: bool
) -> list[str] | None:
    files = coco_files(key, name)
    declared = MetadataCatalog.get(name).get("thing_classes")
    if image_folders.folder_of(name):
        raise UserError(
            f"{key} names {name!r}, a folder of pictures without annotations ({image_folders.KEY}): name it in "
            "DATASETS.UNLABELED, and here a set with annotations"
        )
    if files is None:
        return list(declared) if declared else None
    json_file, image_root = files
    found = check_annotation_file(
        name,
        json_file,
        image_root,
        needs_objects,
        mask_format=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        num_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else None,
        open_pictures=functools.partial(check_pictures, cfg) if pictures else None,
    )
    if declared and list(declared) != found:  # Detectron2 would stop at a bare assertion
        raise UserError(
            f"dataset {name!r}: the classes in {json_file} are not those that {name!r} stands for "
            f"({_difference(found, list(declared))}): register the file in {KEY} under a new name"
        )
    return found


def labeled_records(cfg) -> list[dict]:
    """Detectron2's records of ``DATASETS.TRAIN`` as its own loader takes them, without the outlines and keypoints that
    its mapper would drop after it has copied them: of a picture of many objects they are most of the copy."""
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        if cfg.MODEL.KEYPOINT_ON
        else 0,
    )
    is_read = {"segmentation": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    unread = {key for key, value in is_read.items() if not value}
    return [_without(unread, record) for record in records]


def _without(keys: set[str], record: dict) -> dict:
    """A record whose annotations lack some keys; the catalog's own stays as it is."""
    if "annotations" not in record:
        return record
    annotations = [
        {key: value for key, value in annotation.items() if key not in keys}
        for annotation in record["annotations"]
    ]
    return {**record, "annotations": annotations}


def coco_files(key: str, name: str) -> tuple[str, str] | None:
    """Annotation file and image folder of a registered set, made first if it is generated; None for a set
    without them or in LVIS's variant.

    Raises UserError for an unknown name and for built-in data that is not there; ``key`` names it.
    """
    if name not in DatasetCatalog:
        raise UserError(
            f"{key} names {name!r}, which is not a registered dataset: add it to {KEY} as [name, annotation "
            f"file, image folder]{f', or to {image_folders.KEY} as [name, folder]' * (key == UNLABELED_KEY)}, or use a "
            "built-in name such as coco_2017_train or era_toy_train"
        )
    made.prepare(name)
    meta = MetadataCatalog.get(name)
    json_file, image_root = meta.get("json_file"), meta.get("image_root")
    if not json_file or not image_root or meta.get("evaluator_type") == "lvis":
        return None
    if name not in _own and not (os.path.isfile(json_file) and os.path.isdir(image_root)):
        root = os.environ.get("DETECTRON2_DATASETS")
        current = f"is {root!r}" if root is not None else "is not set, so ./datasets is used"
        missing = image_root if os.path.isfile(json_file) else json_file
        raise UserError(
            f"{key} names {name!r}, but {missing} does not exist: put the data there, or set "
            f"DETECTRON2_DATASETS (which {current}) to the folder that holds it before starting"
        )
    return json_file, image_root


def _difference(found: list[str], expected: list[str]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} against {len(expected)} classes"
    i = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    return f"class {i} is {found[i]!r} against {expected[i]!r}"
