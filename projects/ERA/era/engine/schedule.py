"""The recipe on the processes at work: linear scaling, accumulation, mixed precision; schedules that can be shortened."""

from __future__ import annotations

import logging

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler

from era import compat
from era.errors import UserError

logger = logging.getLogger(__name__)


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The type of mixed precision that the config asks for, None for none."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    if cfg.SOLVER.AMP.DTYPE != "auto":
        return getattr(torch, cfg.SOLVER.AMP.DTYPE)
    return torch.bfloat16 if cfg.MODEL.DEVICE == "cpu" else torch.float16


def scale_to_world(cfg: CfgNode, world_size: int) -> CfgNode:
    """Detectron2's linear scaling from ``SOLVER.REFERENCE_WORLD_SIZE`` processes to those at work.

    Accumulated batches count as processes: one GPU with ``SOLVER.ACCUMULATION_STEPS 8`` follows an
    8-GPU recipe unchanged. ``SOLVER.UNLABELED_PER_BATCH`` keeps its part of a batch, ``MODEL.EMA.DECAY`` the pictures
    that it spans. What changed is logged.

    Raises:
        UserError: the reference does not divide the batch, or the batch cannot be split evenly.
    """
    workers = world_size * cfg.SOLVER.ACCUMULATION_STEPS
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference < 0 or (reference > 0 and cfg.SOLVER.IMS_PER_BATCH % reference):
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}: expected a divisor of SOLVER.IMS_PER_BATCH "
            f"({cfg.SOLVER.IMS_PER_BATCH}), or 0 for no scaling; change one of the two."
        )
    has_unlabeled = len(cfg.DATASETS.UNLABELED) > 0
    if has_unlabeled and reference > 0 and cfg.SOLVER.UNLABELED_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.UNLABELED_PER_BATCH is {cfg.SOLVER.UNLABELED_PER_BATCH}, which "
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} does not divide: change one of the two."
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, workers)
    if scaled is not cfg:
        scaled.defrost()
        if has_unlabeled:
            scaled.SOLVER.UNLABELED_PER_BATCH = (
                cfg.SOLVER.UNLABELED_PER_BATCH // reference * workers
            )
        scaled.MODEL.EMA.DECAY = cfg.MODEL.EMA.DECAY ** (workers / reference)
        if cfg.is_frozen():
            scaled.freeze()
    if scaled.SOLVER.IMS_PER_BATCH % workers:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {scaled.SOLVER.IMS_PER_BATCH} images an optimiser step, which "
            f"{world_size} process(es) with SOLVER.ACCUMULATION_STEPS {cfg.SOLVER.ACCUMULATION_STEPS} cannot "
            "share evenly: make it a multiple of their product."
        )
    if has_unlabeled and scaled.SOLVER.UNLABELED_PER_BATCH % workers:
        raise UserError(
            f"SOLVER.UNLABELED_PER_BATCH is {scaled.SOLVER.UNLABELED_PER_BATCH} pictures an optimiser step, which "
            f"{world_size} process(es) with SOLVER.ACCUMULATION_STEPS {cfg.SOLVER.ACCUMULATION_STEPS} cannot "
            "share evenly: make it a multiple of their product."
        )
    if scaled is not cfg:
        keys = (
            "IMS_PER_BATCH",
            *(["UNLABELED_PER_BATCH"] if has_unlabeled else []),
            "BASE_LR",
            "MAX_ITER",
            "STEPS",
            "WARMUP_ITERS",
            "CHECKPOINT_PERIOD",
        )
        changes = ", ".join(f"{k} {cfg.SOLVER[k]} -> {scaled.SOLVER[k]}" for k in keys)
        if cfg.MODEL.EMA.ENABLED:
            changes += f", MODEL.EMA.DECAY {cfg.MODEL.EMA.DECAY} -> {scaled.MODEL.EMA.DECAY:.6g}"
        logger.info(
            "SOLVER.REFERENCE_WORLD_SIZE %d, at work %d process(es) x %d accumulated batches: %s, "
            "TEST.EVAL_PERIOD %d -> %d",
            reference, world_size, cfg.SOLVER.ACCUMULATION_STEPS, changes,
            cfg.TEST.EVAL_PERIOD, scaled.TEST.EVAL_PERIOD,
        )  # fmt: skip
    return scaled


class Shortened(ParamScheduler):
    """A schedule whose rest can be gone through in fewer iterations, without a jump: from there on the part of it that is
    done grows faster, evenly up to the end. Never shortened it gives the very numbers of the schedule.

    Args:
        schedule: factor of the learning rate by the part that is done, 0 to 1.
        iterations: of the whole.

    Attributes:
        knots: ``[iteration, part done]``, the first ``[0, 0.0]`` and the last ``[end, 1.0]``, even in between.
    """

    def __init__(self, schedule: ParamScheduler, iterations: int):
        self.schedule, self.iterations = schedule, iterations
        self.knots: list[list] = [[0, 0.0], [iterations, 1.0]]

    @classmethod
    def wrap(cls, scheduler: LRMultiplier, iterations: int) -> Shortened:
        """Put one in the place of a scheduler's schedule."""
        shortened = cls(compat.schedule_of(scheduler), iterations)
        compat.set_schedule(scheduler, shortened)
        return shortened

    def __call__(self, where: float) -> float:
        """The factor, by iteration divided by those of the whole."""
        if self.is_shortened:
            where = self.part_done(where * self.iterations)
        return self.schedule(where)

    @property
    def end(self) -> int:
        """Iterations until it is done."""
        return self.knots[-1][0]

    @property
    def is_shortened(self) -> bool:
        """Whether its end was ever moved."""
        return len(self.knots) > 2

    def part_done(self, iteration: float) -> float:
        """Part of the schedule that is done after so many iterations, 0 to 1."""
        return float(np.interp(iteration, *zip(*self.knots, strict=True)))

    def end_at(self, end: int, now: int) -> None:
        """From ``now`` on the rest is gone through until ``end``, in iterations; at once where that is now."""
        before = [knot for knot in self.knots if knot[0] < now]
        self.knots = [*before, [now, self.part_done(now)], [end, 1.0]]

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"iterations": self.iterations, "knots": self.knots}

    def load_state_dict(self, state: dict) -> bool:
        """Inverse of :meth:`state_dict`.

        Returns:
            Whether the state is of a schedule of this length; else nothing is changed.

        Raises:
            ValueError: it is of another form.
        """
        match state:
            case {"iterations": int(iterations), "knots": [[0, 0.0], *_, [int(), 1.0]] as knots}:
                pass
            case _:
                raise ValueError("its shortened schedule is of another form")
        good = all(isinstance(k, list) and list(map(type, k)) == [int, float] for k in knots)
        if not good or not np.all(np.diff(knots, axis=0) >= 0):  # NaN neither
            raise ValueError("its shortened schedule is of another form")
        if iterations != self.iterations:
            return False
        self.knots = knots
        return True
