"""A Cascade R-CNN from the command line to a report, its rows in the benchmark, its configs."""

import json

import pytest
import torch
from builders import REPO, TINY, TINY_TEACHER, TOY, cli, run_tool
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from era.benchmark.cli import main as benchmark_main
from era.config import load_config, student_config
from era.deploy.export import export_main
from era.report.cli import report_main
from era_runtime.predict import main as predict_main

TEACHER = ["MODEL.TEACHER.CONFIG_FILE", str(TOY / "cascade_teacher.yaml")]
MASKS = ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
         "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """OUTPUT_DIR of a Cascade Mask R-CNN distilled from another one."""
    folder = tmp_path_factory.mktemp("cascade") / "run"
    teacher = ["MODEL.TEACHER.OPTS", str([*TINY_TEACHER, *MASKS])]
    done = run_tool(
        "train_net.py",
        *cli(tiny_data, folder, *TEACHER, *MASKS, *teacher, "SOLVER.MAX_ITER", "20", "SEED", "5",
             "TEST.EVAL_TEACHER", "True", "MODEL.ERA.TWI.STAGES", "all", config="cascade_era"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_training_logs_every_stage_and_evaluates_both(run):
    with open(run / "metrics.json") as f:
        last = {key: value for line in f for key, value in json.loads(line).items()}
    for k in range(3):
        assert last[f"loss_cls_stage{k}"] > 0 and f"loss_box_reg_stage{k}" in last
    assert last["loss_mask"] > 0 and last["loss_era_twi_roi"] > 0
    for key in ("bbox/AP", "segm/AP", "teacher/bbox/AP", "teacher/segm/AP"):
        assert key in last
    # its own statistics, apart from those of the teacher's heads on the estimates
    assert "stage2/roi_head/num_fg_samples" in last and "stage2/fast_rcnn/cls_accuracy" in last
    assert "teacher_heads/fast_rcnn/cls_accuracy" in last


def test_the_student_is_one_of_stock_detectron2(run):
    cfg = get_cfg()
    cfg.merge_from_file(str(run / "student" / "config.yaml"))
    assert cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads"
    weights = torch.load(run / "student" / "model_final.pth", weights_only=True)["model"]
    build_model(cfg).load_state_dict(weights, strict=True)


def test_export_prediction_and_report(run, tmp_path, tiny_data):
    deployed, found = tmp_path / "deployed", tmp_path / "found"
    export_main(["--run", str(run), "--format", "detectron2", "--output", str(deployed),
                 "--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"])  # fmt: skip
    pictures = next(iter(json.loads(tiny_data[1].replace("'", '"'))))[2]
    assert (
        predict_main([pictures, "--model", str(deployed), "--output", str(found), "--no-pictures"])
        == 0
    )
    results = json.loads((found / "results.json").read_text())
    assert results and {"bbox", "score", "segmentation"} <= results[0].keys()
    report_main([str(run), "--output", str(tmp_path / "report.html"), "--pictures", "0",
                 "--deployed", str(deployed)])  # fmt: skip
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(words in page for words in ("own detection loss", "Mask AP by class", "deployed"))


def test_rows_of_the_benchmark(tmp_path):
    """As of any other pair, and a row of the first stage as the only judge; a Faster R-CNN as teacher has no such row."""
    flags = [
        "--config-file",
        str(TOY / "cascade_era_faster.yaml"),
        "--height",
        "64",
        "--width",
        "64",
    ]
    flags += [
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--warmup",
        "0",
        "--json",
        str(tmp_path / "r.json"),
    ]
    opts = [*TINY, "MODEL.TEACHER.OPTS", str(TINY_TEACHER), "MODEL.ERA.HIDDEN_CHANNELS", "4"]
    wanted = ["ERA", "ERA, as defined", "ERA, all stages judge", "inference: alpha 1"]
    rows = [x for name in wanted for x in ("--rows", name)]
    benchmark_main([*flags, *rows, *opts, *TEACHER])
    measured = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert set(wanted) < measured.keys() and all(measured[name]["ratio"] > 0 for name in wanted)


@pytest.mark.parametrize(
    "distilled, baseline",
    [
        ("cascade_era_r50", "cascade_plain_r50"),
        ("cascade_era_faster_r50", "plain_r50"),
        ("toy/cascade_era", "toy/cascade_plain"),
        ("toy/cascade_era_faster", "toy/plain"),
    ],
)
def test_baseline_and_distilled_student_differ_in_distillation_alone(distilled, baseline):
    a, b = (load_config(str(REPO / "configs" / f"{name}.yaml")) for name in (distilled, baseline))
    for cfg in (a, b):
        cfg.OUTPUT_DIR = ""
    assert student_config(a) == student_config(b)
