"""SOLVER.MAX_SECONDS: trainings that are done in time on a clock that the tests move, and end with their schedule."""

import itertools
import json
import logging
import os
from types import SimpleNamespace

import pytest
import torch
from builders import cli
from detectron2.utils import comm
from fvcore.common.param_scheduler import CosineParamScheduler
from resume_case import difference

from era import compat
from era.engine import time_limit
from era.engine import trainer as trainer_module
from era.engine.launch import argument_parser
from era.engine.preflight import check_data, setup_config
from era.engine.schedule import Shortened
from era.engine.time_limit import TimeLimit, read_shortened
from era.engine.trainer import Trainer
from era.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """Seconds in ``now``, of everything that is timed."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time_limit, "clock", lambda: clock.now)
    return clock


# ---- the schedule ----------------------------------------------------------------------------------


def test_a_shortened_schedule_goes_on_where_it_was_and_comes_to_its_end():
    cosine = CosineParamScheduler(1.0, 0.0)
    schedule = Shortened(cosine, 100)
    assert [schedule(i / 100) for i in range(101)] == [cosine(i / 100) for i in range(101)]
    schedule.end_at(70, 40)  # 60 hundredths in 30 iterations
    parts = [schedule.part_done(i) for i in (0, 20, 40, 55, 70, 80)]
    assert parts == pytest.approx([0.0, 0.2, 0.4, 0.7, 1.0, 1.0])
    assert schedule(0.55) == pytest.approx(cosine(0.7)) and schedule(0.7) == pytest.approx(0.0)
    schedule.end_at(85, 55)  # and slower again
    assert [schedule.part_done(i) for i in (40, 55, 70, 85)] == pytest.approx([0.4, 0.7, 0.85, 1.0])
    again = Shortened(cosine, 100)
    assert again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert again.knots == schedule.knots and again.end == 85
    assert not Shortened(cosine, 90).load_state_dict(schedule.state_dict())  # another schedule


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"iterations": 9, "knots": []},
        {"iterations": 9, "knots": [[0, 0.0], [5, 1.0], [4, 1.0]]},
        {"iterations": 9, "knots": [[0, 0.0], ["5", 0.5], [6, 1.0]]},
        {"iterations": 9, "knots": [[0, 0.0], [5, float("nan")], [6, 1.0]]},
    ],
)
def test_what_is_no_state_of_a_schedule_is_refused(state):
    with pytest.raises(ValueError, match="of another form"):
        Shortened(CosineParamScheduler(1.0, 0.0), 9).load_state_dict(state)


# ---- the hook on a clock ---------------------------------------------------------------------------


def take(clock, folder, *, seconds, step, whole=200, period=50, evaluation=10.0):
    """Iterations that were done, seconds that they and the evaluations took, and the hook.

    Args:
        step: seconds of an iteration by its number.
    """
    schedule = Shortened(CosineParamScheduler(1.0, 0.0), whole)
    hook = TimeLimit(schedule, seconds=seconds, eval_period=period, folder=str(folder))
    hook.trainer = SimpleNamespace(iter=0, max_iter=whole)
    began = clock.now
    hook.before_train()
    while hook.trainer.iter < hook.trainer.max_iter:
        hook.before_step()
        clock.now += step(hook.trainer.iter)
        hook.after_step()
        hook.trainer.iter += 1
        if hook.trainer.iter % period == 0 and hook.trainer.iter < hook.trainer.max_iter:
            clock.now += evaluation
    clock.now += evaluation  # the last one
    return hook.trainer.iter, clock.now - began, hook


def test_in_time_nothing_changes(clock, tmp_path):
    # 200 s and 4 evaluations of 10 s
    done, took, hook = take(clock, tmp_path, seconds=245, step=lambda i: 1.0)
    assert (done, took) == (200, 240.0) and hook.state_dict() == {}
    assert list(tmp_path.iterdir()) == [] and read_shortened(tmp_path) is None


def test_without_a_limit_nothing_changes(clock, tmp_path):
    assert take(clock, tmp_path, seconds=0, step=lambda i: 9.0)[0] == 200


@pytest.mark.parametrize("slow", [0, 20, 100, 150, 190])
def test_a_slower_machine_shortens_the_schedule_so_that_it_is_in_time(clock, tmp_path, slow):
    done, took, hook = take(clock, tmp_path, seconds=245, step=lambda i: 3.0 if i >= slow else 1.0)
    assert done < 200 and 220 < took <= 245 + 3.0  # a step is taken to its end
    assert hook.schedule.end == done and hook.schedule.part_done(done) == 1.0
    assert read_shortened(tmp_path) == (done, 200)


def test_the_learning_rate_makes_no_jump(clock, tmp_path):
    _, _, hook = take(clock, tmp_path, seconds=245, step=lambda i: 3.0 if i >= 60 else 1.0)
    factors = [hook.schedule(i / 200) for i in range(hook.schedule.end + 1)]
    drops = [a - b for a, b in itertools.pairwise(factors)]
    assert min(drops) >= 0 and max(drops) < 0.05 and factors[-1] == pytest.approx(0.0)


def test_a_stall_that_passes_costs_little_more_than_its_time(clock, tmp_path):
    done, took, _ = take(clock, tmp_path, seconds=245, step=lambda i: 41.0 if i == 60 else 1.0)
    assert took <= 246 and done >= 200 - 40  # 40 s are 40 steps


def test_a_time_that_is_over_ends_at_the_next_step(clock, tmp_path):
    done, _, hook = take(clock, tmp_path, seconds=5, step=lambda i: 10.0)
    assert done == 1 and hook.schedule.part_done(1) == 1.0


def test_processes_end_together(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, 120])
    done, _, _ = take(clock, tmp_path, seconds=1000, step=lambda i: 1.0)
    assert done == 120


# ---- real trainings --------------------------------------------------------------------------------

OPTS = ["SEED", "5", "SOLVER.MAX_ITER", "30", "SOLVER.BASE_LR", "0.01", "SOLVER.WARMUP_ITERS", "3",
        "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.CHECKPOINT_PERIOD", "4", "SOLVER.CHECKPOINTS_KEPT", "0",
        "TEST.EVAL_PERIOD", "10", "TEST.LEAVE_BEST", "True", "MODEL.EMA.ENABLED", "True"]  # fmt: skip


@pytest.fixture
def slow(clock, monkeypatch):
    """Trains in this process with a data loader that takes 2 s a batch from the tenth on and 1 s before, and evaluations of
    3 s; the trainer, and the iterations at which it evaluated."""

    def train(folder, args, *, resume=False, seconds=0):
        evaluated, own = [], compat.next_batch

        def next_batch(trainer):
            clock.now += 2.0 if trainer.iter >= 10 else 1.0
            return own(trainer)

        def evaluate(cfg, model):
            clock.now += 3.0
            evaluated.append(trainer.iter)
            return {"bbox": {"AP": float(trainer.iter)}}

        args = [*args, "SOLVER.MAX_SECONDS", str(seconds)]
        cfg = setup_config(argument_parser().parse_args(args))
        check_data(cfg, for_training=True)
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(compat, "next_batch", next_batch)
            patch.setattr(trainer_module, "evaluate", evaluate)
            torch.manual_seed(cfg.SEED)
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=resume)
            trainer.train()
        return trainer, evaluated

    return train


def test_a_real_training_is_complete_when_its_time_is_over(
    slow, clock, tiny_data, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    args = cli(tiny_data, tmp_path, *OPTS, config="plain")
    began = clock.now
    trainer, evaluated = slow(tmp_path, args, seconds=40)
    done = trainer.iter
    assert 15 <= done < 25 and clock.now - began == 10 + 2 * (done - 10) + 2 * 3 <= 40
    assert evaluated == [9, done]  # and at the end, once
    assert read_shortened(tmp_path) == (done, 30)
    assert f"the schedule of 30 ends at {done}" in caplog.text
    assert trainer.schedule((done - 1) / 30) < 0.05  # of the rate, in the last step
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == done - 1
    best = json.loads((tmp_path / "student" / "best.json").read_text())
    assert best["iterations_of_the_run"] == done == best["iterations"]

    # A checkpoint from after it was shortened goes on along the same schedule, by hand and without a limit ...
    weights = dict(final["model"])
    (tmp_path / "last_checkpoint").write_text("model_0000011.pth")
    trainer, _ = slow(tmp_path, args, resume=True)
    again = torch.load(tmp_path / "model_final.pth", weights_only=True)
    kept = torch.load(tmp_path / "model_0000011.pth", weights_only=True)["trainer"]["hooks"]
    assert trainer.iter == kept["TimeLimit"]["knots"][-1][0] < 30
    assert again["iteration"] == trainer.iter - 1
    if trainer.iter == done:
        assert difference(dict(again["model"]), weights) is None
    assert read_shortened(tmp_path) == (trainer.iter, 30)
    # ... one that is complete is evaluated and left as it is ...
    trainer, evaluated = slow(tmp_path, args, resume=True)
    assert evaluated == [trainer.iter] and trainer.iter == again["iteration"] + 1
    # ... and another SOLVER.MAX_ITER is another schedule.
    trainer, _ = slow(tmp_path, [*args, "SOLVER.MAX_ITER", "33"], resume=True)
    assert trainer.iter == 33 and read_shortened(tmp_path) is None


def test_a_limit_that_is_not_reached_changes_no_number(slow, tiny_data, tmp_path):
    args = [
        cli(tiny_data, tmp_path / n, *OPTS, "SOLVER.MAX_ITER", "12", config="plain") for n in "ab"
    ]
    for folder, one, seconds in zip("ab", args, (0, 500), strict=True):
        trainer, _ = slow(tmp_path / folder, one, seconds=seconds)
        assert trainer.iter == 12
    a, b = (torch.load(tmp_path / n / "model_final.pth", weights_only=True)["model"] for n in "ab")
    assert difference(dict(a), dict(b)) is None


def test_seconds_below_0_are_refused(tiny_data, tmp_path):
    args = cli(tiny_data, tmp_path, "SOLVER.MAX_SECONDS", "-1", config="plain")
    with pytest.raises(UserError, match=r"SOLVER\.MAX_SECONDS is -1: expected 0 or more"):
        setup_config(argument_parser().parse_args(args))
