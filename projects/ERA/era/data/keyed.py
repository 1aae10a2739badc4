"""The mapper for training with a cache of the teacher: it says what a picture's pixels are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from fvcore.transforms.transform import (
    HFlipTransform,
    NoOpTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from torch import Tensor

from era.data.pictures import SubstitutingMapper, picture_mapper, with_substitutes
from era.modeling.teacher_cache import is_on
from era.modeling.teacher_cache.cache import PICTURE_KEY, UNKEYED_BY
from era.registry import is_distiller

# What comes again, for it has few outcomes; everything else would fill a cache with what is never asked for again.
KEYED = (NoOpTransform, T.ResizeTransform, HFlipTransform, VFlipTransform)


class KeyedMapper:
    """Another mapper, whose inputs also say ``picture_key``, or ``unkeyed_by`` where an augmentation forbids it.

    The key is the SHA-256 of the picture as the model is given it, after resizing and flips. So it does not matter
    what a file is called, where it lies or how old it is, and two pictures have one key only where a model could not
    tell them apart. Augmentations draw the same random numbers as without.

    Args:
        mapper: Detectron2's mapper or one derived from it; its ``augmentations`` are replaced by ones that also
            note what they did.
    """

    def __init__(self, mapper: DatasetMapper):
        self.mapper = mapper
        mapper.augmentations = self._noted = NotedAugmentations(mapper.augmentations.augs)

    def __call__(self, record: dict) -> dict:
        """The model's input."""
        item = self.mapper(record)
        if self._noted.unkeyed_by is None:
            item[PICTURE_KEY] = pixels_hash(item["image"])
        else:
            item[UNKEYED_BY] = self._noted.unkeyed_by
        return item


class NotedAugmentations(T.AugmentationList):
    """Augmentations in order, and the name of the last picture's first that cannot be keyed.

    Attributes:
        unkeyed_by: None if the last picture was only resized and flipped.
    """

    unkeyed_by: str | None = None

    def __call__(self, aug_input: T.AugInput) -> TransformList:
        """As :class:`AugmentationList`."""
        done, self.unkeyed_by = [], None
        for augmentation in self.augs:
            transform = augmentation(aug_input)
            if self.unkeyed_by is None and not is_keyed(transform):
                self.unkeyed_by = type(augmentation).__name__
            done.append(transform)
        return TransformList(done)


def is_keyed(transform: Transform) -> bool:
    """Whether a transform is a resize, a flip, nothing at all, or some of these in turn."""
    if isinstance(transform, TransformList):
        return all(map(is_keyed, transform.transforms))
    return type(transform) in KEYED


def pixels_hash(image: Tensor) -> str:
    """SHA-256 of an image's type, shape and pixels."""
    digest = hashlib.sha256(f"{image.dtype} {tuple(image.shape)}".encode())
    digest.update(image.contiguous().numpy())
    return digest.hexdigest()


def training_mapper(
    cfg: CfgNode, records: Sequence[dict] = ()
) -> DatasetMapper | KeyedMapper | SubstitutingMapper:
    """The mapper for training, with keys where a teacher's cache asks for them and, where ``INPUT.ON_BAD_IMAGE`` says
    skip, with substitutes for bad pictures out of the dataset's ``records``, if any are given."""
    mapper = picture_mapper(cfg, is_train=True)
    if is_distiller(cfg) and is_on(cfg):
        mapper = KeyedMapper(mapper)
    return with_substitutes(cfg, mapper, records)
