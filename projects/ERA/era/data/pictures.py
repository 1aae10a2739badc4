"""Picture files of a dataset: opened before training, read in training and evaluation, and what becomes of bad ones
(``INPUT.ON_BAD_IMAGE``)."""

import copy
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.utils.events import get_event_storage, has_event_storage
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails
from tqdm import tqdm

from era.errors import UserError
from era_runtime.errors import DeploymentError
from era_runtime.pictures import MAX_PIXELS, picture_size, read_picture

logger = logging.getLogger(__name__)

KEY = "INPUT.ON_BAD_IMAGE"
SUBSTITUTES = 64  # records of a set that stand by for bad pictures
REPLACES = "replaces"  # in an input: why it stands where another was drawn
REPLACED = "replaced_pictures"  # a scalar: how many so far
UNREADABLE = "unreadable"  # in an input of evaluation that has no image: why
_READERS = 8  # threads: they mostly wait for a disk


class UnreadablePicture(UserError):
    """A picture that could not be used; in training one process of several may meet it, and the others not."""


class BadTestPictures(UserError):
    """Pictures of a test set that could not be used; every process of a run knows of all of them."""


class PictureMapper(DatasetMapper):
    """Detectron2's mapper, which reads pictures by :func:`era_runtime.pictures.read_picture`.

    Attributes:
        max_pixels: INPUT.MAX_IMAGE_PIXELS.
    """

    max_pixels = MAX_PIXELS

    def __call__(self, record: dict) -> dict:
        """The model's input, as ``DatasetMapper``; precomputed proposals are not supported.

        Raises:
            UnreadablePicture: the file cannot be used, or has another size than the record says.
        """
        record = copy.deepcopy(record)
        picture = self._read(record)
        sem_seg = None
        if "sem_seg_file_name" in record:
            path = record.pop("sem_seg_file_name")
            sem_seg = detection_utils.read_image(path, "L").squeeze(2) if self.is_train else None
        seen = T.AugInput(picture, sem_seg=sem_seg)
        transforms = self.augmentations(seen)
        record["image"] = torch.as_tensor(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
        if seen.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(seen.sem_seg.astype("long"))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, seen.image.shape[:2])
        return record

    def _read(self, record: dict) -> np.ndarray:
        try:
            picture = read_picture(record["file_name"], self.max_pixels)
            if problem := size_problem(record, picture.size):
                raise UnreadablePicture(problem)
            pixels = detection_utils.convert_PIL_to_numpy(picture, self.image_format)
        except DeploymentError as error:
            raise UnreadablePicture(f"{error}: repair or remove it") from error
        record["height"], record["width"] = pixels.shape[:2]
        return pixels


