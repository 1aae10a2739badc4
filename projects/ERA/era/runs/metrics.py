"""What a run wrote into its metrics.json."""

from __future__ import annotations

import json
import math
import re
import statistics
from itertools import pairwise
from pathlib import Path

from era.engine.hooks import GPU_MEMORY
from era.errors import UserError
from era.runs.plan import Run

METRICS_FILE = "metrics.json"


def read_metrics(folder: Path) -> list[dict]:
    """A run's metrics, one dict a line as Detectron2 writes them; a half-written line is left out."""
    try:
        text = (folder / METRICS_FILE).read_text(encoding="utf-8")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def steps_done(metrics: list[dict]) -> int:
    """Optimiser steps that the metrics tell of. (Detectron2 writes them every 20 steps.)"""
    return max((m["iteration"] + 1 for m in metrics if "total_loss" in m), default=0)


def step_seconds(metrics: list[dict], *, since: int = 40) -> float | None:
    """Median time of a training step in seconds, None if none is known yet.

    Args:
        since: the step from which on times count, for the first are slower; earlier ones are used
            if there are no others.
    """
    times = [(m["iteration"], m["time"]) for m in metrics if math.isfinite(m.get("time", math.nan))]
    late = [seconds for iteration, seconds in times if iteration >= since]
    chosen = late or [seconds for _, seconds in times]
    return statistics.median(chosen) if chosen else None


def peak_gpu(metrics: list[dict]) -> float | None:
    """Most memory of tensors on the GPU, in MiB, that the metrics tell of; None of a run on a CPU."""
    return max((m[GPU_MEMORY] for m in metrics if GPU_MEMORY in m), default=None)


AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_CSV = re.compile(r"copypaste: ([\w,.\-]+)\s*$", re.MULTILINE)


def read_ap(run: Run) -> dict[str, float]:
    """AP, AP50, AP75 and AP by size of a run's last evaluation, in points, NaN where there is no such object;
    of a training from its metrics, of an evaluation, which writes none, from its log.

    Raises:
        UserError: there is none.
    """
    found = [m for m in read_metrics(run.folder) if "bbox/AP" in m]
    if found:
        return {name: float(found[-1].get(f"bbox/{name}", math.nan)) for name in AP_NAMES}
    text = run.log.read_text(encoding="utf-8", errors="replace") if run.log.is_file() else ""
    # Detectron2 logs a line of names, then a line of numbers.
    lines = [line.split(",") for line in _CSV.findall(text)]
    for names, numbers in reversed(list(pairwise(lines))):
        if names[:3] == list(AP_NAMES[:3]):
            ap = dict(zip(names, map(float, numbers), strict=False))
            return {name: ap.get(name, math.nan) for name in AP_NAMES}
    raise UserError(
        f"the run {run.name!r} left no evaluation in {run.folder}: see its log {run.log}, and leave "
        "TEST and DATASETS.TEST as they are."
    )


def ap_curve(metrics: list[dict]) -> list[tuple[int, float]]:
    """Optimiser steps and AP of every evaluation that the metrics tell of, in order."""
    most = (
        steps_done(metrics) or math.inf
    )  # the last evaluation is counted as one step after the last
    found = {min(m["iteration"] + 1, most): float(m["bbox/AP"]) for m in metrics if "bbox/AP" in m}
    return sorted((step, ap) for step, ap in found.items() if math.isfinite(ap))
