"""Runs whose numbers go wrong for real: where they stop, what they leave, and the step that is taken again."""

import math
import re
import time

import diverging
import numpy as np
import pytest
import torch
from builders import batch, cli, run_tool, tiny_cfg, tiny_model
from detectron2.structures import BitMasks, Keypoints, PolygonMasks, RotatedBoxes
from stop_case import forked

from era.engine import bad_step, replay, retake
from era.engine.bad_step import BadStep, pack, read_bad_step, unpack
from era.engine.launch import train_net
from era.errors import UserError
from era.registry import METHOD_REGISTRY

# Losses that depend on buffers which every step moves, and on a teacher.
STANDARDISED = [
    "MODEL.DISTILLER.METHODS", "['ERA', 'DIVERGING']", "MODEL.ERA.STANDARDIZE", "teacher",
    "MODEL.ERA.FEATURE_WEIGHT", "0.01", "MODEL.ERA.RESIDUAL_WEIGHT", "0.01",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _registered():
    METHOD_REGISTRY.register(diverging.DIVERGING)
    yield
    METHOD_REGISTRY._obj_map.pop("DIVERGING")


def arguments(tiny_data, output, *opts):
    return cli(
        tiny_data, output, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "8", "SEED", "5", "SOLVER.CHECKPOINT_PERIOD", "2",
        "MODEL.DISTILLER.METHODS", "['DIVERGING']", *opts,
    )  # fmt: skip


def fail(args, capsys):
    """Run it; the one sentence that it ends with."""
    with pytest.raises(SystemExit) as e:
        train_net(args)
    assert e.value.code == 1
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return told


def names(folder, pattern="*"):
    return sorted(path.name for path in folder.glob(pattern))


HALF = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"]
CASES = {
    "loss": ("loss", STANDARDISED, r"loss_diverging_mean is NaN at iteration 3;"),
    "gradient": ("gradient", [*HALF, "SOLVER.ACCUMULATION_STEPS", "2"],
                 r"a gradient became infinite or NaN at iteration 3 \(of student\.backbone\.\S+, .* and \d+ more\);"),
    "large": ("large", [], r"loss_diverging_mean is \d.*e\+\d+ at iteration 3, above SOLVER.MAX_LOSS 1e\+06;"),
    "forward": ("forward", [], r"Predicted boxes contain Inf or NaN \(iteration 3\);"),
}  # fmt: skip


@pytest.mark.parametrize("kind, opts, reason", CASES.values(), ids=CASES)
def test_a_run_stops_before_the_weights_are_touched_and_its_step_fails_again(
    kind, opts, reason, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(diverging.DIVERGING, "kind", kind)
    told = fail(arguments(tiny_data, tmp_path, *opts), capsys)
    file = tmp_path / "bad_step" / "iter_0000003_rank0.pt"
    assert f"python tools/replay_step.py {file}" in told and "--resume" in told
    assert re.search(f"training diverged: {reason}", told)
    assert names(tmp_path, "*.pth") == ["model_0000001.pth"]
    assert not (tmp_path / "student").exists()
    assert names(file.parent) == [file.name, "iter_0000003_rank0_weights.pth"]
    assert file.stat().st_size < 200_000
    kept = read_bad_step(str(file))
    assert kept.iteration == 3 and [len(b) for b in kept.batches] == (
        [1, 1] if kind == "gradient" else [2]
    )

    found = {}
    own = retake.retake

    def noted(*args):
        found["is"] = own(*args)
        return found["is"]

    monkeypatch.setattr(replay, "retake", noted)
    assert replay.main([str(file)]) == 1
    again, output = found["is"], capsys.readouterr().out
    assert "as they were before the step" in output and "The step fails again" in output
    if kind == "forward":
        assert "FloatingPointError: Predicted boxes contain Inf or NaN" in again.raised
        return
    assert again.losses.keys() == kept.losses.keys() and len(kept.losses) > 4
    for name, value in kept.losses.items():
        assert again.losses[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name
    bad = [name for name, size in again.loss_gradients.items() if not math.isfinite(size)]
    if kind == "loss":
        assert math.isnan(again.losses["loss_diverging_mean"])
    elif kind == "gradient":
        assert bad == ["loss_diverging_mean"] and again.first_gradient in kept.gradients
        assert again.parts["student.backbone"][1] > 0 == again.parts["student.roi_heads"][1]
    # Mended: the same step is finite.
    monkeypatch.setattr(diverging.DIVERGING, "kind", "none")
    assert replay.main([str(file)]) == 0


@pytest.mark.parametrize("rate, period, reason", [
    ("1e38", "100", r"left every bound with the update of iteration 0 \(student.*, so that Predicted boxes"),  # the next forward says so
    ("1e14", "1", r"out of every bound after iteration 0 .* reaches \d"),  # finite, and to be saved
], ids=["infinite", "huge"])  # fmt: skip
def test_weights_that_an_update_spoils_are_never_written(
    rate, period, reason, tiny_data, tmp_path, monkeypatch, capsys
):
    """The step that did it is kept, not the next one, and does it again with the weights that the run began with."""
    monkeypatch.setattr(diverging.DIVERGING, "kind", "none")
    told = fail(
        arguments(tiny_data, tmp_path, "SOLVER.BASE_LR", rate, "SOLVER.WARMUP_ITERS", "0",
                  "SOLVER.CHECKPOINT_PERIOD", period),
        capsys,
    )  # fmt: skip
    assert re.search(reason, told), told
    assert names(tmp_path, "**/*.pth") == [] and not (tmp_path / "student").exists()
    file = tmp_path / "bad_step" / "iter_0000000_rank0.pt"
    kept = read_bad_step(str(file))
    assert kept.updated and set(kept.learning_rates) == {float(rate)}
    assert replay.main([str(file)]) == 1
    output = capsys.readouterr().out
    assert "that a run of this config begins with, as they were before the step" in output
    assert "with the losses of the run: the weights left every bound with the update" in output


def test_the_last_checkpoint_stands_in_for_weights_that_are_gone(
    tiny_data, tmp_path, monkeypatch, capsys
):
    """The step right after it is exact."""
    monkeypatch.setattr(diverging.DIVERGING, "kind", "loss")
    fail(arguments(tiny_data, tmp_path, "SOLVER.CHECKPOINT_PERIOD", "3"), capsys)
    file = tmp_path / "bad_step" / "iter_0000003_rank0.pt"
    (file.parent / "iter_0000003_rank0_weights.pth").unlink()
    assert replay.main([str(file)]) == 1
    output = capsys.readouterr().out
    assert "model_0000002.pth, as they were before the step" in output
    assert "fails again, with the losses of the run: loss_diverging_mean is NaN" in output
    checkpoint = str(tmp_path / "model_0000002.pth")
    assert (
        replay.main([str(file), "MODEL.DEVICE", "cpu", "--weights", checkpoint, "SEED", "6"]) == 1
    )
    with pytest.raises(UserError, match="do not fit the model of the config"):
        replay.main([str(file), "MODEL.FPN.OUT_CHANNELS", "24"])


@pytest.mark.parametrize("kind, files", [
    ("loss", ["iter_0000003_rank1.pt", "iter_0000003_rank1_weights.pth"]),
    ("gradient", ["iter_0000003_rank0.pt", "iter_0000003_rank0_weights.pth", "iter_0000003_rank1.pt"]),
    ("forward", ["iter_0000003_rank1.pt", "iter_0000003_rank1_weights.pth"]),
])  # fmt: skip
def test_what_goes_wrong_in_one_process_stops_all(
    kind, files, tiny_data, tmp_path, monkeypatch, capsys
):
    """Within seconds, with one sentence; the file of the process whose loss it was fails again by itself."""

    def prepare():
        diverging.DIVERGING.kind, diverging.DIVERGING.rank = kind, 1

    args = ["--num-gpus", "2", *arguments(tiny_data, tmp_path / "run")]
    with forked(args, tmp_path / "log", prepare) as run:
        run.until(lambda: run.text.count("did step 2\n") == 2, "step 2 in both")
        begin = time.monotonic()
        assert run.end() == 1, run.text[-3000:]
        assert time.monotonic() - begin < 30
        run.leaves_nothing(1)
        errors = [line for line in run.text.splitlines() if line.startswith("error: training")]
        assert "Traceback" not in run.text, run.text[-3000:]
    assert len(errors) == 1, errors
    assert names(tmp_path / "run" / "bad_step") == files
    assert names(tmp_path / "run", "*.pth") == ["model_0000001.pth"]
    expected = {"loss": "loss_diverging_mean is NaN in process 1 at iteration 3",
                "gradient": ".pt, of each process one", "forward": "Predicted boxes"}[kind]  # fmt: skip
    assert expected in errors[0]
    monkeypatch.setattr(diverging.DIVERGING, "kind", kind)
    assert replay.main([str(tmp_path / "run" / "bad_step" / "iter_0000003_rank1.pt")]) == 1
    output = capsys.readouterr().out
    assert "process 1 (of 2)" in output and "as they were before the step" in output
    assert kind == "forward" or "with the losses of the run" in output


@pytest.mark.parametrize("full", ["little room", "no room"])
def test_a_disk_without_room_hides_nothing(full, tiny_data, tmp_path, monkeypatch, capsys):
    """Half of what is free stays free."""
    monkeypatch.setattr(diverging.DIVERGING, "kind", "loss")
    free = 300_000 if full == "little room" else 1_000
    monkeypatch.setattr(bad_step, "free_bytes", lambda folder: free)
    told = fail(arguments(tiny_data, tmp_path), capsys)
    assert "loss_diverging_mean is NaN at iteration 3" in told
    if full == "no room":
        assert "the step could not be kept (" in told and "needed" in told
        assert names(tmp_path / "bad_step") == []
    else:
        assert names(tmp_path / "bad_step") == ["iter_0000003_rank0.pt"]
        kept = read_bad_step(str(tmp_path / "bad_step" / "iter_0000003_rank0.pt"))
        assert kept.weights == "" and "of which half stays free" in kept.why_no_weights


def test_a_process_keeps_one_step(tmp_path):
    for name in ("iter_0000003_rank0.pt", "iter_0000003_rank0_weights.pth", "iter_0000003_rank1.pt",
                 "iter_0000003_rank01.pt", "iter_0000003_rank0.pt.partial", "own.pt"):  # fmt: skip
        (tmp_path / name).touch()
    bad_step._remove_earlier(str(tmp_path), 0)
    assert names(tmp_path) == ["iter_0000003_rank01.pt", "iter_0000003_rank1.pt", "own.pt"]


def test_every_structure_of_an_input_comes_back(tmp_path):
    (item,) = batch((2,))
    truth = item["instances"]
    truth.gt_masks = PolygonMasks([[np.array([0.0, 0, 9, 0, 9, 9])], [np.array([1.0, 1, 5, 1, 5, 5])] * 2])  # fmt: skip
    truth.gt_keypoints = Keypoints(torch.rand(2, 3, 3))
    truth.bits = BitMasks(torch.rand(2, 8, 8) > 0.5)
    truth.turned = RotatedBoxes(torch.rand(2, 5))
    item |= {"file_name": "a.jpg", "image_id": np.int64(3), "unlabeled": True, "more": (1, 2.5, None)}  # fmt: skip
    item["sem_seg"] = np.arange(6).reshape(2, 3)
    item["image"] = torch.rand(3, 200, 200)[:, :8, :8]  # a view
    torch.save(pack([[item]]), tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 20_000
    ((back,),) = unpack(torch.load(tmp_path / "file", weights_only=True))
    assert torch.equal(back["image"], item["image"]) and back["more"] == [1, 2.5, None]
    assert back["image_id"] == 3 and (back["sem_seg"] == item["sem_seg"]).all()
    own = back["instances"]
    assert own.image_size == truth.image_size
    for name in ("gt_boxes", "gt_keypoints", "bits", "turned"):
        a, b = own.get(name), truth.get(name)
        assert type(a) is type(b) and torch.equal(a.tensor, b.tensor), name
    for a, b in zip(own.gt_masks.polygons, truth.gt_masks.polygons, strict=True):
        assert all((x == y).all() for x, y in zip(a, b, strict=True))
    with pytest.raises(TypeError, match="an input holds a object"):
        pack([object()])


def valid_step():
    return {
        "form": 1, "iteration": 3, "rank": 0, "processes": 1, "seed": 5, "reason": "x", "losses": {"loss": 1.0},
        "gradients": [], "loss_scale": 1.0, "learning_rates": [0.1], "updated": False,
        "batches": pack([batch((1,))]), "buffers": {}, "weights": "", "why_no_weights": "",
    }  # fmt: skip


def test_the_first_module_that_is_not_finite_is_named():
    """Of a plain detector whose box head has a bad weight: what comes after it is not, and nothing before it."""
    step = BadStep(**{key: v for key, v in valid_step().items() if key != "form"} | {"batches": [batch((2, 1))]})  # fmt: skip
    model = tiny_model("plain").train()
    model.roi_heads.box_head.fc2.weight.data[0, 0] = float("nan")
    found = retake.retake(tiny_cfg("plain"), model, step)
    assert found.first_module == "roi_heads.box_head.fc2 (Linear, its input is finite)"
    bad = {name for name, loss in found.losses.items() if not math.isfinite(loss)}
    assert bad == {"loss_cls", "loss_box_reg"} and found.first_gradient.startswith("roi_heads.")
    assert found.parts["proposal_generator"][1] == 0 < found.parts["backbone"][1]
    assert re.match("loss_cls is NaN, loss_box_reg is NaN at iteration 3", found.problem(1e6, 3))


DAMAGES = {
    "another form": {"form": 2},
    "no batches": {"batches": []},
    "an input without image": {"batches": [[{"height": 3}]]},
    "an unknown structure": {"batches": [[{"image": {"__type__": "Popen", "tensor": torch.ones(1)}}]]},
    "weights elsewhere": {"weights": "../../model.pth"},
    "a negative iteration": {"iteration": -1},
    "a rank of text": {"rank": "0"},
    "losses of text": {"losses": {"loss": "1"}},
    "another field": {"more": 1},
    "a scale of 0": {"loss_scale": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_a_file_of_another_form_is_refused(change, tmp_path):
    path = tmp_path / "step.pt"
    torch.save(valid_step(), path)
    read_bad_step(str(path))
    torch.save({**valid_step(), **change}, path)
    with pytest.raises(UserError, match="is no step that can be taken again") as e:
        read_bad_step(str(path))
    assert "\n" not in str(e.value)


class Trap:
    def __reduce__(self):
        return print, ("run",)


def test_nothing_in_a_file_is_run(tmp_path, capsys):
    torch.save({**valid_step(), "reason": Trap()}, tmp_path / "step.pt")
    (tmp_path / "short.pt").write_bytes(b"PK")
    for name in ("step.pt", "short.pt", "absent.pt"):
        with pytest.raises(UserError, match="is no step that can be taken again"):
            read_bad_step(str(tmp_path / name))
    assert capsys.readouterr().out == ""


def test_the_command_line(tmp_path):
    done = run_tool("replay_step.py", tmp_path / "absent.pt")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr  # fmt: skip
