"""Whether what is to be written is finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from era.devices import widest_float


@torch.no_grad()
def largest(tensors: Sequence[Tensor]) -> list[float]:
    """The largest absolute value of each tensor, NaN where one is in it, 0 of an empty one; one wait for each device."""
    found = [0.0] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel() > 0:
            by_device.setdefault(tensor.device, []).append(i)
    for places in by_device.values():
        norms = [torch.linalg.vector_norm(tensors[i].detach(), float("inf")) for i in places]
        wide = [norm.to(widest_float(norm.device)) for norm in norms]
        for i, value in zip(places, torch.stack(wide).tolist(), strict=True):
            found[i] = value
    return found


def check_finite(data: Any, path: str) -> None:
    """Every floating-point tensor of a checkpoint's content is finite.

    Args:
        data: mappings and sequences of anything.
        path: where it is to be written, for the message.

    Raises:
        FloatingPointError: names the first tensor that is not, and how many there are.
    """
    named = list(_tensors(data, ""))
    sizes = largest([tensor for _, tensor in named])
    bad = [name for (name, _), size in zip(named, sizes, strict=True) if not math.isfinite(size)]
    if bad:
        raise FloatingPointError(
            f"{path} is not written, for {bad[0]} is not finite ({len(bad)} of {len(named)} tensors are not)"
        )


def _tensors(data: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(data, Tensor):
        if data.is_floating_point():
            yield name, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _tensors(value, f"{name}.{key}".lstrip("."))
    elif isinstance(data, (list, tuple)):
        for i, value in enumerate(data):
            yield from _tensors(value, f"{name}.{i}")
