"""What several methods are built from."""

from __future__ import annotations

import logging
import math

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from era.checkpoint.part import load_part
from era.config import student_config
from era.modeling.detectors import known_family
from era.modeling.teacher import Teacher

NORMS = ("BN", "SyncBN", "GN")  # what norm_layer makes
logger = logging.getLogger(__name__)


def norm_layer(name: str, channels: int, momentum: float = 0.1) -> nn.Module:
    """A norm over maps of these channels, with gain and shift.

    Args:
        name: one of :data:`NORMS`; GN has at most 32 groups, of at least 8 channels.
        momentum: of the running statistics of BN and SyncBN.

    Raises:
        ValueError: an unknown name.
    """
    if name == "BN":
        return nn.BatchNorm2d(channels, momentum=momentum)
    if name == "SyncBN":
        return nn.SyncBatchNorm(channels, momentum=momentum)
    if name == "GN":
        return nn.GroupNorm(math.gcd(32, max(channels // 8, 1), channels), channels)
    raise ValueError(f"norm is {name!r}: expected one of {', '.join(NORMS)}")


def load_frozen_part(
    module: nn.Module, path: str, prefix: str, *, what: str, teacher: Teacher
) -> None:
    """Fill a part that an earlier run trained, :func:`~era.checkpoint.part.load_part`, and freeze it.

    Where the teacher has random weights (``MODEL.TEACHER.ALLOW_RANDOM``, as in benchmarks), a part that is not named
    has too, with a warning.

    Raises:
        UserError: see there.
    """
    if path or teacher.source["weights"]:
        load_part(module, path, prefix, what=what, teacher=teacher.sha256)
    else:
        logger.warning("Like the teacher, what %s would name has RANDOM weights.", what)
    module.requires_grad_(False)


def parts_of_student(cfg: CfgNode) -> tuple[str, ...]:
    """Parts of the heads of the student's family, as far as the config tells; a teacher whose heads judge has the same."""
    family = known_family(student_config(cfg))
    return family.parts if family else ()


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of what every process has, in place; with one process nothing."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(values)
        values /= comm.get_world_size()
    return values
