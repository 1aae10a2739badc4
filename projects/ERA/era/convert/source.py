"""A checkpoint of another library: its tensors by name, and what it says of the pictures that it was trained on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from era.addresses import is_remote
from era.checkpoint.fetching import fetch
from era.checkpoint.safetensors import load_safetensors
from era.checkpoint.writing import damage
from era.errors import UserError

# Where a training script puts the weights beside its optimiser; the first that is there counts.
NESTED = ("state_dict", "model_state", "model_state_dict", "model", "net")
WRAPPERS = ("module.", "model.")  # what DDP and training scripts put before every name
COUNTER = ".num_batches_tracked"  # of batch norms; nothing is computed from it


@dataclass(frozen=True)
class SourceFile:
    """A checkpoint that was read.

    Attributes:
        path: of the file, after a download.
        weights: tensors by name, in the order of the file, floating-point ones in float32; without wrappers.
        notes: texts that the file holds beside them, such as the config that mmdetection saves.
    """

    path: str
    weights: dict[str, Tensor]
    notes: str


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its pictures, in Detectron2's words.

    Attributes:
        channel_order: ``INPUT.FORMAT``, RGB or BGR.
        mean, std: of each channel in that order, of values from 0 to 255.
        stride_in_1x1: whether a ResNet bottleneck halves in its first 1x1 conv (Caffe's) or in its 3x3 conv.
    """

    channel_order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stride_in_1x1: bool = False


TORCHVISION = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CAFFE = Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)


def read_source(path: str) -> SourceFile:
    """Read a ``.safetensors`` file, or one of ``torch.save``; no pickled code is run.

    Args:
        path: a file or an address, which is downloaded.

    Raises:
        UserError: absent, unreachable, damaged, or no checkpoint of tensors.
    """
    if is_remote(path):
        path = fetch(path, what="--weights")
    if not os.path.isfile(path):
        raise UserError(f"--weights is {path!r}, which is no file: correct the path.")
    if problem := damage(path):
        raise UserError(f"--weights {path!r} is damaged ({problem}): get the file again.")
    is_safetensors = path.endswith(".safetensors")
    content = load_safetensors(path, what="--weights") if is_safetensors else _read_torch(path)
    tensors = content
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            tensors = content[key]
            break
    weights = {
        str(name): value.float() if value.is_floating_point() else value
        for name, value in (tensors.items() if isinstance(tensors, Mapping) else ())
        if isinstance(value, Tensor)
    }
    if not weights:
        raise UserError(
            f"--weights {path!r} holds no tensors by name: expected a state_dict, alone or under one of "
            f"{', '.join(NESTED)}; save it so, with torch.save(model.state_dict(), file)."
        )
    notes = content.get("meta") if isinstance(content, Mapping) else None
    texts = notes.values() if isinstance(notes, Mapping) else ()
    return SourceFile(path, _unwrapped(weights), "\n".join(t for t in texts if isinstance(t, str)))


def preprocessing_of(notes: str) -> Preprocessing:
    """What the config that mmdetection saves with its weights says; torchvision's where it is silent.

    Args:
        notes: of a :class:`SourceFile`; a config in Python, of which single values are read and nothing is run.
    """
    base = CAFFE if re.search(r"style\s*=\s*['\"]caffe['\"]", notes) else TORCHVISION
    mean, std = (_three_numbers(notes, word) for word in ("mean", "std"))
    if mean is None or std is None:
        return base
    flag = re.search(r"\b(?:to_rgb|bgr_to_rgb)\s*=\s*(True|False)", notes)
    is_rgb = flag is None or flag.group(1) == "True"
    return Preprocessing("RGB" if is_rgb else "BGR", mean, std, base.stride_in_1x1)


def _three_numbers(text: str, word: str) -> tuple[float, float, float] | None:
    number = r"\s*([\d.]+)\s*"
    found = re.search(rf"\b{word}\s*=\s*\[{number},{number},{number},?\s*\]", text)
    try:
        return tuple(float(n) for n in found.groups()) if found else None
    except ValueError:
        return None


def _read_torch(path: str) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a file of anything can fail in any way
        raise UserError(
            f"--weights {path!r} cannot be read without running code of the file ({_short(e)}): expected tensors by name, "
            "as torch.save(model.state_dict(), file) writes them; save the weights alone, where you trust the file."
        ) from e


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what stands before all of them alike."""
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in weights):
            return _unwrapped({name[len(prefix) :]: value for name, value in weights.items()})
    return weights


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
