"""A teacher of other classes from the command line to a report."""

import json

import pytest
import torch
from builders import TINY_TEACHER, cli, run_tool
from classes_case import ALL, names_file, options, raw_teacher
from detectron2.modeling import build_model

from era.config import load_config
from era.deploy.export import export_main
from era.engine.launch import train_net
from era.errors import UserError
from era.report.cli import report_main
from era_runtime.predict import main as predict_main


def arguments(tiny_data, folder, *opts, names=ALL[:3]):
    own, other = options(folder.parent, names)
    teacher = ["MODEL.TEACHER.OPTS", str([*TINY_TEACHER, *map(str, other)])]
    return cli(tiny_data, folder, *teacher, *own, "SOLVER.MAX_ITER", "6", "SEED", "5", *opts)


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """OUTPUT_DIR of an ERA run under a teacher that knows two of the eight classes, evaluated beside the student."""
    folder = tmp_path_factory.mktemp("classes") / "run"
    judges = ["MODEL.ERA.KD_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", "1.0",
              "TEST.EVAL_TEACHER", "True", "MODEL.DISTILLER.INIT_STUDENT", "heads"]  # fmt: skip
    done = run_tool("train_net.py", *arguments(tiny_data, folder, *judges))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_it_trains_evaluates_and_says_what_is_matched(run):
    log = (run / "log.txt").read_text(encoding="utf-8")
    rows = [line.split() for line in log.splitlines()]
    assert ["star", "(7)", "star", "(0)", "the", "teacher", "judges"] in rows
    assert ["ring", "(1)", "-", "ground", "truth", "and", "features", "alone"] in rows
    assert ["-", "1", "more", "not", "asked"] in rows
    with open(run / "metrics.json") as f:
        last = {key: value for line in f for key, value in json.loads(line).items()}
    assert last["bbox/AP"] >= 0 and last["teacher/bbox/AP"] >= 0
    for name in ("loss_era_kd", "loss_era_twi_roi", "loss_era_soft_roi"):
        assert 0 <= last[name] < 100


def test_export_prediction_and_report(run, tmp_path, tiny_data):
    deployed, found = tmp_path / "deployed", tmp_path / "found"
    export_main(["--run", str(run), "--format", "detectron2", "--output", str(deployed),
                 "--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"])  # fmt: skip
    pictures = next(iter(json.loads(tiny_data[1].replace("'", '"'))))[2]
    flags = [pictures, "--model", str(deployed), "--output", str(found), "--no-pictures"]
    assert predict_main(flags) == 0
    assert json.loads((found / "results.json").read_text())
    report_main([str(run), "--output", str(tmp_path / "report.html"), "--pictures", "0",
                 "--deployed", str(deployed)])  # fmt: skip
    assert "Teacher" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_teacher_of_all_classes_is_deployed_with_its_heads(tiny_data, tmp_path):
    """At alpha 1: the folder holds the heads as they are read, and needs no names to be loaded."""
    run, deployed = tmp_path / "run", tmp_path / "deployed"
    weights = tmp_path / "teacher.pth"
    torch.save({"model": raw_teacher(tmp_path, ALL).state_dict()}, weights)
    args = arguments(tiny_data, run, "MODEL.TEACHER.WEIGHTS", str(weights), names=ALL)
    cfg = load_config(args[1], args[2:])
    model = build_model(cfg)
    run.mkdir()
    torch.save({"model": model.state_dict()}, run / "model_final.pth")
    (run / "config.yaml").write_text(cfg.dump())
    export_main(["--run", str(run), "--format", "detectron2", "--alpha", "1", "--output", str(deployed),
                 "--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"])  # fmt: skip
    names_file(tmp_path, ("gone",))
    pictures = next(iter(json.loads(tiny_data[1].replace("'", '"'))))[2]
    flags = [
        pictures,
        "--model",
        str(deployed),
        "--output",
        str(tmp_path / "found"),
        "--no-pictures",
    ]
    assert predict_main(flags) == 0
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert {x["category_id"] for x in found} <= set(range(1, 9))


def test_names_that_match_nothing_stop_the_run_before_anything_is_written(tiny_data, tmp_path):
    args = arguments(tiny_data, tmp_path / "run", names=("cat", "dog"))
    with pytest.raises(
        UserError, match=r"none of the student's classes \(disk, ring.*\(cat, dog\)"
    ):
        train_net(args)
    assert not (tmp_path / "run").exists()
