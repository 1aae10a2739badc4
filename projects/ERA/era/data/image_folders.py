"""Folders of pictures as registered sets without annotations (``DATASETS.IMAGE_FOLDERS``)."""

import functools
import logging
import os
import sys

from detectron2.data import DatasetCatalog, MetadataCatalog

from era.errors import UserError
from era_runtime.errors import DeploymentError
from era_runtime.pictures import picture_size

logger = logging.getLogger(__name__)

KEY = "DATASETS.IMAGE_FOLDERS"
PARTS = ("name", "folder")  # of an entry
SUFFIXES = (".jpg", ".jpeg", ".png")
# INPUT.ON_BAD_IMAGE by name, as the last config that names the folder says.
on_bad_image: dict[str, str] = {}
_own: dict[str, str] = {}  # name -> absolute folder


def folder_of(name: str) -> str | None:
    """The folder that is registered under a name, None if the name means no folder."""
    return _own.get(name) if name in DatasetCatalog else None


def register_folder(name: str, folder: str) -> None:
    """Put a folder of pictures into Detectron2's catalogs; it is not read yet."""
    _own[name] = folder
    DatasetCatalog.register(name, functools.partial(folder_pictures, name, folder))
    MetadataCatalog.get(name).set(image_root=folder)


def picture_files(name: str, folder: str) -> list[os.DirEntry]:
    """The pictures of a registered folder by name, those of hidden files and of folders inside left out.

    Raises UserError when the folder is absent, cannot be read or holds none.
    """
    at = f"{KEY}: the folder {folder} of {name!r}"
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file()]
    except OSError as error:
        raise UserError(
            f"{at} cannot be read ({error.strerror}): expected a folder of pictures; correct its path"
        ) from error
    found = sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
    if not found:
        raise UserError(
            f"{at} holds no picture: expected {', '.join(SUFFIXES)} files directly inside; name "
            "another folder"
        )
    return found


def folder_pictures(name: str, folder: str) -> list[dict]:
    """Detectron2's records of a registered folder: ``file_name``, ``height``, ``width``, ``image_id`` from 1 on.

    Of every picture the head is read, for its size as it will be seen (turned as EXIF says). Raises
    UserError as `picture_files`, and for a picture that is none, unless `on_bad_image` says skip: then that is a
    warning and the picture is left out, except where it is the only one.
    """
    records, bad = [], ""
    for number, entry in enumerate(picture_files(name, folder), start=1):
        try:
            width, height = picture_size(
                entry.path, max_pixels=sys.maxsize
            )  # judged when it is read
        except DeploymentError as error:
            bad = f"{error}: repair or remove it"
            if on_bad_image.get(name) != "skip":
                raise UserError(bad) from error
            logger.warning("%s; INPUT.ON_BAD_IMAGE skip: it is left out", bad)
            continue
        records.append(
            {"file_name": entry.path, "height": height, "width": width, "image_id": number}
        )
    if not records:
        raise UserError(f"{KEY}: no picture of {folder} can be read, such as: {bad}")
    return records
