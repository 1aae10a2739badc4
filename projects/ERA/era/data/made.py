"""All sets that are made on first use, by their registered names: generated ones (``toy``), and ``trees``."""

from __future__ import annotations

from typing import Any

from era.data import toy, trees

_KINDS = (toy, trees)


def register() -> None:
    """Put every name into Detectron2's catalogs; makes nothing."""
    for kind in _KINDS:
        kind.register()


def prepare(name: str) -> None:
    """Make the data of a set that is not there yet; nothing for a name of another kind.

    Raises:
        UserError: it cannot be made.
    """
    for kind in _KINDS:
        if name in kind.NAMES:
            kind.prepare(name)


def origin(name: str) -> dict[str, Any] | None:
    """What the content of a set follows from, the same on every machine; None for a name of another kind."""
    return next((kind.origin(name) for kind in _KINDS if name in kind.NAMES), None)
