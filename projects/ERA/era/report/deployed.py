"""Deployment folders: their size, how near they are to eager, and how fast."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from era.errors import UserError
from era_runtime import DeploymentError, Predictor, load
from era_runtime.manifest import CLASSES, PARITY, read_manifest

EAGER = "eager"


@dataclass(frozen=True)
class Deployed:
    """One exported model."""

    folder: Path
    format: str
    precision: str
    alpha: float
    megabytes: float  # of the files that inference needs, 10^6 bytes
    box_difference: float | None  # largest against eager, pixels, as parity.json says
    milliseconds: tuple[float, float, float] | None = (
        None  # quartiles of one image; None = not measured
    )


def read_deployed(
    folders: Sequence[Path], latency: Mapping[str, Sequence[float]] | None = None
) -> list[Deployed]:
    """Read deployment folders; every file is checked against its manifest.

    Args:
        latency: milliseconds of every call, by the folder's path as text; see :func:`measure`.

    Raises:
        UserError: a folder that is none, or that is not whole.
    """
    found = []
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except DeploymentError as e:
            raise UserError(str(e)) from e
        times = (latency or {}).get(str(folder))
        sizes = [
            (folder / name).stat().st_size
            for name in manifest["files"]
            if name not in (PARITY, CLASSES)
        ]
        found.append(
            Deployed(
                folder=folder,
                format=manifest["format"],
                precision=manifest["precision"],
                alpha=manifest["alpha"],
                megabytes=sum(sizes) / 1e6,
                box_difference=_box_difference(folder),
                milliseconds=quartiles(times) if times else None,
            )
        )
    return found


def measure(
    folders: Sequence[Path], repeats: int, *, eager: Predictor | None = None
) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` calls of every folder, one image, one thread, taking turns.

    Args:
        eager: timed as well, under the name :data:`EAGER`.

    Raises:
        UserError: a folder that cannot be loaded, or a runtime that is missing.
    """
    from era.deploy.evaluate import latency  # here: a report without exports needs none of it

    try:
        predictors = {str(folder): load(folder, num_threads=1) for folder in folders}
    except DeploymentError as e:
        raise UserError(str(e)) from e
    if eager is not None:
        predictors = {EAGER: eager, **predictors}
    return latency(predictors, repeats=repeats) if predictors else {}


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile."""
    low, middle, high = np.percentile(np.asarray(times, dtype=float), [25, 50, 75])
    return float(low), float(middle), float(high)


def _box_difference(folder: Path) -> float | None:
    try:
        cases = json.loads((folder / PARITY).read_text(encoding="utf-8"))["cases"]
        return max((float(case["box_difference"]) for case in cases), default=None)
    except (OSError, ValueError, KeyError, TypeError):
        return None
