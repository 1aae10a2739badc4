"""``TEST.LOSS``: the student's own losses on the test sets, beside their AP at every evaluation."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from era.data.pictures import MarkingMapper, ReadableLoader, picture_mapper
from era.data.seeds import random_numbers_of
from era.modeling.distiller import Distiller


def validation_losses(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """The mean over all pictures of ``DATASETS.TEST`` of every loss of the student, and of their sum.

    Pictures are scaled as in evaluation, without augmentation; normalisation uses its running statistics. Anchors and
    proposals are sampled by the same random numbers for every picture at every evaluation. A copy of the student
    computes them, so that nothing of training is changed (RetinaNet's loss, for one, keeps a running normaliser).

    Args:
        model: a plain detector or a distiller; its student alone is asked, without the losses of methods.

    Returns:
        By name, such as ``loss_cls``, and ``total_loss``; of pictures that can be read. Empty on processes other than
        the main one, and where there is no picture.
    """
    student = copy.deepcopy(model.student if isinstance(model, Distiller) else model).train()
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    sums, count = Counter(), 0
    # Detectron2 draws pictures into the storage at iteration 0.
    with torch.no_grad(), EventStorage(1), random_numbers_of(0):  # loaders draw too
        for name in cfg.DATASETS.TEST:
            for batch in labeled_test_loader(cfg, name):
                with random_numbers_of(0):
                    losses = student(batch)
                sums.update({key: float(loss) * len(batch) for key, loss in losses.items()})
                count += len(batch)
    parts = comm.gather((sums, count))
    count = sum(part for _, part in parts)
    if not comm.is_main_process() or count == 0:
        return {}
    total = sum((part for part, _ in parts), Counter())
    means = {key: value / count for key, value in total.items()}
    return {**means, "total_loss": sum(means.values())}


def labeled_test_loader(cfg: CfgNode, name: str) -> ReadableLoader:
    """This process's part of a test set, a picture a batch, with its annotations and as evaluation scales it."""
    cfg = cfg.clone()
    cfg.defrost()
    size = cfg.INPUT
    size.MIN_SIZE_TRAIN, size.MAX_SIZE_TRAIN = (size.MIN_SIZE_TEST,), size.MAX_SIZE_TEST
    size.MIN_SIZE_TRAIN_SAMPLING, size.RANDOM_FLIP, size.CROP.ENABLED = "choice", "none", False
    mapper = MarkingMapper(picture_mapper(cfg, is_train=True))
    records = get_detection_dataset_dicts([name], filter_empty=False)
    workers = cfg.DATALOADER.NUM_WORKERS
    return ReadableLoader(build_detection_test_loader(records, mapper=mapper, num_workers=workers))
