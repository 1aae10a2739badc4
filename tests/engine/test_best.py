"""TEST.PATIENCE and TEST.LEAVE_BEST: runs that end early, and the student of the best evaluation."""

import json
import logging
import os

import pytest
import torch
from builders import cli
from resume_case import Kill, difference, left_behind, lines, run

from era.engine import trainer as trainer_module
from era.engine.launch import argument_parser
from era.engine.preflight import check_data, setup_config
from era.engine.trainer import Trainer
from era.errors import UserError

PATIENT = ["SEED", "5", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "12", "SOLVER.CHECKPOINT_PERIOD", "3",
           "SOLVER.CHECKPOINTS_KEPT", "0", "TEST.EVAL_PERIOD", "2"]  # fmt: skip


@pytest.fixture
def scored(monkeypatch):
    """Trains in this process, with evaluations that find these AP, in order."""

    def train(args, *values, resume=False):
        seen, left = [], list(values)

        def evaluate(cfg, model):
            seen.append({name: t.clone() for name, t in model.state_dict().items()})
            return {"bbox": {"AP": left.pop(0)}}

        monkeypatch.setattr(trainer_module, "evaluate", evaluate)
        cfg = setup_config(argument_parser().parse_args(args))
        check_data(cfg, for_training=True)
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        found = trainer.train()
        assert not left  # as many evaluations as there are values
        return trainer, seen, found

    return train


def student_of(folder):
    return torch.load(folder / "student" / "model_final.pth", weights_only=True)["model"]


