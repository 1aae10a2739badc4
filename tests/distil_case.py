"""The toy data as a stranger would have it, a small teacher of other classes, and steps that are forked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from builders import TINY_TEACHER, TOY
from detectron2.modeling import build_model
from forked import fork_train_net

from era.config import load_config
from era.data.toy import ToySpec, generate
from era.runs.process import go_on_command

QUICK = ("SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "1")


@dataclass(frozen=True)
class Stranger:
    """A folder with ``my.json`` and ``photos``, and one with a teacher."""

    folder: Path
    teacher: Path

    def args(self, output: Path, *more: str, teacher: bool = True) -> list[str]:
        """A command line of two steps a training, with the least student."""
        own = [
            "--teacher",
            self.teacher / "teacher.yaml",
            "--teacher-weights",
            self.teacher / "teacher.pth",
        ]
        args = [
            "--data", self.folder / "my.json", self.folder / "photos", "--student", "toy", "--output", output,
            *(own if teacher else ()), "--formats", "torchscript", "--opts", *QUICK, "--teacher-opts", *QUICK, *more,
        ]  # fmt: skip
        return list(map(str, args))


def make_stranger(folder: Path, pictures: int = 10) -> Stranger:
    """Write it: annotations without ``area`` and ``iscrowd``, as many people have them, of renamed classes."""
    generate(folder, ToySpec(train_images=pictures, val_images=1, image_size=64))
    data = json.loads((folder / "era_toy" / "annotations" / "train.json").read_text())
    data["annotations"] = [
        {k: a[k] for k in ("id", "image_id", "category_id", "bbox")} for a in data["annotations"]
    ]
    data["categories"] = [c | {"name": f"my {c['name']}"} for c in data["categories"]]
    (folder / "my.json").write_text(json.dumps(data))
    shutil.copytree(folder / "era_toy" / "train", folder / "photos")
    teacher = folder / "teacher"
    teacher.mkdir()
    cfg = load_config(str(TOY / "teacher.yaml"), ["MODEL.DEVICE", "cpu", *TINY_TEACHER])
    torch.save({"model": build_model(cfg).state_dict()}, teacher / "teacher.pth")
    (teacher / "teacher.yaml").write_text(cfg.dump())
    return Stranger(folder, teacher)


class Forked:
    """A run's process as ``subprocess.Popen`` shows one, forked from the test's: nothing is imported again."""

    def __init__(self, run, threads: int, gpus=None):
        command = go_on_command(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        arguments = command[command.index("train") + 1 :]
        self.pid, self._code = fork_train_net(arguments, run.log, lambda: None), None

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if done else None
        return self._code

    def wait(self, timeout: float) -> int:
        """Until it has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        return self._code

    def terminate(self) -> None:
        """Ask it to stop."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)
