"""Studies without trainings: variants with made-up results, and whole studies of tiny processes."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from builders import REPO
from runs_case import FAIL, part, training

from era.data import toy
from era.runs import execute as execution
from era.runs.metrics import AP_NAMES
from era.runs.process import start_process
from era.runs.results import Result
from era.study.cli import main
from era.study.summary import Entry

SPEC = toy.ToySpec(train_images=3, val_images=2, image_size=64)


def entry(name: str, *curves, step_ms=100.0, reference="", charts=(), ends=(), **more) -> Entry:
    """A variant with a seed a curve; ``ends`` are each seed's ends of its charts, as in a result."""
    results = {}
    for seed, curve in enumerate(curves, start=1):
        ap = dict.fromkeys(AP_NAMES, curve[-1][1])
        kept = ends[seed - 1] if ends else {}
        results[seed] = Result(
            name, "", curve[-1][0], ap, curve, step_ms, None, None, "", "", None, kept
        )
    return Entry(
        name,
        f"the {name}",
        "nothing",
        curves[0][-1][0],
        False,
        results,
        reference,
        (),
        charts,
        **more,
    )


@contextmanager
def two_checkouts(tmp_path: Path, monkeypatch, plan: str, ap: dict[str, float]):
    """Two machines with the same plan and tiny toy data."""
    monkeypatch.chdir(tmp_path)  # main goes to the checkout's top; this brings us back
    toy.register(tmp_path / "data", SPEC)
    yield [Checkout(tmp_path / name, monkeypatch, plan, ap) for name in ("here", "there")]
    toy.register()


class Checkout:
    """A repository's top with a plan, in which runs end at once, with the AP of their variant plus their seed."""

    def __init__(self, root: Path, monkeypatch, plan: str, ap: dict[str, float]):
        self.root, self.failing, self.ap = root, set(), ap
        self.started, self.lent = {}, {}
        (root / "studies").mkdir(parents=True)
        (root / "configs").symlink_to(REPO / "configs")
        self.write(plan)
        self.monkeypatch = monkeypatch

    @property
    def results(self) -> Path:
        return self.root / "docs" / "results" / "two"

    def write(self, text: str) -> None:
        (self.root / "studies" / "two.yaml").write_text(text)

    def start(self, run, threads, gpus):
        self.started[run.name], self.lent[run.name] = run, gpus
        ap = self.ap[run.variant] + (run.seed or 0)
        command = part(run.folder) if run.is_part else training(run.folder, ap)
        command = FAIL if run.name in self.failing else command
        object.__setattr__(run, "command", command)
        return start_process(run, threads, gpus)

    def study(self, *options: str) -> int:
        """Run the study; the exit status."""
        self.started = {}  # runs by name, in the order of their starts
        self.monkeypatch.setattr(execution, "start_process", self.start)
        quick = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(0.01))
        self.monkeypatch.setattr(execution, "time", quick)
        return main(["two", *options], root=self.root)
