"""The devices and the memory of this machine against what the run asks for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

import torch

from era.devices import MPS, gpu_name
from era.doctor.case import OK, WARNING, WRONG, Case, Finding, plural
from era.engine.preflight import check_devices
from era.environment import machine

GIB = 2**30
SHARED_MEMORY = "/dev/shm"
BUSY = 0.1  # of a GPU's memory: more than that is somebody's work
PREFETCHED = 2  # batches that each worker of a loader holds ready, PyTorch's default


def check(case: Case) -> Finding:
    """Raises UserError if there are fewer devices than asked for."""
    check_devices(case.cfg, case.args.num_gpus)
    about = machine()
    problems = _gpus(case) if case.on_gpu else _processors(case, about["cpu_cores"])
    problems += _shared_memory(case)
    if case.on_gpu:
        names = {torch.cuda.get_device_name(i) for i in range(case.args.num_gpus)}
        words = f"{plural(case.args.num_gpus, 'GPU')} ({', '.join(sorted(names))})"
    else:
        words = (
            f"{case.args.num_gpus} process(es) on "
            f"{plural(about['cpu_cores'], 'core')} of {about['cpu']}"
        )
        if case.on_mps:
            words = f"{gpu_name(MPS)}, with {words}"
    status = max((s for s, _ in problems), key=(OK, WARNING, WRONG).index, default=OK)
    sentence = "; ".join([words, *(text for _, text in problems)])
    return Finding(status, sentence, {"machine": about})


def covers(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a torch compiled for these (``sm_80``, ``compute_90``) has kernels for a GPU.

    Machine code runs within its major version on the same and later minor ones; ``compute`` code is compiled on any
    later GPU.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        if not digits:
            continue
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and (major, minor) <= capability:
            return True
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return False


def _gpus(case: Case) -> list[tuple[str, str]]:
    found = []
    for index in range(case.args.num_gpus):
        capability = torch.cuda.get_device_capability(index)
        name = f"GPU {index} ({torch.cuda.get_device_name(index)})"
        architectures = torch.cuda.get_arch_list()
        if not covers(architectures, capability):
            found.append(
                (
                    WRONG,
                    f"{name} has compute capability {capability[0]}.{capability[1]}, and this torch was compiled for "
                    f"{', '.join(architectures)}: install one for that GPU",
                )
            )
            continue
        free, total = torch.cuda.mem_get_info(index)
        if total - free > BUSY * total + GIB:  # 1 GiB for this process's own context
            found.append(
                (
                    WARNING,
                    f"on {name} {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are taken already: another program "
                    "uses it",
                )
            )
    return found


def _processors(case: Case, cores: int) -> list[tuple[str, str]]:
    found = [(WARNING, sentence.rstrip(".")) for sentence in case.told]
    if torch.version.cuda is not None and shutil.which("nvidia-smi"):
        found.append(
            (
                WARNING,
                "there is a driver of NVIDIA, but torch finds no GPU: see what nvidia-smi says",
            )
        )
    if case.args.num_gpus > cores:
        found.append((WARNING, f"{case.args.num_gpus} processes share {cores} core(s)"))
    return found


def _shared_memory(case: Case) -> list[tuple[str, str]]:
    """Loader workers hand pictures over in shared memory, of which a container has 64 MB if nobody asks for more."""
    cfg, workers = case.cfg, case.cfg.DATALOADER.NUM_WORKERS
    if workers == 0 or not os.path.isdir(SHARED_MEMORY):
        return []
    images = cfg.SOLVER.IMS_PER_BATCH // case.processes // cfg.SOLVER.ACCUMULATION_STEPS
    picture = 3 * max(cfg.INPUT.MIN_SIZE_TRAIN) * cfg.INPUT.MAX_SIZE_TRAIN  # bytes
    needed = case.args.num_gpus * workers * PREFETCHED * images * picture
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free >= needed:
        return []
    return [
        (
            WARNING,
            f"{SHARED_MEMORY} has {free / GIB:.2f} GiB free, and {workers} loader workers a process may hold "
            f"{needed / GIB:.2f} GiB there: give the container more (docker --shm-size), or lower "
            "DATALOADER.NUM_WORKERS",
        )
    ]
