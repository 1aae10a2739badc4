"""Where files may come from: addresses of weights are checked before a byte is fetched, and a config and
its bases are files of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

import yaml
from detectron2.config import CfgNode
from fvcore.common.config import BASE_KEY

from era.errors import UserError

LARGEST_CONFIG = 1 << 20  # bytes
MOST_VALUES = 100_000  # in a config; Detectron2 has about 200 keys
HUB = "hf://"  # see era/checkpoint/hub.py
# What can be fetched. detectron2 and catalog name files of Detectron2's own model zoo.
SCHEMES = ("http", "https", "ftp", "detectron2", "catalog", "hf")


def is_remote(path: str) -> bool:
    """Whether Detectron2 would take a path for an address and not for a file."""
    # Its checkpointer parses a path and puts it together again before it looks at the scheme, so that
    # " HTTP:host/file" is http:///host/file too.
    return "://" in path or "://" in urlsplit(path).geturl()


def is_hub(address: str) -> bool:
    """Whether it begins with ``hf://``."""
    return address.startswith(HUB)


def check_address(path: str, *, what: str) -> None:
    """Pass a local path, and an address that stays inside the cache of downloads.

    iopath stores a download under the path of its address, as it stands there: ``..`` in it would be
    followed out of the cache.

    Args:
        what: how a message names the source of the path.

    Raises:
        UserError: an unknown scheme, or an address that walks upwards.
    """
    if not is_remote(path):
        return
    address = urlsplit(path).geturl()
    scheme, _, rest = address.partition("://")
    if scheme not in SCHEMES:
        raise UserError(
            f"{what} {path!r} begins with {scheme}://, which is unknown: expected a file or an address "
            f"that begins with one of {', '.join(s + '://' for s in SCHEMES)}; correct it."
        )
    # Decoded as well: what a server takes for ".." is no name of a file either.
    for form in (rest, unquote(rest)):
        if {".", ".."} & set(re.split(r"[/\\?#;]", form)):
            raise UserError(
                f"{what} {path!r} has '.' or '..' in its path, which could write outside the cache of "
                "downloads: expected an address without them; write it out, or download the file and "
                "give its path."
            )


def check_nothing_fetched(cfg: CfgNode, opts: Sequence[str], *, source: str) -> None:
    """A folder that may come from anybody must not make this machine download the teacher it names.

    Args:
        cfg: the folder's config with the overrides in it.
        opts: overrides that the user typed: an address among them is the user's own.
        source: the config's file, for the message.

    Raises:
        UserError: ``MODEL.TEACHER.WEIGHTS`` is an address that only the folder names.
    """
    weights = cfg.MODEL.TEACHER.WEIGHTS
    if is_remote(weights) and weights not in opts:
        raise UserError(
            f"{source} names MODEL.TEACHER.WEIGHTS {weights!r}, an address, and nothing is downloaded "
            f"because a folder says so: add MODEL.TEACHER.WEIGHTS {weights} to the overrides if you "
            "trust it, or name a local file there."
        )


def check_nothing_run(
    cfg: CfgNode, opts: Sequence[str], *, source: str, teacher: bool = True
) -> None:
    """A folder that may come from anybody must not make this machine run the Python that it names.

    Args:
        cfg: the folder's config with the overrides in it.
        opts: overrides that the user typed: trust among them is the user's own.
        source: the config's file, for the message.
        teacher: whether the teacher is built too.

    Raises:
        UserError: a LazyConfig describes a model that would be built, and only the folder says that it is trusted.
    """
    files = [("MODEL.LAZY.TRUST", cfg.MODEL.LAZY.TRUST, cfg.MODEL.LAZY.CONFIG_FILE)]
    if teacher:
        keys = cfg.MODEL.TEACHER
        trusted = keys.TRUST_PYTHON_CONFIG and keys.CONFIG_FILE.endswith(".py")
        files.append(("MODEL.TEACHER.TRUST_PYTHON_CONFIG", trusted, keys.CONFIG_FILE))
    for key, trusted, file in files:
        if trusted and key not in opts:
            raise UserError(
                f"{source} names {file}, Python code that describes a model, and no code is run because a folder says so: add "
                f"{key} True to the overrides if you trust it."
            )


def check_bases(config_file: str, *, what: str, _derived: tuple[str, ...] = ()) -> None:
    """Walk the whole chain of ``_BASE_`` of a config file before Detectron2 follows it.

    Args:
        config_file: path of a local file.
        what: how a message names the source of the file.

    Raises:
        UserError: a base is an address or no path, a file is its own base, or holds no mapping or too much.
        OSError, RecursionError, yaml.YAMLError: a file cannot be read.
    """
    derived = (*_derived, os.path.realpath(config_file))
    if derived[-1] in _derived:
        raise UserError(
            f"{what} {config_file} is its own {BASE_KEY}, directly or through other files: expected a chain "
            "of bases that ends; remove one of them."
        )
    content = _read_yaml(config_file, what=what)
    bases = content.get(BASE_KEY, [])
    for base in bases if isinstance(bases, list) else [bases]:
        # As Detectron2 looks for it: relative to the file that names it.
        path = isinstance(base, str) and os.path.join(
            os.path.dirname(config_file), os.path.expanduser(base)
        )
        if not path or is_remote(base) or is_remote(path):
            raise UserError(
                f"{what}: {config_file} names {base!r} as its {BASE_KEY}: expected the path of a local "
                "file, for configs are never downloaded; fetch the file, read it, and name its path."
            )
        check_bases(path, what=what, _derived=derived)


def _read_yaml(config_file: str, *, what: str) -> dict:
    """The keys and values of one file, which are few enough to be copied and printed."""
    expected = "expected YAML with the keys of Detectron2 and of this project; correct the file."
    size = os.path.getsize(config_file)
    if size > LARGEST_CONFIG:
        raise UserError(f"{what} {config_file} has {size} bytes, too many for a config: {expected}")
    with open(config_file, encoding="utf-8") as f:
        content = yaml.safe_load(f)
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}, no mapping"
        raise UserError(f"{what} {config_file} {found}: {expected}")
    if _count(content, {}) > MOST_VALUES:
        raise UserError(
            f"{what} {config_file} stands for more than {MOST_VALUES} values, for it repeats itself by anchors "
            f"(& and *): {expected}"
        )
    return content


def _count(value: object, known: dict[int, float]) -> float:
    """Values in a value, those that stand in several places as often; endless if it contains itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")  # while its parts are counted
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]
