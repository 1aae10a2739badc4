"""The main command on real COCO photos under Detectron2's built-in names."""

import json

import pytest
import torch
from builders import REPO, run_tool

SAMPLE = REPO.parent / "shared" / "coco_sample"


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no COCO photos: {SAMPLE} is absent")
def test_the_flagship_runs_on_real_photos(tmp_path):
    """configs/era_r101_r50.yaml as it stands; overrides shorten it and say that the zoo's weights are
    not at hand: maps of random R101s with frozen normalisation have no bound that a loss could be held to, and
    depend on the seed. Real mapper, real 80 classes, crowd boxes, evaluation of real annotations."""
    run = tmp_path / "run"
    done = run_tool(
        "train_net.py", "--config-file", "configs/era_r101_r50.yaml",
        "MODEL.WEIGHTS", "", "MODEL.TEACHER.WEIGHTS", "", "MODEL.TEACHER.ALLOW_RANDOM", "True",
        "SEED", "1", "SOLVER.MAX_LOSS", ".inf",
        "SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "2",
        "INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MIN_SIZE_TEST", "128", "INPUT.MAX_SIZE_TEST", "200",
        "INPUT.MAX_SIZE_TRAIN", "200", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", run,
        env={"DETECTRON2_DATASETS": str(SAMPLE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    if not torch.cuda.is_available():
        assert "running on the CPU" in done.stdout + done.stderr
    with open(run / "metrics.json") as f:
        metrics = {k: v for line in f for k, v in json.loads(line).items()}
    for name in ("feature", "residual", "soft_rpn", "soft_roi"):
        assert metrics[f"loss_era_{name}"] > 0
    assert 0 <= metrics["bbox/AP"] <= 100
    assert (run / "student" / "model_final.pth").exists()
