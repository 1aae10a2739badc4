"""Files of the package safetensors, which hold tensors by name and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from era.checkpoint.writing import PARTIAL, cannot_be_written, remove
from era.errors import UserError


def load_safetensors(path: str, *, what: str = "weights") -> dict[str, Tensor]:
    """Tensors by name.

    Args:
        what: names the source of the path in a message.

    Raises:
        UserError: the package is absent, or the file cannot be read.
    """
    package = _package(f"{what} {path!r}")
    try:
        return package.load_file(path)
    except Exception as e:  # a file of anything can fail in any way
        reason = " ".join(str(e).split())[:160] or type(e).__name__
        raise UserError(
            f"{what} {path!r} is no safetensors file that can be read ({reason}): get the file again."
        ) from e


def save_safetensors(weights: Mapping[str, Tensor], path: str, *, what: str) -> None:
    """Write tensors, whole or not at all.

    Args:
        what: names the option that asks for it in a message.

    Raises:
        UserError: the package is absent, or the file cannot be written.
    """
    package = _package(what)
    try:
        try:
            with open(path + PARTIAL, "wb") as file:
                file.write(package.save({name: t.contiguous() for name, t in weights.items()}))
            os.replace(path + PARTIAL, path)
        finally:
            remove(path + PARTIAL)
    except OSError as e:
        raise cannot_be_written(path, e) from e


def _package(what: str) -> ModuleType:
    """``safetensors.torch``, which is optional.

    Args:
        what: needs it, for the message.
    """
    try:
        import safetensors.torch
    except ImportError as e:
        raise UserError(
            f"{what} needs the package safetensors, which cannot be imported ({e}): install it (pip install safetensors, or this "
            "package's extra timm)."
        ) from e
    return safetensors.torch
