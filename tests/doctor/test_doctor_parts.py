"""The doctor's rules and figures, by hand."""

from types import SimpleNamespace

import pytest
import torch
from builders import tiny_cfg
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage

from era.doctor import prediction, software
from era.doctor.case import Case
from era.doctor.devices import covers
from era.doctor.models import level_rows
from era.doctor.steps import Stopwatch

GOOD = {
    "torch": "2.11.0+cu130", "torchvision": "0.26.0", "setuptools": "80.10.2", "opencv-python": "4.6.0",
    "detectron2": "0.6+a59f0563",
}  # fmt: skip


def told(changes=(), *, has_pkg_resources=True):
    installed = {**GOOD, **dict(changes)}
    return software.known_bad(installed, has_pkg_resources=has_pkg_resources)


def test_good_versions():
    assert told() == []


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"torch": "2.5.1"}, "wrong", "CVE-2025-32434"),
        ({"detectron2": "0.6"}, "warning", "a59f0563"),
        ({"opencv-python-headless": "4.6.0"}, "warning", "overwrite each other's cv2"),
    ],
)
def test_known_bad_versions(changes, status, words):
    ((found, sentence),) = told(changes)
    assert found == status and words in sentence


def test_a_setuptools_without_pkg_resources():
    ((status, sentence),) = told({"setuptools": "82.0.0"}, has_pkg_resources=False)
    assert status == "wrong" and "setuptools 82.0.0 has no pkg_resources" in sentence


def test_requirements_are_followed():
    requirements = {
        "detectron2": [
            "iopath>=0.1.7,<0.1.10",
            "black; extra == 'all'",
            "old; python_version < '3'",
        ],
        "torchvision": ["torch (==2.11.0)", "Pillow"],
        "iopath": ["portalocker"],
        "era-detectron2": ["opencv-python>=4.6", "setuptools<81"],
    }
    installed = GOOD | {
        "iopath": "0.1.9",
        "portalocker": "4",
        "pillow": "13",
        "era-detectron2": "0.2",
    }

    def found(**changes):
        names = {k.replace("_", "-"): v for k, v in changes.items()}
        now = {k: v for k, v in (installed | names).items() if v is not None}
        return software.unmet(now, lambda name: requirements.get(name, []))

    assert found() == []
    ((status, sentence),) = found(torch="2.10.0")
    assert (
        status == "wrong" and "torchvision 0.26.0 needs torch==2.11.0 and finds 2.10.0" in sentence
    )
    ((status, sentence),) = found(iopath="0.1.10")
    assert status == "warning" and "needs iopath<0.1.10,>=0.1.7 and finds 0.1.10" in sentence
    ((status, sentence),) = found(portalocker=None)
    assert status == "wrong" and "needs portalocker, which is absent" in sentence
    assert (
        found(opencv_python=None, opencv_python_headless="4.6") == []
    )  # another of the same module


def test_which_gpus_a_torch_has_kernels_for():
    assert covers(["sm_80", "sm_90"], (8, 0))
    assert covers(["sm_80"], (8, 6))  # within a major version
    assert not covers(["sm_86"], (8, 0))
    assert not covers(["sm_80", "sm_90"], (7, 5))
    assert not covers(["sm_90"], (12, 0))
    assert covers(["sm_90", "compute_90"], (12, 0))  # compiled when it is run
    assert not covers(["compute_90"], (8, 0))
    assert covers(["sm_90a", "sm_120"], (12, 0))


def test_a_step_with_a_single_loss():
    """Detectron2 notes such a one as the total alone."""
    watch = Stopwatch(torch.device("cpu"))
    with EventStorage(0) as storage:
        watch.trainer = SimpleNamespace(storage=storage)
        storage.put_scalar("total_loss", 2.5)
        watch.before_step()
        watch.after_step()
    assert watch.losses == {"total_loss": 2.5} and len(watch.seconds) == 1


def test_strides_that_differ_are_told():
    def detector(**levels):
        shapes = {name: ShapeSpec(channels=16, stride=stride) for name, stride in levels.items()}
        return SimpleNamespace(feature_shapes=shapes, head_levels={"p3"})

    rows = level_rows(detector(p3=8, p4=16), detector(p3=4, p5=32))
    assert [row["level"] for row in rows] == ["p3", "p4", "p5"]
    assert [row["comparison"] for row in rows] == [
        "strides differ", "teacher has none", "student has none",
    ]  # fmt: skip
    assert [row["read by heads of"] for row in rows] == ["student and teacher", "nobody", "nobody"]


def case(monkeypatch, *, processes=1, iterations=7200, steps, period=1000):
    cfg = tiny_cfg("plain")
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = iterations, period
    cfg.DATASETS.TEST = ("some",)
    monkeypatch.setattr(prediction, "pictures", lambda key, name: [None] * 900)
    args = SimpleNamespace(num_gpus=processes, num_machines=1)
    return Case(args, cfg, step_results=steps)


def measured(processes, *, seconds=(0.5, 0.4, 9.0), on_gpu=False, peak=1024.0):
    return {
        "processes": processes, "on_gpu": on_gpu, "seconds": list(seconds), "peak_mib": [peak] * processes,
        "gpu_mib": 2048.0, "outside_mib": 512.0, "test_seconds": 0.2,
    }  # fmt: skip


def test_hours_by_hand(monkeypatch):
    found = prediction.check(
        case(monkeypatch, steps={1: measured(1), 2: measured(2, seconds=(2.0,))})
    )
    assert found.status == "ok"
    assert found.details["hours_of_training"] == pytest.approx(7200 * 0.5 / 3600)  # the median
    assert found.details["evaluations"] == 8  # at 1000, ..., 7000 and at the end
    assert found.details["hours_of_evaluation"] == pytest.approx(8 * 900 * 0.2 / 3600)
    assert "1.00 GiB of memory a process, on this machine's CPU" in found.sentence


def test_several_processes_are_judged_by_two(monkeypatch):
    steps = {1: measured(1), 2: measured(2, seconds=(2.0,))}
    found = prediction.check(case(monkeypatch, processes=8, steps=steps))
    assert found.details["hours_of_training"] == pytest.approx(7200 * 2 / 3600)
    assert found.details["hours_of_evaluation"] == pytest.approx(8 * 900 * 0.2 / 8 / 3600)
    assert any(
        "the exchange of gradients among more" in text for text in found.details["assumptions"]
    )


def test_a_gpu_that_is_nearly_full(monkeypatch):
    monkeypatch.setattr(prediction, "machine", lambda: {"gpu": "some GPU"})
    found = prediction.check(case(monkeypatch, steps={1: measured(1, on_gpu=True)}))
    assert found.status == "ok" and "1.50 of 2.00 GiB a GPU (some GPU)" in found.sentence
    found = prediction.check(case(monkeypatch, steps={1: measured(1, on_gpu=True, peak=1400.0)}))
    assert found.status == "warning" and "lower SOLVER.IMS_PER_BATCH" in found.sentence


@pytest.mark.parametrize(
    ("period", "iterations", "count"), [(0, 10, 1), (5, 10, 2), (3, 10, 4), (20, 10, 1)]
)
def test_how_often_a_run_evaluates(period, iterations, count):
    cfg = tiny_cfg("plain")
    cfg.TEST.EVAL_PERIOD, cfg.SOLVER.MAX_ITER = period, iterations
    assert prediction.evaluations(cfg) == count
    cfg.DATASETS.TEST = ()
    assert prediction.evaluations(cfg) == 0
