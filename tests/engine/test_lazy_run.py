"""LazyConfigs and levels that differ, from the command line to a report: a tiny ViT teaches p2 to p6 of an FPN student, and a
student of a LazyConfig is distilled."""

import json

import pytest
from builders import FROM_P2, TINY_TEACHER, TOY, cli, run_tool
from deploy_case import needs
from lazy_case import SMALL_RCNN, vit

from era.deploy.export import export_main
from era.errors import UserError
from era.report.cli import report_main
from era_runtime.predict import main as predict_main

SHORT = ["SOLVER.MAX_ITER", "4", "SEED", "5"]


def last_metrics(run):
    with open(run / "metrics.json") as f:
        return {key: value for line in f for key, value in json.loads(line).items()}


def predicted(deployed, tiny_data, output):
    pictures = next(iter(json.loads(tiny_data[1].replace("'", '"'))))[2]
    flags = [pictures, "--model", str(deployed), "--output", str(output), "--no-pictures"]
    assert predict_main(flags) == 0
    return json.loads((output / "results.json").read_text())


def reported(run, deployed, path):
    report_main([str(run), "--output", str(path), "--pictures", "0", "--deployed", str(deployed)])
    return path.read_text(encoding="utf-8")


def test_a_vit_teaches_an_fpn_with_a_level_of_its_own(tiny_data, tmp_path):
    """MTPD on p2 to p6 under a simple feature pyramid of p3 to p6, and the ViT is evaluated beside the student."""
    run, deployed = tmp_path / "run", tmp_path / "deployed"
    own = ["MODEL.DISTILLER.METHODS", "['MTPD']", "MODEL.MTPD.LEVELS", "['p2', 'p3', 'p4', 'p5', 'p6']",
           "MODEL.DISTILLER.RESAMPLE_LEVELS", "True", "TEST.EVAL_TEACHER", "True", *FROM_P2, *SHORT]  # fmt: skip
    done = run_tool("train_net.py", *cli(tiny_data, run, *vit(*own)))
    assert done.returncode == 0, done.stderr[-2000:]
    last = last_metrics(run)
    assert last["loss_mtpd_feature"] > 0 and "teacher/bbox/AP" in last and "bbox/AP" in last
    log = " ".join((run / "log.txt").read_text(encoding="utf-8").split())
    assert "p2 of stride 4 p3 of stride 8 enlarged 2 times" in log
    export_main(["--run", str(run), "--format", "detectron2", "--output", str(deployed),
                 "--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"])  # fmt: skip
    assert predicted(deployed, tiny_data, tmp_path / "found")
    assert "MTPD" in reported(run, deployed, tmp_path / "report.html")


@pytest.mark.parametrize("form", [needs("onnx")])
def test_a_student_of_a_lazyconfig_is_distilled_exported_and_reported(tiny_data, tmp_path, form):
    run, deployed = tmp_path / "run", tmp_path / "deployed"
    args = cli(tiny_data, run, *SHORT, "MODEL.TEACHER.CONFIG_FILE", str(TOY / "teacher.yaml"),
               "MODEL.TEACHER.OPTS", str(TINY_TEACHER))  # fmt: skip
    done = run_tool(
        "lazyconfig_train_net.py",
        "--config-file",
        "configs/lazy/toy_era.py",
        *args[2:],
        *SMALL_RCNN,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    last = last_metrics(run)
    assert last["loss_era_feature"] > 0 and "bbox/AP" in last
    assert (run / "student" / "model_final.pth").is_file()
    export = ["--run", str(run), "--format", form, "--output", str(deployed),
              "--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"]  # fmt: skip
    with pytest.raises(UserError, match=r"toy_era\.py, Python code.*add MODEL\.LAZY\.TRUST True"):
        export_main(export)
    assert not deployed.exists()
    export_main([*export, "MODEL.LAZY.TRUST", "True"])
    assert isinstance(predicted(deployed, tiny_data, tmp_path / "found"), list)
    assert "ERA" in reported(run, deployed, tmp_path / "report.html")
