"""Checkpoints are written whole or not at all; the identity of weights."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import Tensor


def save_whole(data: Any, path: str) -> None:
    """``torch.save`` to a file beside ``path``, then rename: a crash leaves the old file intact."""
    try:
        torch.save(data, path + ".partial")
        os.replace(path + ".partial", path)
    finally:
        if os.path.exists(path + ".partial"):
            os.remove(path + ".partial")


def weights_hash(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
