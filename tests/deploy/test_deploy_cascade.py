"""Export of a Cascade R-CNN, and of a Faster R-CNN under a cascade's heads."""

import json
from pathlib import Path

import deploy_case
import numpy as np
import pytest
from deploy_case import needs, run
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

import era_runtime
from era.config import load_config
from era.deploy import formats, parity
from era.deploy.export import export
from era.errors import UserError
from era.modeling.detectors import detector_of

# What is exported: the run's config, and alpha.
CASES = {
    "cascade": ("cascade_era", 0),
    "cascade under a cascade's heads": ("cascade_era", 1),
    "Faster R-CNN under a cascade's heads": ("cascade_era_faster", 1),
}


def source(case: str):
    """A run's student, see :func:`deploy_case.quiet_source`."""
    config, alpha = CASES[case]
    return deploy_case.source(alpha, config)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", map(needs, formats.FORMATS))
def test_export_equals_eager_at_many_sizes_and_on_an_empty_image(name, case, tmp_path):
    report = export(source(case), name, str(tmp_path / "folder"))
    assert report.problems == []
    assert len({one.input_size for one in report.cases}) >= 5
    assert report.empty_checked == "image"
    assert sum(one.eager for one in report.cases) > 10
    assert max(one.box_difference for one in report.cases) < 0.005
    manifest = json.loads((tmp_path / "folder" / "manifest.json").read_text())
    assert (
        manifest["score_threshold"] == detector_of(source(case).model).thresholds["score_threshold"]
    )
    if name == "onnx":
        check_graph(tmp_path / "folder" / "model.onnx")
    found = era_runtime.load(tmp_path / "folder")(parity.sample_images(source(case).rules)[2])
    assert len(found) > 0 and found.boxes.shape == (len(found), 4)


def check_graph(path: Path) -> None:
    """A ROIAlign a stage and level, and no branch."""
    import onnx

    nodes = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert nodes.count("RoiAlign") == 3 * 3
    assert "If" not in nodes


def test_alpha_0_detectron2_folder_is_stock(tmp_path):
    """Stock ``get_cfg`` reads the config, ``DefaultPredictor`` gives what the deployed model gives."""
    export(source("cascade"), "detectron2", str(tmp_path / "folder"))
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "folder" / "config.yaml"))
    assert cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads"
    cfg.MODEL.WEIGHTS = str(tmp_path / "folder" / "model.pth")
    image = parity.sample_images(source("cascade").rules)[2]
    expected = DefaultPredictor(cfg)(image)["instances"]
    found = era_runtime.load(tmp_path / "folder")(image)
    assert len(found) > 0
    np.testing.assert_array_equal(expected.pred_boxes.tensor.numpy(), found.boxes)
    np.testing.assert_array_equal(expected.scores.numpy(), found.scores)


def test_the_deployed_cascade_at_alpha_1_has_the_students_settings_and_no_backbone_of_the_teacher():
    deployed = source("Faster R-CNN under a cascade's heads")
    distiller, model = deployed.eager, deployed.model
    teacher = distiller.teacher.model
    parts = (distiller.student.backbone, distiller.methods["era"].estimator)
    parts += (teacher.proposal_generator, teacher.roi_heads)
    count = sum(p.numel() for part in parts for p in part.parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    assert detector_of(model).thresholds == detector_of(distiller.student).thresholds


def test_masks_under_a_cascades_heads_are_refused():
    masks = ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
    cfg = load_config(str(run("cascade_era") / "config.yaml"), [*masks, "MODEL.ERA.ALPHA", "1.0"])
    with pytest.raises(UserError, match="the student has a mask or keypoint head"):
        build_model(cfg).deployable()
