"""A student on MobileNetV2 from the command line to a report: trained, evaluated, exported, reported."""

import json

import pytest
import torch
import torchvision
from builders import REPO, cli, run_tool
from deploy_case import needs
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from era.convert.cli import convert
from era.deploy.export import export_main
from era.report.cli import report_main


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A classifier's weights, converted for the student."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(4)
    torch.save(torchvision.models.mobilenet_v2(weights=None).state_dict(), folder / "mv2.pth")
    config = REPO / "configs" / "toy" / "era_mv2.yaml"
    convert(str(folder / "mv2.pth"), str(config), str(folder / "out"))
    return folder / "out" / "model.pth"


@pytest.fixture(scope="module")
def run(tiny_data, weights, tmp_path_factory):
    """OUTPUT_DIR of a short run that starts from them."""
    folder = tmp_path_factory.mktemp("mv2") / "run"
    done = run_tool(
        "train_net.py",
        *cli(tiny_data, folder, "SOLVER.MAX_ITER", "12", "SEED", "5", "MODEL.WEIGHTS", str(weights),
             "MODEL.BACKBONE.FREEZE_AT", "1", config="era_mv2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_it_trains_from_converted_weights_and_is_evaluated(run, weights):
    with open(run / "metrics.json") as f:
        last = {key: value for line in f for key, value in json.loads(line).items()}
    assert last["loss_era_feature"] > 0 and "bbox/AP" in last
    cfg = get_cfg()  # stock Detectron2's keys alone
    cfg.merge_from_file(str(run / "student" / "config.yaml"))
    trained = torch.load(run / "student" / "model_final.pth", weights_only=True)["model"]
    build_model(cfg).load_state_dict(trained, strict=True)
    start = torch.load(weights, weights_only=True)["model"]
    bottom_up = {k: torch.equal(v, trained[k]) for k, v in start.items() if "weight" in k}
    frozen = {k for k, same in bottom_up.items() if same}
    assert frozen == {k for k in bottom_up if ".features.0." in k or ".features.1." in k}, (
        "the stem"
    )


# OpenVINO's conversion of a whole detector takes over half a minute: tests/deploy/test_deploy_backbones.py compares the maps.
@pytest.mark.parametrize("name", [needs("onnx")])
def test_it_is_exported_with_parity_and_reported(name, run, tmp_path):
    deployed = tmp_path / "deployed"
    export_main(["--run", str(run), "--format", name, "--output", str(deployed),
                 "--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"])  # fmt: skip
    report = json.loads((deployed / "parity.json").read_text())
    assert report["problems"] == [] and sum(case["eager"] for case in report["cases"]) > 10
    page = tmp_path / "report.html"
    report_main([str(run), "--output", str(page), "--pictures", "0", "--deployed", str(deployed)])
    text = page.read_text(encoding="utf-8")
    assert "mobilenetv2_fpn" in text and "deployed" in text
