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

# What Detectron2 can fetch. The last two name files of its own model zoo.
SCHEMES = ("http", "https", "ftp", "detectron2", "catalog")


def is_remote(path: str) -> bool:
    """Whether Detectron2 would take a path for an address and not for a file."""
    # Its checkpointer parses a path and puts it together again before it looks at the scheme, so that
    # " HTTP:host/file" is http:///host/file too.
    return "://" in path or "://" in urlsplit(path).geturl()


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


def check_bases(config_file: str, *, what: str, _derived: tuple[str, ...] = ()) -> None:
    """Walk the whole chain of ``_BASE_`` of a config file before Detectron2 follows it.

    Args:
        config_file: path of a local file.
        what: how a message names the source of the file.

    Raises:
        UserError: a base is an address or no path, or a file is its own base.
        OSError, yaml.YAMLError: a file cannot be read.
    """
    derived = (*_derived, os.path.realpath(config_file))
    if derived[-1] in _derived:
        raise UserError(
            f"{what} {config_file} is its own {BASE_KEY}, directly or through other files: expected a chain "
            "of bases that ends; remove one of them."
        )
    with open(config_file, encoding="utf-8") as f:
        content = yaml.safe_load(f)
    bases = content.get(BASE_KEY, []) if isinstance(content, dict) else []
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