class SubstitutingMapper:
    """Another mapper, which puts a readable picture in the place of one that is not.

    Which one follows from the bad picture's path alone, so that it is the same in every process, with any number of
    loader workers and after a resume.

    Args:
        mapper: raises UnreadablePicture.
        records: of the whole dataset; up to :data:`SUBSTITUTES` of them are kept.
    """

    def __init__(self, mapper, records: Sequence[dict]):
        self.mapper = mapper
        self.others = list(records[:: -(-len(records) // SUBSTITUTES)])

    def __call__(self, record: dict) -> dict:
        """The model's input; of a substitute it also says ``replaces``.

        Raises:
            UnreadablePicture: no substitute can be read either.
        """
        try:
            return self.mapper(record)
        except UnreadablePicture as error:
            reason = str(error)
        first = zlib.crc32(os.fsencode(record["file_name"])) % len(self.others)
        for other in (*self.others[first:], *self.others[:first]):
            try:
                return self.mapper(other) | {REPLACES: reason}
            except UnreadablePicture:
                continue
        raise UnreadablePicture(
            f"{reason}; nor can any of {len(self.others)} other pictures be used ({KEY} skip)"
        )


class MarkingMapper:
    """Another mapper for evaluation: a picture that cannot be read becomes an input without ``image`` that says why,
    so that every process gets through its part, and they decide together."""

    def __init__(self, mapper):
        self.mapper = mapper

    def __call__(self, record: dict) -> dict:
        """The model's input, or ``{"unreadable": sentence}``."""
        try:
            return self.mapper(record)
        except UnreadablePicture as error:
            return {UNREADABLE: str(error)}


def picture_mapper(cfg: CfgNode, *, is_train: bool) -> PictureMapper:
    """The mapper that a config asks for."""
    mapper = PictureMapper(cfg, is_train=is_train)
    mapper.max_pixels = cfg.INPUT.MAX_IMAGE_PIXELS
    return mapper


def with_substitutes(cfg: CfgNode, mapper, records: Sequence[dict]):
    """The mapper, with substitutes for bad pictures where ``INPUT.ON_BAD_IMAGE`` says skip."""
    skips = cfg.INPUT.ON_BAD_IMAGE == "skip" and len(records) > 0
    return SubstitutingMapper(mapper, records) if skips else mapper


class WatchedLoader:
    """Another loader for training: what was replaced is named once and counted, and a picture that ends the run is
    named without the traceback of a loader's process.

    The count of this process is in the event storage as ``replaced_pictures`` from the first one on, and nowhere
    else: a checkpoint keeps it with the other scalars, and a run that goes on counts on.

    Args:
        loader: of lists of inputs, such as :class:`~era.data.loader.TrainLoader`. A process of it that was killed is
            a RuntimeError that says so, also where it died in the middle of a batch.
    """

    def __init__(self, loader: Iterable[list[dict]]):
        self.loader = loader
        self._told: set[str] = set()

    def begin_at(self, seed: int, batch: int) -> None:
        """See :meth:`era.data.loader.TrainLoader.begin_at`."""
        self.loader.begin_at(seed, batch)

    def __iter__(self) -> Iterator[list[dict]]:
        try:
            for batch in self.loader:
                for item in batch:
                    self._watch(item.pop(REPLACES, None))
                yield batch
        except UnreadablePicture as error:  # out of a worker process it comes with a traceback
            sentence = str(error).strip().splitlines()[-1]
            sentence = sentence.rpartition("UnreadablePicture: ")[2] or sentence
            hint = "" if KEY in sentence else f", or set {KEY} skip to go on without it"
            raise UnreadablePicture(sentence + hint) from error
        except (EOFError, ConnectionError, FileNotFoundError):
            raise_if_killed()
            raise

    def _watch(self, reason: str | None) -> None:
        if reason is None:
            return
        if has_event_storage():
            storage = get_event_storage()
            before, _ = storage.latest().get(REPLACED, (0, 0))
            storage.put_scalar(REPLACED, before + 1, smoothing_hint=False)
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("%s; %s skip: another one takes its place", reason, KEY)


def raise_if_killed(seconds: float = 5.0) -> None:
    """Where a process of torch's data loader was killed, or is within this time found to be: torch looks at them only when no
    batch comes, and one that dies while it hands over a batch breaks the connection first.

    Raises:
        RuntimeError: torch's, with its number and the signal.
    """
    end = time.monotonic() + seconds
    while True:
        _error_if_any_worker_fails()
        if time.monotonic() > end:
            return
        time.sleep(0.05)


class ReadableLoader:
    """Another loader for evaluation, of one input a batch, without those that have no image.

    Attributes:
        bad: why, of this process's part, a sentence each.
    """

    def __init__(self, loader):
        self.loader = loader
        self.bad: list[str] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self.loader:
            self.bad += [item[UNREADABLE] for item in batch if UNREADABLE in item]
            if readable := [item for item in batch if UNREADABLE not in item]:
                yield readable


def check_pictures(cfg: CfgNode, at: str, records: Sequence[dict]) -> None:
    """Open every picture's file and compare its size with its record's; nothing is decoded.

    Args:
        at: names the dataset in a message.
        records: ``file_name`` (whole path), ``width`` and ``height``.

    Raises:
        UserError: with ``INPUT.ON_BAD_IMAGE stop`` one cannot be used; with skip that is a warning, unless none can.
    """
    limit = cfg.INPUT.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda record: file_problem(record, limit), records, chunksize=64)
        problems = list(tqdm(found, total=len(records), desc="pictures", disable=None, delay=2))
    problems = [problem for problem in problems if problem]
    if not problems:
        return
    message = (
        f"{at}: {len(problems)} of {len(records)} pictures cannot be used, first: {problems[0]}"
    )
    if cfg.INPUT.ON_BAD_IMAGE == "skip" and len(problems) < len(records):
        logger.warning("%s; %s skip: the run goes on without them", message, KEY)
        return
    raise UserError(
        f"{message}; repair them or their annotations, or set {KEY} skip to go on without them"
    )


def file_problem(record: dict, max_pixels: int) -> str | None:
    """Why a record's picture cannot be used, as far as the file's head tells; None if it can."""
    try:
        return size_problem(record, picture_size(record["file_name"], max_pixels))
    except DeploymentError as error:
        return str(error)


def size_problem(record: dict, size: tuple[int, int]) -> str | None:
    """How a picture's size (width, height) disagrees with its record, None if it does not."""
    expected = record.get("width", size[0]), record.get("height", size[1])
    if expected == size:
        return None
    turned = " (the file's EXIF may turn it)" if expected == size[::-1] else ""
    return (
        f"the picture {record['file_name']} has {size[0]} x {size[1]} pixels and its annotation says "
        f"{expected[0]} x {expected[1]}{turned}: correct the one or the other"
    )
