"""Whether a run's checkpoints will fit on the disk."""

from __future__ import annotations

import glob
import os
import shutil
from dataclasses import dataclass

from detectron2.config import CfgNode
from torch import nn

from era.engine.ema import averaged_tensors
from era.errors import UserError
from era.modeling.distiller import Distiller

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Room:
    """Bytes that a run's files take beside each other, and bytes that are free for them.

    Attributes:
        checkpoint: of one training checkpoint: weights, BatchNorm's statistics, the optimiser's momentum, one
            number for each weight that is trained, and what training goes on with beside an average.
        count: of those, at most, at a time.
        weights: of the files with weights alone: the plain student, and the best weights where they are kept.
        free: on the disk of the folder, with what checkpoints that lie in the folder already take.
    """

    folder: str
    checkpoint: int
    count: int
    weights: int
    free: int

    @property
    def needed(self) -> int:
        """All of them."""
        return self.checkpoint * self.count + self.weights

    def words(self) -> str:
        """One phrase, without the folder."""
        return (
            f"{in_words(self.needed)} for {self.count} checkpoint(s) of {in_words(self.checkpoint)} and the student, "
            f"{in_words(self.free)} free"
        )


def room_for(cfg: CfgNode, model: nn.Module) -> Room:
    """What a run's checkpoints take, with the settings that say how many are kept.

    Logs, metrics and detections are small beside them and not counted.

    Args:
        model: what is trained, built.
    """
    state = _bytes_of(model.state_dict().values())
    trained = _bytes_of(p for p in model.parameters() if p.requires_grad)
    student = model.student if isinstance(model, Distiller) else model
    weights = _bytes_of(student.state_dict().values())
    if cfg.TEST.BEST_METRIC and cfg.TEST.EVAL_PERIOD > 0:
        weights += state
    period, kept = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_KEPT
    periodic = cfg.SOLVER.MAX_ITER // period if period > 0 else 0
    # Beside those that stay: the last one, or the next periodic one, after which the oldest goes.
    count = (min(periodic, kept) if kept else periodic) + 1
    there = glob.glob(os.path.join(glob.escape(cfg.OUTPUT_DIR), "model_*.pth"))
    free = free_bytes(cfg.OUTPUT_DIR) + sum(map(os.path.getsize, there))
    beside = _bytes_of(averaged_tensors(model).values()) if cfg.MODEL.EMA.ENABLED else 0
    return Room(cfg.OUTPUT_DIR, state + trained + beside, count, weights, free)


def check_room(cfg: CfgNode, model: nn.Module) -> Room:
    """What the run's checkpoints take fits on the disk.

    Raises:
        UserError: it does not.
    """
    room = room_for(cfg, model)
    if room.free < room.needed:
        raise UserError(
            f"OUTPUT_DIR {room.folder} is on a disk with too little room ({room.words()}): expected as much as is "
            "needed; make room, name another OUTPUT_DIR, or keep fewer checkpoints (a larger SOLVER.CHECKPOINT_PERIOD)."
        )
    return room


def in_words(number: int) -> str:
    """Bytes in GiB, small numbers in MiB."""
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / MIB:.1f} MiB"


def free_bytes(folder: str) -> int:
    """Bytes that this user may still write on the disk of a folder, which need not be there yet."""
    parent = os.path.abspath(folder)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    return shutil.disk_usage(parent).free


def _bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
