"""Runs that are tiny processes, for tests of what executes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from era.runs.plan import FINAL, Run

PASS = (sys.executable, "-c", "pass")
SLOW = (sys.executable, "-c", "import time; time.sleep(60)")
FAIL = (sys.executable, "-c", "print('disk on fire'); raise SystemExit(3)")
TRAIN = """\
import json, pathlib, sys
folder, lines = pathlib.Path(sys.argv[1]), sys.argv[2]
(folder / "metrics.json").write_text(lines)
(folder / "student").mkdir()
(folder / "student" / "model_final.pth").touch()
(folder / "model_final.pth").touch()
"""


def make_run(folder: Path, name: str, **changes) -> Run:
    """A run that is nothing but a process: by default one that succeeds at once."""
    defaults = {
        "label": name,
        "config_file": "",
        "opts": (),
        "folder": folder / name,
        "iterations": 100,
        "command": PASS,
    }
    return Run(name=name, **{**defaults, **changes})


def metrics_lines(ap: float, *, iterations: int = 100, seconds: float = 0.1) -> str:
    """What a training wrote that was evaluated half-way, at half its AP, and at the end."""
    lines = [
        {"iteration": i, "total_loss": 1.0, "time": seconds}
        for i in (iterations // 2, iterations - 1)
    ]
    for iteration, value in (
        (iterations // 2 - 1, ap / 2),
        (iterations, ap),
    ):  # as Detectron2 counts
        names = ("AP", "AP50", "AP75", "APs", "APm")
        lines.append({"iteration": iteration} | {f"bbox/{n}": value for n in names})
    return "\n".join(map(json.dumps, lines))


def training(folder: Path, ap: float, **options) -> tuple[str, ...]:
    """The command of a process that leaves what a training leaves."""
    return (sys.executable, "-S", "-c", TRAIN, str(folder), metrics_lines(ap, **options))


def part(folder: Path) -> tuple[str, ...]:
    """The command of a process that leaves what the training of a part leaves: no student, and no AP."""
    return (sys.executable, "-S", "-c", "import sys; open(sys.argv[1], 'w')", str(folder / FINAL))
