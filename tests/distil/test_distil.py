"""The whole road on a CPU: a folder of pictures, a teacher of other classes, a stop on the way, a deployed student."""

import json
import os

import pytest
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from distil_case import Forked, make_stranger

from era.distil import cli, timing
from era.distil.request import argument_parser, read_request
from era.distil.state import read_state
from era.errors import UserError
from era.runs.folder import MARKER
from era.runs.reading import read_run
from era_runtime import load
from era_runtime.inputs import image_files
from era_runtime.preprocess import read_image


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return make_stranger(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def done(stranger, tmp_path_factory):
    """Output of a distillation with a plain baseline that was stopped before its last training and gone on with;
    names of the runs that each call started, and what was said."""
    output = tmp_path_factory.mktemp("out") / "distil"
    calls: list[list[str]] = []

    def start(run, threads, gpus):
        calls[-1].append(run.name)
        if run.name == "distilled" and len(calls) == 1:
            raise KeyboardInterrupt
        return Forked(run, threads, gpus)

    args = stranger.args(output, "--baseline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "go_on_process", start)
        patch.setattr(
            timing, "take_steps", lambda *_, **__: {"seconds": [0.1], "test_seconds": 0.1}
        )
        calls.append([])
        with pytest.raises(SystemExit, match="130"):
            cli.main(args)
        calls.append([])
        patch.setattr(timing, "take_steps", None)  # what was measured is remembered
        assert cli.main(args) == 0
        calls.append([])
        assert cli.main(args) == 0
    return output, calls, args


def test_the_same_command_goes_on_where_it_was_stopped(done):
    _, calls, _ = done
    assert calls == [
        ["teacher", "plain", "distilled"],
        ["distilled", "plain_best", "distilled_best"],
        [],
    ]


def test_the_data_are_divided_by_picture_and_written_down(done, stranger):
    output, _, _ = done
    split = json.loads((output / "data" / "split.json").read_text())
    assert len(split["train"]) == 8 and len(split["val"]) == 2 and split["seed"] == 1
    assert set(split["train"]).isdisjoint(split["val"])
    assert {*split["train"], *split["val"]} == set(os.listdir(stranger.folder / "photos"))
    val = json.loads((output / "data" / "val.json").read_text())
    assert sorted(i["file_name"] for i in val["images"]) == split["val"]
    for entry in val["annotations"]:  # what the stranger left out
        assert entry["area"] == entry["bbox"][2] * entry["bbox"][3] and entry["iscrowd"] == 0


def test_the_student_is_a_stock_model_and_says_which_evaluation_it_is_of(done):
    student = done[0] / "distilled" / "student"
    best = json.loads((student / "best.json").read_text())
    assert best["metric"] == "bbox/AP" and 1 <= best["iterations"] <= 2
    cfg = get_cfg()
    cfg.merge_from_file(str(student / "config.yaml"))
    model = build_model(cfg)
    wrong = DetectionCheckpointer(model).load(str(student / "model_final.pth"))
    assert "iteration" not in wrong and cfg.MODEL.RESNETS.DEPTH == 10


def test_what_is_left_is_what_is_reported_and_deployed(done, stranger):
    output, _, _ = done
    run = read_run(output / "distilled", "student")
    best = json.loads((output / "distilled/best/inference/coco_instances_results.json").read_text())
    assert run.detections == best and run.recorded == {} and run.iterations == 2
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Plain student" in page and "Distilled student" in page and "torchscript" in page
    assert "the best of its evaluations" in page and "chosen on the validation pictures" in page
    model = load(output / "deployed" / "torchscript")
    found = model(read_image(image_files([str(stranger.folder / "photos")])[0]))
    assert {c["name"] for c in model.categories} == {f"my {n}" for n in _names(stranger)}
    assert found.boxes.shape[1] == 4


def _names(stranger):
    data = json.loads((stranger.folder / "my.json").read_text())
    return [c["name"].removeprefix("my ") for c in data["categories"]]


def test_another_request_or_other_data_do_not_go_on_there(done, stranger):
    _, _, args = done
    with pytest.raises(UserError, match=r"holds another distillation .*seed was 1 and is 2"):
        cli.main([*args, "--seed", "2"])
    data = stranger.folder / "my.json"
    before = data.read_text()
    data.write_text(before + " ")
    try:
        with pytest.raises(UserError, match=r"my\.json has changed since"):
            cli.main(args)
    finally:
        data.write_text(before)


def test_a_teacher_of_the_datas_classes_is_taken_as_it_is(stranger, tmp_path, capsys):
    """With steps that are really taken."""
    args = stranger.args(tmp_path / "o", "--dry-run")
    args[1] = str(stranger.folder / "era_toy" / "annotations" / "train.json")
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    assert "taken as it is: its classes are the data's" in said and "fine-tune" not in said
    assert "24 / 36 / 52 / 76 pixels" in said and "for it stays as it is" in said
    assert "distil toy by ERA: 2 steps, 2 evaluations" in said


def test_a_dry_run_says_all_and_writes_nothing(stranger, tmp_path, monkeypatch, capsys):
    def steps(case, processes, *, on_gpu):
        assert case.cfg.SOLVER.MAX_ITER == 2 and not on_gpu
        return {"seconds": [600.0, 600.0, 600.0], "test_seconds": 0.5}

    monkeypatch.setattr(timing, "take_steps", steps)
    output = tmp_path / "nothing"
    assert cli.main([*stranger.args(output), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "8 to train on, 2 to validate with" in said and "drawn with the seed 1" in said
    assert "fine-tuned: its 8 classes are not the 8 of the data" in said
    assert "anchors" in said and "mean IoU 0." in said
    assert "about 42 min" in said  # 2 x 2 x 600 s, starts, evaluations, an export and the report
    assert "Nothing was written" in said and not output.exists()


def test_a_step_that_needs_too_much_memory_is_tried_with_half_the_pictures(
    stranger, tmp_path, monkeypatch, capsys
):
    tried = []

    def steps(case, processes, *, on_gpu):
        tried.append(case.cfg.SOLVER.IMS_PER_BATCH)
        if tried[-1] > 2:
            return {"problem": "CUDA out of memory. Tried to allocate 2 GiB", "output": ""}
        return {"seconds": [1.0], "test_seconds": 0.1}

    monkeypatch.setattr(timing, "take_steps", steps)
    assert cli.main([*stranger.args(tmp_path / "o"), "--dry-run"]) == 0
    assert tried == [8, 4, 2, 2] and "2 pictures" in capsys.readouterr().out


def test_a_training_that_cannot_take_a_step_is_told_before_anything_is_written(
    stranger, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        timing, "take_steps", lambda *_, **__: {"problem": "it broke", "output": ""}
    )
    with pytest.raises(UserError, match="teacher cannot be trained: it broke"):
        cli.main(stranger.args(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_a_folder_that_another_process_begins_meanwhile_is_left_to_it(
    stranger, tmp_path, monkeypatch
):
    def steps(case, processes, *, on_gpu):
        (tmp_path / "o").mkdir(exist_ok=True)
        for name in (MARKER, "distil.json"):
            (tmp_path / "o" / name).write_text("")
        return {"seconds": [1.0], "test_seconds": 0.1}

    monkeypatch.setattr(timing, "take_steps", steps)
    with pytest.raises(UserError, match="another process has begun a distillation"):
        cli.main(stranger.args(tmp_path / "o"))
    assert {p.name for p in (tmp_path / "o").iterdir()} == {MARKER, "distil.json"}


def test_what_was_stopped_before_it_began_is_begun_again(stranger, tmp_path):
    (tmp_path / "data").mkdir()
    for name in (MARKER, "teacher.yaml", "environment.txt"):
        (tmp_path / name).touch()
    request = read_request(argument_parser().parse_args(stranger.args(tmp_path)))
    assert read_state(request) is None
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match=r"holds files of something else \(mine.txt"):
        read_state(request)
