"""Pictures without labels beside the labelled ones (``DATASETS.UNLABELED``): their records, checks and batches."""

import os
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from era.data.datasets import UNLABELED_KEY, coco_files
from era.data.keyed import training_mapper
from era.data.loader import UNLABELED, TrainLoader
from era.data.pictures import check_pictures
from era.data.validation import read_pictures
from era.errors import UserError

KEPT = ("file_name", "height", "width", "image_id")  # of a record; annotations of every kind go


def pictures(key: str, name: str) -> list[dict]:
    """Detectron2's records of a registered set, as far as they describe the pictures.

    In COCO format the annotations are not even looked at. Raises UserError for an unknown name, data that is not
    there and pictures that cannot be read; ``key`` names the config key.
    """
    files = coco_files(key, name)
    records = DatasetCatalog.get(name) if files is None else read_pictures(name, *files)
    return [{part: record[part] for part in KEPT if part in record} for record in records]


def check_unlabeled(cfg: CfgNode, *, opened: bool = False) -> None:
    """The sets of ``DATASETS.UNLABELED`` are there, and none of their files is in a set of ``DATASETS.TEST``.

    With ``opened`` every picture's file is opened too, see `check_pictures`.
    Files count as the same by their path, links resolved, not by content. Raises UserError.
    """
    if len(cfg.DATASETS.UNLABELED) == 0:
        return
    tested = {
        os.path.realpath(record["file_name"]): name
        for name in cfg.DATASETS.TEST
        for record in pictures("DATASETS.TEST", name)
    }
    for name in cfg.DATASETS.UNLABELED:
        records = pictures(UNLABELED_KEY, name)
        if opened:
            check_pictures(cfg, f"dataset {name!r}", records)
        for record in records:
            found = tested.get(os.path.realpath(record["file_name"]))
            if found is not None:
                raise UserError(
                    f"{UNLABELED_KEY} names {name!r}, whose picture {record['file_name']} is also in {found!r} of "
                    "DATASETS.TEST: expected pictures that are not tested on, or the AP says nothing; take them out, "
                    "or test on others"
                )


class MixedLoader:
    """Batches of two infinite loaders, each batch the labelled one's followed by the unlabelled one's.

    Args:
        labeled, unlabeled: loaders of lists of inputs, such as :class:`~era.data.loader.TrainLoader`.
    """

    def __init__(self, labeled, unlabeled):
        self.labeled, self.unlabeled = labeled, unlabeled

    def begin_at(self, seed: int, batch: int) -> None:
        """See :meth:`era.data.loader.TrainLoader.begin_at`."""
        self.labeled.begin_at(seed, batch)
        self.unlabeled.begin_at(seed, batch)

    def __iter__(self) -> Iterator[list[dict]]:
        others = iter(self.unlabeled)
        for batch in self.labeled:
            yield batch + next(others)


def build_mixed_loader(cfg: CfgNode, labeled, total_batch_size: int) -> MixedLoader:
    """Beside a loader of labelled batches one of ``DATASETS.UNLABELED``, each input with ``"unlabeled": True``.

    The pictures of all sets are shuffled together, by a seed of their own, as Detectron2's ``TrainingSampler`` does,
    whatever ``DATALOADER.SAMPLER_TRAIN`` says, for other samplers ask annotations. Both loaders have
    ``DATALOADER.NUM_WORKERS`` processes.

    Args:
        total_batch_size: pictures without labels of one batch over all processes.
    """
    records = [
        record | {"unlabeled": True}
        for name in cfg.DATASETS.UNLABELED
        for record in pictures(UNLABELED_KEY, name)
    ]
    unlabeled = TrainLoader(
        records,
        mapper=training_mapper(cfg, records),
        sampler=lambda found: TrainingSampler(len(found)),
        batch_size=total_batch_size // comm.get_world_size(),
        group_by_shape=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        workers=cfg.DATALOADER.NUM_WORKERS,
        stream=UNLABELED,
        seed=cfg.SEED,
    )
    return MixedLoader(labeled, unlabeled)
