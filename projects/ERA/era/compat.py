"""Detectron2's private functions, all of those that are called here, each behind a public name.

Checked against Detectron2 0.6 at upstream's commit a59f0563 (2024-04-17, the wheel that
``tools/install_detectron2.py`` installs): look here first when another version behaves differently. Two
classes override protected methods of their Detectron2 base, and pass on to it, of the same version:
``SafeCheckpointer`` (``_load_file``, ``_load_model``, ``_torch_load``; fvcore 0.1.5) and ``DetectionEvaluator``
(``_derive_coco_results``); two use a protected attribute of theirs: ``MetricsFile`` (``JSONWriter._last_write``) and
``Trainer`` (``TrainerBase._hooks``).
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data.build import _train_loader_from_config
from detectron2.engine import SimpleTrainer, TrainerBase
from detectron2.engine.hooks import PreciseBN
from detectron2.engine.launch import DEFAULT_TIMEOUT, _distributed_worker, _find_free_port
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.solver import LRMultiplier
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor
from torch.utils.data import Dataset, Sampler


def postprocess(
    results: list[Instances], batched_inputs: list[dict], image_sizes: list[tuple[int, int]]
) -> list[dict]:
    """Raw detections scaled to each image's own size; ``GeneralizedRCNN._postprocess``, a59f0563."""
    return GeneralizedRCNN._postprocess(results, batched_inputs, image_sizes)


def decode_proposals(rpn: RPN, anchors: list[Boxes], deltas: list[Tensor]) -> list[Tensor]:
    """Proposal boxes of every level, (B, H * W * A, 4); ``RPN._decode_proposals``, a59f0563."""
    return rpn._decode_proposals(anchors, deltas)


def next_batch(trainer: SimpleTrainer) -> list[dict]:
    """The trainer's next batch; ``SimpleTrainer._data_loader_iter``, a59f0563."""
    return next(trainer._data_loader_iter)


def training_sampler(cfg: CfgNode, records: Dataset) -> Sampler:
    """The endless order of this process that ``DATALOADER.SAMPLER_TRAIN`` says; all processes must ask together.
    It draws from numpy's global random state; ``_train_loader_from_config``, a59f0563."""
    return _train_loader_from_config(cfg, mapper=lambda record: record, dataset=records)["sampler"]


def precise_bn_loader(hook: PreciseBN):
    """The batches out of which it computes statistics, None if it does not; ``PreciseBN._data_loader``, a59f0563."""
    return getattr(hook, "_data_loader", None)


def schedule_of(scheduler: LRMultiplier) -> ParamScheduler:
    """Of the factor that a scheduler multiplies learning rates by; ``LRMultiplier._multiplier``, a59f0563."""
    return scheduler._multiplier


def set_schedule(scheduler: LRMultiplier, schedule: ParamScheduler) -> None:
    """Put another in its place, which the next step reads; ``LRMultiplier._multiplier``, a59f0563."""
    scheduler._multiplier = schedule


def last_evaluation(trainer: TrainerBase) -> dict | None:
    """What ``DefaultTrainer``'s last evaluation found; ``DefaultTrainer._last_eval_results``, a59f0563."""
    return getattr(trainer, "_last_eval_results", None)


def free_port() -> int:
    """A port of this machine that nobody listens at; ``_find_free_port``, a59f0563."""
    return _find_free_port()


def join_run(
    function: Callable[..., object],
    args: tuple,
    *,
    local_rank: int,
    processes: int,
    machines: int,
    machine_rank: int,
    url: str,
) -> None:
    """Meet the other processes of a run at ``url``, then ``function(*args)``; ``_distributed_worker``, a59f0563.

    Args:
        local_rank: of this process on this machine.
        processes: on each machine.
    """
    world = processes * machines
    _distributed_worker(
        local_rank, function, world, processes, machine_rank, url, args, DEFAULT_TIMEOUT
    )


def cpu_group() -> dist.ProcessGroup:
    """All processes, for tensors on the CPU, which cost no wait for a GPU; ``_get_global_gloo_group``, a59f0563."""
    return comm._get_global_gloo_group()


def leave_process_group() -> None:
    """End this process's part in a run of several, after the others have come as far.

    Detectron2 leaves its process groups to the interpreter's exit, and ``detectron2.utils.comm`` keeps
    references to them (``_LOCAL_PROCESS_GROUP``, the cache of ``_get_global_gloo_group``, a59f0563). Their
    C++ threads must end before: up to Python 3.13 a thread that asks for the interpreter's lock during the
    exit is killed, which aborts the process ("terminate called without an active exception").
    """
    comm.synchronize()
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()  # a DistributedDataParallel in a reference cycle holds its group too