def test_training_ends_when_nothing_gets_better(scored, tiny_data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    opts = [*PATIENT, "TEST.PATIENCE", "2", "TEST.LEAVE_BEST", "True"]
    args = cli(tiny_data, tmp_path, *opts, config="plain")
    trainer, seen, found = scored(args, 3.0, 7.0, 5.0, 7.0)  # an equal one is no better
    assert found == {"bbox": {"AP": 7.0}} and trainer.iter == 8
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == 7 and difference(dict(final["model"]), seen[3]) is None
    assert difference(dict(student_of(tmp_path)), seen[1]) is None
    assert json.loads((tmp_path / "student" / "best.json").read_text()) == {
        "metric": "bbox/AP", "value": 7.0, "iterations": 4, "iterations_of_the_run": 8,
    }  # fmt: skip
    assert "ends after 8 of 12 iterations" in caplog.text
    assert "bbox/AP 7.000 after 4 of 8 iterations" in caplog.text
    assert [line["bbox/AP"] for line in lines(tmp_path) if "bbox/AP" in line][-1] == 7.0

    # Started again, it looks once more, and ends again.
    trainer, _, _ = scored(args, 6.0, resume=True)
    assert trainer.iter == 8 and difference(dict(student_of(tmp_path)), seen[1]) is None


def test_a_better_one_starts_the_count_anew_also_after_a_resume(scored, tiny_data, tmp_path):
    args = cli(tiny_data, tmp_path, *PATIENT, "TEST.PATIENCE", "2", config="plain")
    scored([*args, "SOLVER.MAX_ITER", "6"], 1.0, 9.0, 4.0)  # after 2, after 4, and at the end
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    # The evaluation after 6 iterations comes again: it is the first that is not better, and that after 8 the second.
    trainer, _, _ = scored(args, 4.0, 4.0, resume=True)
    assert trainer.iter == 8
    assert not (tmp_path / "student" / "best.json").exists()


def test_without_patience_a_run_goes_to_its_end_and_leaves_the_last_or_the_best(
    scored, tiny_data, tmp_path
):
    def args(name, *opts):
        return cli(
            tiny_data, tmp_path / name, *PATIENT, "SOLVER.MAX_ITER", "4", *opts, config="era"
        )

    _, seen, _ = scored(args("last"), 5.0, 4.0)
    student = {f"student.{name}": t for name, t in student_of(tmp_path / "last").items()}
    assert all(torch.equal(t, seen[1][name]) for name, t in student.items())
    ema = ["MODEL.EMA.ENABLED", "True", "TEST.LEAVE_BEST", "True"]
    _, seen, _ = scored(args("best", *ema), 5.0, 4.0)
    student = {f"student.{name}": t for name, t in student_of(tmp_path / "best").items()}
    assert all(torch.equal(t, seen[0][name]) for name, t in student.items())
    assert any(not torch.equal(t, seen[1][name]) for name, t in student.items())
    about = json.loads((tmp_path / "best" / "student" / "best.json").read_text())
    assert (about["iterations"], about["value"]) == (2, 5.0)


def test_the_last_evaluation_can_be_the_best(scored, tiny_data, tmp_path):
    opts = [*PATIENT, "SOLVER.MAX_ITER", "5", "TEST.LEAVE_BEST", "True", "TEST.PATIENCE", "1"]
    _, seen, _ = scored(cli(tiny_data, tmp_path, *opts, config="plain"), 1.0, 2.0, 3.0)
    assert difference(dict(student_of(tmp_path)), seen[2]) is None
    assert json.loads((tmp_path / "student" / "best.json").read_text())["iterations"] == 5


def test_a_damaged_best_leaves_the_last_student(scored, tiny_data, tmp_path, caplog, monkeypatch):
    from era.engine import best

    monkeypatch.setattr(best, "damage", lambda path: "its SHA-256 is another")
    opts = [*PATIENT, "SOLVER.MAX_ITER", "4", "TEST.LEAVE_BEST", "True"]
    _, seen, _ = scored(cli(tiny_data, tmp_path, *opts, config="plain"), 2.0, 1.0)
    assert "its SHA-256 is another): the plain student stays the last one" in caplog.text
    assert difference(dict(student_of(tmp_path)), seen[1]) is None
    assert not (tmp_path / "student" / "best.json").exists()


def test_two_processes_end_together_and_a_killed_run_ends_as_one_that_was_not(tiny_data, tmp_path):
    """Without detections every evaluation finds AP 0, of which the first is the best."""
    log = tmp_path / "log.txt"

    def args(name):
        more = [*PATIENT, "TEST.PATIENCE", "3", "TEST.LEAVE_BEST", "True", "MODEL.EMA.ENABLED", "True",
                "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0"]  # fmt: skip
        return ["--num-gpus", "2", *cli(tiny_data, tmp_path / name, *more, config="plain")]

    assert run(args("whole"), log=log) == 0, log.read_text()[-3000:]
    assert run(args("killed"), kill=Kill(step=6, rank=1), log=log) == 1
    assert run(["--resume", *args("killed")], log=log) == 0, log.read_text()[-3000:]
    expected, found = left_behind(tmp_path / "whole"), left_behind(tmp_path / "killed")
    assert difference(found, expected) is None
    assert found["model_final.pth"]["iteration"] == 7  # the first of four is the best
    assert (
        json.loads((tmp_path / "killed" / "student" / "best.json").read_text())["iterations"] == 2
    )
    assert log.read_text().count("ends after 8 of 12 iterations") == 2


@pytest.mark.parametrize(
    "opts, told",
    [
        (["TEST.PATIENCE", "-1"], "TEST.PATIENCE is -1: expected a number of evaluations"),
        (["TEST.PATIENCE", "3"], "TEST.PATIENCE is 3, and no evaluations are compared"),
        (["TEST.LEAVE_BEST", "True"], "set them, or set TEST.LEAVE_BEST False"),
        (
            ["TEST.PATIENCE", "3", "TEST.EVAL_PERIOD", "5", "TEST.BEST_METRIC", ""],
            "TEST.PATIENCE is 3",
        ),
        (
            ["TEST.PATIENCE", "3", "TEST.EVAL_PERIOD", "5", "DATASETS.TEST", "()"],
            "TEST.PATIENCE is 3",
        ),
    ],
)
def test_settings_that_compare_nothing_are_refused(tiny_data, tmp_path, opts, told):
    args = cli(tiny_data, tmp_path / "run", *opts, config="plain")
    with pytest.raises(UserError, match=told):
        setup_config(argument_parser().parse_args(args))
