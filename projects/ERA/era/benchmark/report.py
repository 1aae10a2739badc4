"""What the benchmark prints: a header that says where the numbers come from, and Markdown tables."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine(device: torch.device) -> dict:
    """Processor, GPU, threads and versions."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchvision", "detectron2")},
        "commit": _commit(),
    }


def header(about: dict, settings: dict, notes: Sequence[str]) -> str:
    """The lines above the tables."""
    where = f"{about['cpu']}, {about['cpu_cores']} cores, {about['threads']} thread(s)"
    if about["load_average"] is not None:
        where += f", load {about['load_average']} at the start"
    if about["gpu"]:
        where = f"{about['gpu']}; {where}"
    versions = ", ".join(
        f"{name} {about[name]}" for name in ("python", "torch", "torchvision", "detectron2")
    )
    lines = [
        f"Machine: {where}",
        f"Versions: {versions}; era at commit {about['commit']}",
        f"Command: {settings['command']}",
        f"Step: {settings['images']} image(s) of {settings['height']}x{settings['width']}, "
        f"{settings['precision']} on {settings['device']}; {settings['warmup']} warm-up and "
        f"{settings['repeats']} counted rounds, rows taking turns",
        *(f"{name}: {_keys(keys)}" for name, keys in settings["methods"].items()),
    ]
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)])


def markdown(rows: Sequence[dict], *, base: str) -> str:
    """A GitHub table of :meth:`era.benchmark.measure.Times.report` dicts.

    Args:
        base: what the ratios are to, for the heading.
    """
    with_cpu = any(row["cpu_ms"] for row in rows)
    with_memory = any(row["peak_mib"] is not None for row in rows)
    heads = ["row", "median ms", "min", "max", f"x {base}"]
    heads += ["CPU ms", f"CPU x {base}"] if with_cpu else []
    heads += ["peak MiB", f"peak x {base}"] if with_memory else ["peak MiB"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in rows:
        ms = row["ms"]
        cells = [row["name"], *(f"{ms[k]:.1f}" for k in ("median", "min", "max"))]
        cells.append(_number(row["ratio"], ".3f"))
        if with_cpu:
            cells += [f"{row['cpu_ms']['median']:.1f}", _number(row["cpu_ratio"], ".3f")]
        cells.append(_number(row["peak_mib"], ".0f"))
        if with_memory:
            cells.append(_number(row["peak_ratio"], ".3f"))
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    def git(*args: str) -> str:
        folder = Path(__file__).resolve().parent
        done = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (", with changes" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _keys(keys: Mapping, prefix: str = "") -> str:
    """A method's keys and values in one line."""
    return ", ".join(
        _keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else f"{prefix}{key} {value}"
        for key, value in keys.items()
    )
