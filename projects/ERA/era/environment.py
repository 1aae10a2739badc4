"""Where numbers come from: versions of the software, the machine, and the commit of this code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from detectron2.utils.collect_env import collect_env_info

from era.devices import gpu_name

PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "pycocotools")  # numbers depend on these


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of this package and of the packages that its numbers depend on.

    Args:
        more: other distributions to name, such as "onnxruntime".

    Returns:
        Version by name, "unknown" where a package is not installed.
    """
    found = {"python": platform.python_version(), "era": sys.modules["era"].__version__}
    return found | {name: _version(name) for name in (*PACKAGES, *more)}


def machine() -> dict:
    """The machine at work, in plain values for a JSON file.

    Returns:
        ``platform`` and ``cpu`` (names), ``cpu_cores`` (those that this process may use), ``threads`` (of
        torch), ``load_average`` (over the last minute; None where the system tells none) and ``gpu`` (name
        of the current one; None without a GPU).
    """
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": gpu_name(),
    }


def collected() -> str:
    """All that a report of a fault should say of the software and devices: Detectron2's own table."""
    return collect_env_info() + "\n"


def usable_cores() -> int:
    """CPU cores that this process may use: a container or ``taskset`` may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """Short hash of the checkout that this code lies in, with a word if it was changed since."""

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


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # such as a Detectron2 that is imported from its source folder
        return getattr(sys.modules.get(name), "__version__", "unknown")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
