"""The cache: what is asked for, what is kept, and what that saves."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from detectron2.config import CfgNode
from torch import Tensor

from era.devices import wait_for_gpus
from era.modeling.teacher_cache.entry import Entry
from era.modeling.teacher_cache.folder import FolderStore
from era.modeling.teacher_cache.memory import MemoryStore

logger = logging.getLogger(__name__)

OFF, MEMORY = "off", "memory"  # MODEL.TEACHER.CACHE; anything else is a folder
GIB = 1 << 30
# What a mapper says of a picture (era.data.keyed): what its pixels are, or which augmentation forbids a key.
PICTURE_KEY, UNKEYED_BY = "picture_key", "unkeyed_by"


class Store(Protocol):
    """Where entries are kept, within a budget; the least recently used leaves first."""

    where: str
    budget: int

    @property
    def held(self) -> int:
        """Bytes of the entries."""

    def get(self, key: str) -> Entry | None:
        """The entry of a key, now the most recently used, or None."""

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry if it fits at all."""


class TeacherCache:
    """Tensors by name that a frozen teacher computes of one picture, by key.

    Every process has its own figures, and with a :class:`MemoryStore` its own entries.

    Args:
        store: where entries are kept.
        half: whether float32 values may be kept in float16.

    Attributes:
        asked, served: pictures that were asked for, and those of them that needed no computation.
        saved_seconds: what the served ones took to compute when they were, less the time of keeping and finding.
    """

    def __init__(self, store: Store, *, half: bool = False):
        self.store, self.half = store, half
        self.asked = self.served = 0
        self.saved_seconds = 0.0
        self._said: set[str] = set()

    def keys(self, batched_inputs: Sequence[dict], *scope: object) -> list[str | None]:
        """A key for every picture; None, with one line in the log a reason, for one that cannot have a key.

        Args:
            batched_inputs: inputs of a mapper that says :data:`PICTURE_KEY` or :data:`UNKEYED_BY`.
            scope: whatever else the answer depends on, equal where it is equal in another run.
        """
        found = []
        for item in batched_inputs:
            picture = item.get(PICTURE_KEY)
            if picture is None:
                self._say_bypassed(item.get(UNKEYED_BY, "a mapper that notes no keys"))
            text = repr((picture, *scope))
            found.append(None if picture is None else hashlib.sha256(text.encode()).hexdigest())
        return found

    def get_or_compute(
        self,
        keys: Sequence[str | None],
        compute: Callable[[list[int]], list[dict[str, Tensor]]],
        *,
        whole: bool,
    ) -> list[dict[str, Tensor]]:
        """Named tensors for every key, out of the store where they are there.

        Args:
            keys: one a picture; what has None is computed and not kept.
            compute: from positions in ``keys`` to what belongs there, position by position.
            whole: compute all positions as soon as one is missing, for a computation whose last bits depend on how
                many pictures it is given; the number then belongs to the keys.

        Returns:
            For every key its tensors; those of the store are on the CPU and must not be written to.
        """
        start = time.perf_counter()
        kept = [self.store.get(key) if key is not None else None for key in keys]
        missing = [i for i, entry in enumerate(kept) if entry is None]
        if missing and whole:
            missing = list(range(len(keys)))
        found = [{} if entry is None else entry.tensors for entry in kept]
        computing = 0.0
        if missing:
            wait_for_gpus()
            before = time.perf_counter()
            computed = compute(missing)
            wait_for_gpus()
            computing = time.perf_counter() - before
            for i, tensors in zip(missing, computed, strict=True):
                found[i] = tensors
                if keys[i] is not None and kept[i] is None:
                    own = {name: _kept_copy(value) for name, value in tensors.items()}
                    self.store.put(keys[i], Entry(own, computing / len(missing)))
        served = set(range(len(keys))) - set(missing)
        self.asked += len(keys)
        self.served += len(served)
        overhead = time.perf_counter() - start - computing
        self.saved_seconds += sum(kept[i].seconds for i in served) - overhead
        return found

    def packed(self, value: Tensor) -> Tensor:
        """A tensor as it is to be kept: with ``half``, float32 in float16 if all of it is in float16's range."""
        if not self.half or value.dtype != torch.float32:
            return value
        half = value.half()
        return half if half.isfinite().all() else value

    @property
    def hit_rate(self) -> float:
        """Served of asked pictures, 0 before the first."""
        return self.served / max(self.asked, 1)

    def figures(self) -> dict[str, float]:
        """For the event storage, since the process began: hits a picture, milliseconds saved (below 0 while it only
        costs), GiB held."""
        return {
            "teacher_cache/hit_rate": self.hit_rate,
            "teacher_cache/saved_ms": self.saved_seconds * 1000,
            "teacher_cache/gib": self.store.held / GIB,
        }

    def summary(self) -> str:
        """:meth:`figures` as a sentence."""
        return (
            f"Teacher cache ({self.store.where}): {self.served} of {self.asked} pictures served ({self.hit_rate:.1%}), "
            f"{self.saved_seconds:.1f} s saved, {self.store.held / GIB:.3g} of {self.store.budget / GIB:g} GiB held."
        )

    def _say_bypassed(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning(
                "Teacher cache: pictures that went through %s have no key and are computed every time "
                "(said once; keys allow for resizing and flips).",
                reason,
            )


def is_on(cfg: CfgNode) -> bool:
    """Whether a config asks for a cache."""
    return cfg.MODEL.TEACHER.CACHE != OFF


def cache_folder(cfg: CfgNode) -> str | None:
    """The folder that ``MODEL.TEACHER.CACHE`` names, if it names one."""
    where = cfg.MODEL.TEACHER.CACHE
    return None if where in (OFF, MEMORY) else where


def build_teacher_cache(cfg: CfgNode) -> TeacherCache | None:
    """The cache that ``MODEL.TEACHER.CACHE`` asks for; None for none.

    Raises:
        UserError: a folder that cannot be written.
    """
    if not is_on(cfg):
        return None
    keys, folder = cfg.MODEL.TEACHER, cache_folder(cfg)
    budget = int(keys.CACHE_GIB * GIB)
    store = MemoryStore(budget) if folder is None else FolderStore(folder, budget)
    return TeacherCache(store, half=keys.CACHE_DTYPE == "float16")


def _kept_copy(value: Tensor) -> Tensor:
    """A copy of a tensor's own, contiguous and on the CPU, whatever it is a view of."""
    return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
