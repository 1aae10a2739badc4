"""Models of Detectron2's LazyConfig: a Python file whose ``model`` is built by ``instantiate``.

ViTDet, Swin and MViTv2 are described only so in Detectron2. Such a file is code that is run when it is read, so nothing reads
one without a key that says it is trusted. The config of a detector (``CfgNode``) that is built so has the meta-architecture
:data:`LAZY`, and says of the model, in the keys of its family, what the rest of the program asks a config for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.registry import locate
from torch import nn

from era.config import find_config_file
from era.errors import UserError
from era.modeling.detectors import DETECTOR_FAMILIES
from era.registry import LAZY


def is_python(config_file: str) -> bool:
    """Whether a config file is a LazyConfig in Python."""
    return config_file.endswith(".py")


def read_lazy(
    config_file: str, opts: Sequence[str], *, trusted: bool, trust: str, what: str
) -> Any:
    """Run a LazyConfig and take over what it says.

    Args:
        config_file: a path, or a name in Detectron2's model zoo.
        opts: overrides as ``model.roi_heads.num_classes=3``.
        trusted: whether it may be run.
        trust: the setting that says so, for messages.
        what: the key or option that names the file, for messages.

    Returns:
        Detectron2's ``DictConfig`` of the file, with a ``model``.

    Raises:
        UserError: it is not trusted, there is no such file, it fails, or it has no ``model``.
    """
    if not trusted:
        raise UserError(
            f"{what} {config_file} is a LazyConfig, Python code that is run when it is read: expected {trust} beside it; look "
            "at the file and what it imports, and set that if you trust them."
        )
    path = find_config_file(config_file, what=what)
    try:
        found = LazyConfig.load(path)
    except Exception as e:  # code of anybody's
        raise UserError(
            f"{what} {config_file} cannot be run ({type(e).__name__}: {_first_line(e)}): expected a LazyConfig of Detectron2; "
            "correct the file."
        ) from e
    try:
        found = LazyConfig.apply_overrides(found, [str(opt) for opt in opts])
    except Exception as e:
        raise UserError(
            f"overrides {list(opts)} do not fit {what} {config_file} ({_first_line(e)}): expected texts such as "
            "'model.roi_heads.num_classes=3'; correct them."
        ) from e
    if not isinstance(found.get("model"), Mapping) or "_target_" not in found.model:
        raise UserError(
            f"{what} {config_file} has no model to build: expected a LazyConfig with `model = L(GeneralizedRCNN)(...)` or "
            "the like; name such a file."
        )
    return found


def lazy_overrides(found: Any, config_file: str, opts: Sequence[str], *, what: str) -> list:
    """What a LazyConfig that is trusted says of its model, as overrides of a config with the meta-architecture :data:`LAZY`.

    Args:
        found: of :func:`read_lazy`.

    Returns:
        ``[KEY, VALUE, ...]``.

    Raises:
        UserError: the model is of no known family.
    """
    node = found.model
    target = node["_target_"]
    target = locate(target) if isinstance(target, str) else target
    families = [own for _, own in DETECTOR_FAMILIES if own.lazy_keys(target, node) is not None]
    if not families:
        raise UserError(
            f"{what} {config_file} builds a {getattr(target, '__name__', target)}: expected a detector of a known family, "
            "such as a GeneralizedRCNN; name another config."
        )
    family = max(families, key=lambda own: len(own.__mro__))
    text = repr(_plain(node)).encode()
    said = {
        "CONFIG_FILE": config_file,
        "OPTS": list(opts),
        "TRUST": True,
        "META_ARCHITECTURE": family.meta_architecture,
        "SHA256": f"sha256:{hashlib.sha256(text).hexdigest()}",  # no text that could be read as a number
    }
    keys = [part for key, value in said.items() for part in (f"MODEL.LAZY.{key}", value)]
    return [
        *keys,
        *family.lazy_keys(target, node),
        "INPUT.FORMAT",
        node.get("input_format") or "BGR",
    ]


def dataset_names(found: Any, loader: str) -> tuple[str, ...]:
    """The datasets that a LazyConfig's loader reads, as far as it names them.

    Args:
        loader: ``train`` or ``test``.
    """
    node = (found.get("dataloader") or {}).get(loader) or {}
    names = (node.get("dataset") or {}).get("names") or ()
    return (names,) if isinstance(names, str) else tuple(n for n in names if isinstance(n, str))


def build_lazy_model(cfg: CfgNode) -> nn.Module:
    """The model of ``MODEL.LAZY``, by ``instantiate``.

    Raises:
        UserError: see :func:`read_lazy`; or it cannot be built.
    """
    keys, what = cfg.MODEL.LAZY, "MODEL.LAZY.CONFIG_FILE"
    found = read_lazy(
        keys.CONFIG_FILE, keys.OPTS, trusted=keys.TRUST, trust="MODEL.LAZY.TRUST True", what=what
    )
    try:
        return instantiate(found.model)
    except Exception as e:  # every part of a model has its own way to refuse a value
        raise UserError(
            f"the model of {keys.CONFIG_FILE} cannot be built ({type(e).__name__}: {_first_line(e)}): expected arguments that fit "
            "each other; correct the file."
        ) from e


build_lazy_model.__name__ = LAZY  # what MODEL.META_ARCHITECTURE names
META_ARCH_REGISTRY.register(build_lazy_model)


def _plain(value: Any) -> Any:
    """What a node says, in values whose text is the same in every process."""
    if isinstance(value, Mapping):
        return {str(k): _plain(value[k]) for k in sorted(value, key=str)}
    if isinstance(value, partial):
        return ["partial", _plain(value.func), _plain(list(value.args)), _plain(value.keywords)]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Sequence):
        return [_plain(own) for own in value]
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
