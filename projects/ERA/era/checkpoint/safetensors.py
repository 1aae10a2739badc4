"""Files of the package safetensors, which hold tensors by name and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping

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
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise UserError(f"{what} {path!r} {_needs_package(e)}") from e
    try:
        return load_file(path)
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
    try:
        from safetensors.torch import save
    except ImportError as e:
        raise UserError(f"{what} {_needs_package(e)}") from e
    try:
        try:
            with open(path + PARTIAL, "wb") as file:
                file.write(save({name: t.contiguous() for name, t in weights.items()}))
            os.replace(path + PARTIAL, path)
        finally:
            remove(path + PARTIAL)
    except OSError as e:
        raise cannot_be_written(path, e) from e


def _needs_package(error: ImportError) -> str:
    return (
        f"needs the package safetensors, which cannot be imported ({error}): install it (pip install safetensors, or this "
        "package's extra timm)."
    )
