"""Runs that are killed and go on end as the run that was never killed, to the bit."""

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from builders import cli, tiny_model
from resume_case import Kill, difference, left_behind, lines, run

from era.checkpoint.writing import HASH
from era.engine import preflight
from era.engine.resume import MetricsFile, torchscript_without_history

LENGTH = ["SOLVER.MAX_ITER", "24", "SOLVER.CHECKPOINT_PERIOD", "5", "SOLVER.CHECKPOINTS_KEPT", "2",
          "TEST.EVAL_PERIOD", "8", "SOLVER.WARMUP_ITERS", "10", "SOLVER.STEPS", "(18,)"]  # fmt: skip
SEEDED = ["SEED", "5"]
UNLABELED = ["DATASETS.UNLABELED", "('tiny_train',)",
             "SOLVER.IMS_PER_BATCH", "4", "SOLVER.UNLABELED_PER_BATCH", "2"]  # fmt: skip
AVERAGED = ["MODEL.EMA.ENABLED", "True", "MODEL.EMA.DECAY", "0.6", "MODEL.RESNETS.NORM", "BN",
            "SOLVER.ACCUMULATION_STEPS", "2", "SOLVER.IMS_PER_BATCH", "4"]  # fmt: skip
EVERYWHERE = [
    Kill(step=3),  # before the first checkpoint: there is nothing to resume
    Kill(step=7),
    Kill(evaluation=7),
    Kill(write="model_best.pth"),
    Kill(write="model_0000009.pth"),
    Kill(rename="model_0000014.pth.sha256"),
    Kill(rename="last_checkpoint"),
    Kill(step=21),  # after a line of metrics.json
    Kill(write="model_final.pth"),
    Kill(evaluation=24),  # the last one
]
CASES = {
    "alone": ("era", SEEDED, EVERYWHERE),
    "accumulated": (  # and: no SEED, float16, two workers, statistics of BatchNorm averaged

        "plain",
        ["SOLVER.ACCUMULATION_STEPS", "2", "SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "2",
         "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16", "TEST.PRECISE_BN.ENABLED", "True",
         "TEST.PRECISE_BN.NUM_ITER", "2", "MODEL.RESNETS.NORM", "BN"],
        [Kill(step=17)],
    ),
    "dense": ("retinanet_plain", SEEDED, [Kill(step=12)]),  # its losses have a running normaliser
    "two": (  # processes, and pictures without labels

        "era",
        [*SEEDED, *UNLABELED, "MODEL.ERA.NORM", "GN"],
        [Kill(step=12, rank=1), Kill(write="model_0000014.pth")],
    ),
    "averaged": (  # weights, accumulated, and a detector that leans on the teacher

        "era",
        [*SEEDED, *AVERAGED, "MODEL.ERA.ALPHA", "0.5"],
        [Kill(step=7), Kill(write="model_0000009.pth"), Kill(evaluation=15), Kill(write="model_final.pth"),
         Kill(evaluation=24)],
    ),
    "two averaged": (  # processes, whose statistics of BatchNorm differ, in float16

        "plain",
        [*SEEDED, *AVERAGED, "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16", "DATALOADER.NUM_WORKERS", "2"],
        [Kill(step=12, rank=1), Kill(write="model_0000019.pth")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(name, tiny_data, tmp_path):
    config, opts, kills = CASES[name]
    several = name.startswith("two")
    processes = ["--num-gpus", "2" if several else "1"]

    teacher = tmp_path / "teacher.pth"
    torch.save({"model": tiny_model().teacher.model.state_dict()}, teacher)

    def args(folder):
        more = [*LENGTH, *opts, "MODEL.TEACHER.WEIGHTS", teacher]
        return [*processes, *cli(tiny_data, tmp_path / folder, *more, config=config)]

    assert run(args("whole"), log=tmp_path / "whole.txt") == 0
    log, draw = tmp_path / "killed.txt", 5
    for kill in kills:
        status = run(["--resume", *args("killed")], kill=kill, log=log, draw=draw)
        assert status == (1 if several else -9), log.read_text()[-3000:]
        has_begun = any((tmp_path / "killed").glob("model_*.pth"))
        draw = 6 if has_begun else draw  # the checkpoint's counts, not what is drawn now
    assert run(["--resume", *args("killed")], log=log, draw=draw) == 0
    text = log.read_text()
    assert "Traceback" not in text and "other settings" not in text

    expected, found = left_behind(tmp_path / "whole"), left_behind(tmp_path / "killed")
    assert difference(found, expected) is None
    assert {"model_0000014.pth", "model_0000019.pth", "model_final.pth", "model_best.pth"} < set(
        found
    )
    assert not [name for name in found["files"] if name.endswith(".partial")]
    iterations = [line["iteration"] for line in found["metrics"]]
    assert len(set(iterations)) == len(iterations) and {15, 19, 23, 24} <= set(iterations)


@torch.jit.script
def scripted_focal_loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    p = torch.sigmoid(x)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(x, target, reduction="none")
    p_t = p * target + (1 - p) * (1 - target)
    return (entropy * (1 - p_t) ** 2.0 * (0.25 * target + 0.75 * (1 - target))).sum()


def test_a_scripted_function_gives_the_same_bits_in_its_first_call_and_later():
    """A resumed run's first step calls it for the first time, where the whole run has called it for days."""
    x = torch.randn(500, 8, requires_grad=True)
    target = (torch.rand(500, 8) < 0.1).float()
    with torchscript_without_history("cpu"):
        first, *others = (
            torch.autograd.grad(scripted_focal_loss(x, target), x)[0] for _ in range(5)
        )
    assert all(torch.equal(first, other) for other in others)


def test_a_checkpoint_of_an_earlier_version_goes_on_as_before(tiny_data, tmp_path):
    """Without the place in the run: with a warning, and no iteration twice in metrics.json."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    args = cli(
        tiny_data, folder, "SOLVER.CHECKPOINT_PERIOD", "15", "DATASETS.TEST", "()", config="plain"
    )
    assert run([*args, "SOLVER.MAX_ITER", "22"], log=log) == 0
    path = folder / "model_0000014.pth"
    content = torch.load(path, weights_only=True)
    del content["settings"], content["trainer"]["place"]
    torch.save(content, path)
    os.remove(f"{path}{HASH}")
    (folder / "last_checkpoint").write_text(path.name)
    log = tmp_path / "resumed.txt"
    assert run(["--resume", *args, "SOLVER.MAX_ITER", "24"], log=log) == 0
    text = log.read_text()
    assert (
        text.count("of a version that kept no place in the data") == 1 and "Traceback" not in text
    )
    iterations = [line["iteration"] for line in lines(folder)]
    assert sorted(set(iterations)) == sorted(iterations) and {19, 23} <= set(iterations)


@pytest.fixture
def bad_data(tiny_data, tmp_path):
    """The tiny data with two pictures to train on that break off behind their heads."""
    data = dict(zip(tiny_data[::2], tiny_data[1::2], strict=True))
    triples = ast.literal_eval(data["DATASETS.COCO_FORMAT"])
    folder = Path(shutil.copytree(triples[0][2], tmp_path / "pictures"))
    triples[0] = ["bad_train", triples[0][1], str(folder)]
    for path in sorted(folder.iterdir())[3:5]:
        path.write_bytes(path.read_bytes()[:-300])
    data |= {"DATASETS.COCO_FORMAT": str(triples), "DATASETS.TRAIN": "('bad_train',)"}
    return [part for pair in data.items() for part in pair]


@pytest.mark.parametrize(
    "opts",
    [
        ["DATALOADER.NUM_WORKERS", "1", "TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2",
         "MODEL.RESNETS.NORM", "BN"],
        ["DATALOADER.NUM_WORKERS", "0", "DATASETS.UNLABELED", "('bad_train',)", "SOLVER.IMS_PER_BATCH", "4",
         "SOLVER.UNLABELED_PER_BATCH", "2"],
    ],
    ids=["with loader processes", "also without labels"],
)  # fmt: skip
def test_a_bad_picture_is_replaced_by_the_same_after_a_resume(opts, bad_data, tmp_path):
    """And counted on: metrics.json is the same."""
    log = tmp_path / "log.txt"
    config = "era" if "DATASETS.UNLABELED" in opts else "plain"

    def args(folder):
        more = [*LENGTH, *SEEDED, *opts, "INPUT.ON_BAD_IMAGE", "skip"]
        return cli(bad_data, tmp_path / folder, *more, config=config)

    assert run(args("whole"), log=log) == 0
    assert run(args("killed"), kill=Kill(step=13), log=log) == -9
    assert run(["--resume", *args("killed")], log=log) == 0
    expected, found = left_behind(tmp_path / "whole"), left_behind(tmp_path / "killed")
    assert difference(found, expected) is None
    counts = [line["replaced_pictures"] for line in found["metrics"] if "replaced_pictures" in line]
    assert len(counts) > 1 and counts == sorted(counts) and counts[0] > 1
    text = log.read_text()
    assert "another one takes its place" in text and "Traceback" not in text


def test_a_bad_test_picture_is_mended_and_the_run_goes_on(tiny_data, tmp_path):
    """From a checkpoint that is written when it is met, and that goes like the periodic ones."""
    triples = ast.literal_eval(tiny_data[tiny_data.index("DATASETS.COCO_FORMAT") + 1])
    folder = Path(shutil.copytree(triples[1][2], tmp_path / "pictures"))
    sets = str([triples[0], ["mended_val", triples[1][1], str(folder)]])  # a name of its own
    data = [*tiny_data, "DATASETS.COCO_FORMAT", sets, "DATASETS.TEST", "('mended_val',)"]
    log = tmp_path / "log.txt"

    def args(name):
        return cli(data, tmp_path / name, *LENGTH, *SEEDED, config="plain")

    assert run(args("whole"), log=log) == 0
    path = sorted(folder.iterdir())[1]
    content = path.read_bytes()
    path.write_bytes(content[:-300])
    log = tmp_path / "stopped.txt"
    assert run(args("stopped"), log=log) == 2
    (told,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert path.name in told and "Traceback" not in log.read_text()
    assert (tmp_path / "stopped" / "last_checkpoint").read_text() == "model_0000007.pth"
    path.write_bytes(content)
    assert run(["--resume", *args("stopped")], log=log) == 0
    expected, found = left_behind(tmp_path / "whole"), left_behind(tmp_path / "stopped")
    for left in (expected, found):  # the one of iteration 7 is named until it is removed
        assert "model_0000007.pth" not in left
        for file in ("model_0000014.pth", "model_0000019.pth", "model_final.pth"):
            left[file]["trainer"]["place"].pop("checkpoints")
    assert difference(found, expected) is None


def test_a_place_of_another_form_is_refused(tiny_data, tmp_path):
    """Nothing outside the folder of the run is removed because a checkpoint names it."""
    log, other = tmp_path / "log.txt", tmp_path / "model_0000001.pth"
    args = cli(
        tiny_data, tmp_path / "run", "SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()", config="plain"
    )
    assert run(args, log=log) == 0
    path = tmp_path / "run" / "model_final.pth"
    content = torch.load(path, weights_only=True)
    content["trainer"]["place"]["checkpoints"] = ["../model_0000001"] * 9
    torch.save(content, path)
    os.remove(f"{path}{HASH}")
    other.write_bytes(b"of somebody else")
    log = tmp_path / "resumed.txt"
    assert run(["--resume", *args], log=log) == 2
    (told,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "model_final.pth" in told and "its place in the run is of another form" in told
    assert other.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB; skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", ["two checkpoints", "half a log"])
def test_a_full_disk_is_one_sentence_and_leaves_whole_checkpoints(
    room, small_disk, tiny_data, tmp_path, monkeypatch
):
    """It fills while the run is at work: at the start there was room enough."""
    monkeypatch.setattr(preflight, "check_room", lambda cfg, model: None)
    args = cli(tiny_data, small_disk / "run", "SOLVER.MAX_ITER", "40", "SOLVER.CHECKPOINT_PERIOD", "1",
               "SOLVER.CHECKPOINTS_KEPT", "0", "DATASETS.TEST", "()", config="plain")  # fmt: skip
    if room == "half a log":
        (small_disk / "filler").write_bytes(bytes((3 << 20) - (40 << 10)))
    log = tmp_path / "log.txt"
    assert run(args, log=log) == 2
    text = log.read_text()
    (told,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert " cannot be written (No space left on device" in told and "--resume" in told
    assert "Traceback" not in text and "Logging error" not in text
    left = list((small_disk / "run").iterdir())
    assert not [path for path in left if path.suffix == ".partial"]
    checkpoints = [path for path in left if path.suffix == ".pth"]
    assert (len(checkpoints) > 1) == (room == "two checkpoints")
    assert all(path.with_name(path.name + HASH) in left for path in checkpoints)
    assert all("place" in torch.load(path, weights_only=True)["trainer"] for path in checkpoints)


@pytest.mark.parametrize("written, kept", [(-1, 0), (5, 1), (19, 3), (40, 4)])
def test_lines_that_come_again_are_taken_out(written, kept, tmp_path):
    """Those at the end alone: what an earlier run left in the same file stays. And half a line goes."""
    path = tmp_path / "metrics.json"
    iterations = [3, 19, 7, 39] if written != -1 else [19, 7, 39]
    text = [json.dumps({"iteration": i}) + "\n" for i in iterations]
    path.write_text("".join(text) + '{"iteration": 4')
    file = MetricsFile(str(path))
    file.go_on_after(written)
    assert path.read_text() == "".join(text[:kept])
    assert file.written == written
    file.close()
