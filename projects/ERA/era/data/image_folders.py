"""Folders of pictures as registered sets without annotations (``DATASETS.IMAGE_FOLDERS``)."""

import functools
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from era.errors import UserError

KEY = "DATASETS.IMAGE_FOLDERS"
PARTS = ("name", "folder")  # of an entry
SUFFIXES = (".jpg", ".jpeg", ".png")
_ORIENTATION = 0x0112  # EXIF; values from 5 on turn a picture on its side
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

    Of every picture the head is read, for its size as Detectron2 will see it (turned as EXIF says). Raises
    UserError as `picture_files`, and for a picture that is none.
    """
    records = []
    for number, entry in enumerate(picture_files(name, folder), start=1):
        try:
            with Image.open(entry.path) as picture:
                width, height = picture.size
                if _is_turned(picture):
                    width, height = height, width
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(unreadable(entry.path, error)) from error
        records.append(
            {"file_name": entry.path, "height": height, "width": width, "image_id": number}
        )
    return records


def _is_turned(picture: Image.Image) -> bool:
    try:
        return picture.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF raises whatever it likes; Detectron2 does not turn it then
        return False


def unreadable(path: str, error: Exception) -> str:
    """One sentence about a picture that cannot be read."""
    reason = " ".join(str(error).replace(repr(path), "it").split())[:200] or type(error).__name__
    return f"the picture {path} cannot be read ({reason}): repair or remove it"
