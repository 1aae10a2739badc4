"""Runs that are killed and go on end as the run that was never killed, to the bit."""

import pytest
import torch
from builders import cli, tiny_model
from resume_case import Kill, difference, left_behind, run

LENGTH = ["SOLVER.MAX_ITER", "24", "SOLVER.CHECKPOINT_PERIOD", "5", "SOLVER.CHECKPOINTS_KEPT", "2",
          "TEST.EVAL_PERIOD", "8", "SOLVER.WARMUP_ITERS", "10", "SOLVER.STEPS", "(18,)"]  # fmt: skip
SEEDED = ["SEED", "5"]
UNLABELED = ["DATASETS.UNLABELED", "('tiny_val',)", "DATASETS.TEST", "('tiny_train',)",
             "SOLVER.IMS_PER_BATCH", "4", "SOLVER.UNLABELED_PER_BATCH", "2"]  # fmt: skip
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
        [Kill(step=12), Kill(step=22)],
    ),
    "two": (  # processes, and pictures without labels

        "era",
        [*SEEDED, *UNLABELED, "MODEL.ERA.NORM", "GN"],
        [Kill(step=12, rank=1), Kill(write="model_0000014.pth")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(name, tiny_data, tmp_path):
    config, opts, kills = CASES[name]
    processes = ["--num-gpus", "2" if name == "two" else "1"]

    teacher = tmp_path / "teacher.pth"
    torch.save({"model": tiny_model().teacher.model.state_dict()}, teacher)

    def args(folder):
        more = [*LENGTH, *opts, "MODEL.TEACHER.WEIGHTS", teacher]
        return [*processes, *cli(tiny_data, tmp_path / folder, *more, config=config)]

    assert run(args("whole"), log=tmp_path / "whole.txt") == 0
    log, draw = tmp_path / "killed.txt", 5
    for kill in kills:
        status = run(["--resume", *args("killed")], kill=kill, log=log, draw=draw)
        assert status == (1 if name == "two" else -9), log.read_text()[-3000:]
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
