"""The tutorial's commands, as they stand on the page, with few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from builders import REPO

PAGE = REPO / "docs" / "tutorial.md"


def commands() -> list[str]:
    """The shell blocks of the page, in order."""
    return re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def test_the_tutorial_runs(tmp_path):
    assert len(commands()) == 7
    (tmp_path / "configs").symlink_to(
        REPO / "configs"
    )  # where the commands are given: runs and data stay here
    environment = os.environ | {
        "STEPS": "2",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("DETECTRON2_DATASETS", None)
    for command in commands():
        done = subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    here = tmp_path / "output" / "tutorial"
    for run in ("teacher", "plain", "era"):
        assert (here / run / "student" / "model_final.pth").is_file(), run
        last = json.loads((here / run / "metrics.json").read_text().splitlines()[-1])
        assert last["iteration"] <= 2 and "bbox/AP" in last, run
    assert (here / "era_alpha1" / "inference" / "coco_instances_results.json").is_file()
    assert json.loads((here / "deployed" / "manifest.json").read_text())["format"] == "onnx"
    assert len(json.loads((here / "found" / "images.json").read_text())["images"]) == 10
    report = (here / "report.html").read_text(encoding="utf-8")
    assert all(f'<section id="{part}"' in report for part in ("result", "training", "deployment"))


def test_the_page_shows_what_the_demo_trains():
    """The figures that it quotes are the demo's: the same configs, data and iterations."""
    runs = yaml.safe_load((REPO / "studies" / "demo.yaml").read_text(encoding="utf-8"))["runs"]
    for command, name in zip(commands(), ("teacher", "plain", "era"), strict=False):
        run = runs[name]
        assert f"--config-file {run['config']} " in command
        assert f"${{STEPS:-{run['overrides']['SOLVER.MAX_ITER']}}}" in command
        assert ("era_toy_train_200" in command) == ("DATASETS.TRAIN" in run["overrides"])
