"""What the benchmark prints: a header that says where the numbers come from, and Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from era import environment
from era.runs import tables
from era.runs.tables import number


def machine(device: torch.device) -> dict:
    """Machine, versions and commit; no GPU where none is measured."""
    about = environment.machine() | environment.versions() | {"commit": environment.commit()}
    return about if device.type == "cuda" else about | {"gpu": None}


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
    table = []
    for row in rows:
        ms = row["ms"]
        cells = [row["name"], *(f"{ms[k]:.1f}" for k in ("median", "min", "max"))]
        cells.append(number(row["ratio"], ".3f"))
        if with_cpu:
            cells += [f"{row['cpu_ms']['median']:.1f}", number(row["cpu_ratio"], ".3f")]
        cells.append(number(row["peak_mib"], ".0f"))
        if with_memory:
            cells.append(number(row["peak_ratio"], ".3f"))
        table.append(cells)
    return tables.markdown(heads, table)


def _keys(keys: Mapping, prefix: str = "") -> str:
    """A method's keys and values in one line."""
    return ", ".join(
        _keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else f"{prefix}{key} {value}"
        for key, value in keys.items()
    )
