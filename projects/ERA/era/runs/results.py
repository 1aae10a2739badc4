"""The result of a complete run as a small JSON file, which stands for the run where its folder is not.

A file counts for a run if it has that run's identity (:mod:`era.runs.identity`). Such files may be committed: a
study then goes on from another machine.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from era import environment
from era.errors import UserError
from era.runs.metrics import AP_NAMES, ap_curve, peak_gpu, read_ap, read_metrics, step_seconds
from era.runs.plan import Run
from era.runs.series import chart_ends, method_charts

LATER = {"gpu_mib", "charts"}  # fields that files of earlier versions lack


@dataclass(frozen=True)
class Result:
    """What is kept of a run. AP of boxes, in points of 100."""

    run: str  # its name
    identity: str
    iterations: int  # optimiser steps; 0 = evaluation only
    ap: dict[
        str, float | None
    ]  # of the last evaluation, by metrics.AP_NAMES; None = no such object, or nothing detected
    curve: list[list[float]]  # [optimiser steps, AP] of every evaluation during the training
    step_ms: float | None  # median of a training step
    peak_mib: float | None  # most resident memory of the process
    seconds: float | None  # wall time of the whole run
    commit: str  # of the code
    machine: str  # name of the processor, or of the GPU where that did the work
    gpu_mib: float | None = None  # most memory of tensors on the (first) GPU
    # By the title of a method's chart: where its curves end, see series.chart_ends.
    charts: dict[str, dict[str, float]] = field(default_factory=dict)


def make_result(
    run: Run, identity: str, *, seconds: float | None, peak: float | None, commit: str
) -> Result:
    """The result of a run that is complete, read from its folder.

    Args:
        seconds: wall time of the run, if known.
        peak: its memory in MiB, if known.
        commit: of the code that it ran.

    Raises:
        UserError: the run left no evaluation.
    """
    metrics = read_metrics(run.folder)
    step = step_seconds(metrics) if run.iterations else None
    ap = read_ap(run)
    here = environment.machine()
    gpu = here["gpu"] if run.config.MODEL.DEVICE != "cpu" else None
    return Result(
        run=run.name,
        identity=identity,
        iterations=run.iterations,
        ap={name: _rounded(ap.get(name, math.nan), 3) for name in AP_NAMES},
        curve=[[step, round(value, 3)] for step, value in ap_curve(metrics)],
        step_ms=None if step is None else _rounded(1000 * step, 2),
        peak_mib=_rounded(peak, 1),
        seconds=_rounded(seconds, 1),
        commit=commit,
        machine=gpu or here["cpu"],
        gpu_mib=_rounded(peak_gpu(metrics), 1),
        charts=_chart_ends(run, metrics),
    )


def _chart_ends(run: Run, metrics: list[dict]) -> dict[str, dict[str, float]]:
    """To four digits; what has no finite end is left out."""
    found = {}
    for chart in method_charts(run.methods):
        ends = chart_ends(metrics, chart)
        known = {group: float(f"{end:.4g}") for group, end in ends.items() if math.isfinite(end)}
        if known:
            found[chart.title] = known
    return found


def write_result(folder: Path, result: Result) -> Path:
    """Write ``<run>.json``, whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    path = folder / f"{result.run}.json"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as e:
        raise UserError(
            f"the result {path} cannot be written ({e.strerror}): make its folder writable, or name another "
            "one in the plan's entry results."
        ) from e
    return path


def read_results(
    folder: Path, runs: Sequence[Run], identities: Mapping[str, str]
) -> tuple[dict[str, Result], list[str]]:
    """The results in a folder that count for runs of a plan.

    Returns:
        Results by the run's name, and the names of runs whose file is of another identity.

    Raises:
        UserError: a file that is no result.
    """
    found: dict[str, Result] = {}
    outdated = []
    for run in runs:
        path = folder / f"{run.name}.json"
        if not path.is_file():
            continue
        result = _read(path)
        if result.identity == identities[run.name]:
            found[run.name] = result
        else:
            outdated.append(run.name)
    return found, outdated


def _read(path: Path) -> Result:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in fields(Result)}
        numbers = (int, float, type(None))
        fits = (
            isinstance(value, dict)
            and names - LATER <= value.keys() <= names
            and isinstance(value["identity"], str)
            and type(value["iterations"]) is int
            and value["ap"].keys() == set(AP_NAMES)
            and all(isinstance(v, numbers) for v in value["ap"].values())
            and all(isinstance(value[k], numbers) for k in ("step_ms", "peak_mib", "seconds"))
            and isinstance(value.get("gpu_mib"), numbers)
            and all(
                isinstance(n, (int, float))
                for ends in value.get("charts", {}).values()
                for n in ends.values()
            )
            and all(isinstance(n, (int, float)) for point in value["curve"] for n in point)
            and all(len(point) == 2 for point in value["curve"])
        )
    except (OSError, ValueError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{path} is no result of a run: expected the JSON file that tools/study.py wrote there; restore it, "
            "or delete it to train that run again."
        )
    return Result(**value)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)
