"""The methods as a table for people."""

from __future__ import annotations

from tabulate import tabulate

from era.config import get_era_cfg
from era.methods.base import Needs
from era.registry import METHOD_REGISTRY

IDEA_WIDTH, PAPER_WIDTH = 62, 44  # characters, then a new line


def methods_table() -> str:
    """Name, idea, needs and paper of every registered method, with the settings of their defaults; by name."""
    cfg = get_era_cfg()
    rows = [
        (name, method.idea, needs_in_words(method.needs(cfg)), method.paper)
        for name, method in sorted(METHOD_REGISTRY)
    ]
    headers = ("MODEL.DISTILLER.METHODS", "idea", "needs", "paper")
    return tabulate(
        rows, headers, tablefmt="simple_grid", maxcolwidths=[None, IDEA_WIDTH, 24, PAPER_WIDTH]
    )


def needs_in_words(needs: Needs) -> str:
    """What a method needs beside the student, as ``teacher, labels``; labels for its own losses."""
    parts = [
        *(["teacher"] if needs.teacher else []),
        *(["labels"] if needs.labels else []),
        *(needs.more),
        *(["teacher at inference"] if needs.teacher_at_inference else []),
    ]
    return ", ".join(parts) or "nothing"
