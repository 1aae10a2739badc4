"""MODEL.EMA: what is averaged and how, where the average goes, and runs that begin or end to have one."""

import os

import numpy as np
import pytest
import torch
from builders import cli, tiny_cfg, tiny_model
from resume_case import difference
from torch import nn

from era.checkpoint.writing import HASH
from era.engine import trainer as trainer_module
from era.engine.ema import WeightAverage, averaged_tensors, read_state
from era.engine.evaluation import evaluate
from era.engine.launch import argument_parser
from era.engine.preflight import (
    build_for_evaluation,
    build_for_training,
    check_data,
    setup_config,
)
from era.engine.room import room_for
from era.engine.schedule import scale_to_world
from era.engine.trainer import Trainer
from era.errors import UserError

EMA = ["MODEL.EMA.ENABLED", "True"]
SHORT = [
    "SEED",
    "5",
    "SOLVER.WARMUP_ITERS",
    "0",
    "SOLVER.CHECKPOINT_PERIOD",
    "3",
    "SOLVER.MAX_ITER",
    "6",
]
UNTESTED = ["DATASETS.TEST", "()"]


def train(args, *, resume=False, before=lambda trainer: None):
    """A run in this process."""
    cfg = setup_config(argument_parser().parse_args(args))
    check_data(cfg, for_training=True)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    torch.manual_seed(1)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    before(trainer)
    trainer.train()
    return trainer


def saved(path):
    return torch.load(path, weights_only=True)


class Tiny(nn.Module):
    """A weight, a frozen weight, statistics and a counter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.frozen = nn.Parameter(torch.tensor([3.0]), requires_grad=False)
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.register_buffer("constant", torch.ones(1), persistent=False)


def test_the_average_by_hand():
    model = Tiny()
    average = WeightAverage(model, 0.25)
    seen, expected = [4.0, 8.0, -2.0, 0.0], 1.0
    decays = []
    for value in seen:
        with torch.no_grad():
            model.weight[0] = value
            model.norm.running_var[1] = value
        decays.append(average.next_decay())
        average.update()
    # (1 + n) / (10 + n), until it passes 0.25 at n = 2
    assert decays == [1 / 10, 2 / 11, 3 / 12, 0.25]
    statistics = 1.0
    for d, value in zip(decays, seen, strict=True):
        expected = d * expected + (1 - d) * value
        statistics = d * statistics + (1 - d) * value
    with average.applied():
        assert model.weight.tolist() == pytest.approx([expected, -2.0])
        assert model.norm.running_var.tolist() == pytest.approx([1.0, statistics])
        assert average.state_dict()["updates"] == 4
    assert model.weight.tolist() == [0.0, -2.0]


def test_the_weights_come_back_to_the_bit():
    model = Tiny()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1 / 3, 1e-30]))
    average.update()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(KeyError), average.applied(), average.applied():
        assert not torch.equal(model.weight, before["weight"])
        raise KeyError
    assert difference(dict(model.state_dict()), before) is None


def test_what_is_averaged_is_what_detects():
    assert set(averaged_tensors(Tiny())) == {"weight", "norm.running_mean", "norm.running_var"}
    opts = ["MODEL.DISTILLER.METHODS", "('ERA', 'MGD')", "MODEL.MGD.LEVELS", "['p3', 'p4', 'p5']"]
    model = tiny_model("era", *opts, "MODEL.BACKBONE.FREEZE_AT", "1")
    names = set(averaged_tensors(model))
    assert names <= set(model.state_dict())
    assert {name.split(".")[0] for name in names} == {"student", "methods"}
    assert {name.split(".")[1] for name in names if name.startswith("methods.")} == {"era"}
    # MGD's modules serve training alone
    assert any(name.startswith("methods.mgd.") for name in model.state_dict())
    left = {n for n, p in model.student.named_parameters() if f"student.{n}" not in names}
    assert left == {n for n, p in model.student.named_parameters() if not p.requires_grad} != set()
    assert any(name.endswith("running_mean") for name in names)
    assert not any(name.endswith("num_batches_tracked") for name in names)


@pytest.mark.parametrize("config", ["plain", "era"])
def test_the_average_is_evaluated_kept_and_left_and_training_is_as_without(
    tiny_data, tmp_path, config, monkeypatch
):
    def args(name, *more):
        return cli(tiny_data, tmp_path / name, *SHORT, *more, config=config)

    steps, tested = [], []

    def watch(trainer):
        """The weights after every step, before they are averaged."""
        steps.append(
            {
                n: t.detach().clone().double().numpy()
                for n, t in averaged_tensors(trainer.bare_model).items()
            }
        )
        update = trainer.average.update

        def also(*_):
            steps.append(
                {
                    n: t.detach().clone().double().numpy()
                    for n, t in averaged_tensors(trainer.bare_model).items()
                }
            )
            update()

        trainer.average.update = also

    def look(cfg, model):
        tested.append({n: t.clone() for n, t in model.state_dict().items()})
        return {"bbox": {"AP": float(len(tested))}}

    monkeypatch.setattr(trainer_module, "evaluate", look)
    run = train(args("run", *EMA, "MODEL.EMA.DECAY", "0.3", "TEST.EVAL_PERIOD", "4"), before=watch)
    expected = steps[0]
    for n, weights in enumerate(steps[1:]):
        d = min(0.3, (1 + n) / (10 + n))
        expected = {name: d * expected[name] + (1 - d) * weights[name] for name in expected}

    final = saved(tmp_path / "run" / "model_final.pth")
    assert len(steps) == 7 and final["ema"]["updates"] == 6
    for name, array in expected.items():
        np.testing.assert_allclose(final["model"][name].numpy(), array, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(
            final["ema"]["weights"][name].numpy(), steps[-1][name].astype("float32")
        )
    assert len(tested) == 2  # after 4 steps and at the end
    assert difference(tested[1], dict(final["model"])) is None
    best = saved(tmp_path / "run" / "model_best.pth")
    assert (
        best["best"]["value"] == 2.0
        and difference(dict(best["model"]), dict(final["model"])) is None
    )
    prefix = "student." if config == "era" else ""
    student = saved(tmp_path / "run" / "student" / "model_final.pth")["model"]
    assert all(torch.equal(t, final["model"][prefix + name]) for name, t in student.items())
    assert any(
        (student[n.removeprefix(prefix)].numpy() != steps[-1][n]).any()
        for n in steps[-1]
        if prefix in n
    )

    monkeypatch.undo()
    plain = train(args("without", *UNTESTED))
    assert (
        difference(dict(run.bare_model.state_dict()), dict(plain.bare_model.state_dict())) is None
    )


def test_what_is_saved_is_what_was_evaluated_also_with_the_teachers_heads(tiny_data, tmp_path):
    """At alpha 1 the detector is the student's backbone and the method's modules: both are averages."""
    args = cli(
        tiny_data,
        tmp_path,
        *SHORT,
        *EMA,
        "MODEL.ERA.ALPHA",
        "1.0",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "0.0",
    )
    trainer = train(args)
    torch.manual_seed(1)  # the same random teacher
    opts = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    cfg = setup_config(argument_parser().parse_args(["--eval-only", *args, *opts]))
    torch.manual_seed(1)
    model = build_for_evaluation(cfg, resume=False)
    with trainer.average.applied():
        state = trainer.bare_model.state_dict()
        assert difference(dict(model.state_dict()), dict(state)) is None
        expected = evaluate(cfg, trainer.bare_model.eval())["bbox"]
    assert evaluate(cfg, model.eval())["bbox"] == pytest.approx(expected, nan_ok=True)


def test_a_run_that_goes_on_without_an_average_is_one_that_never_had_one(
    tiny_data, tmp_path, caplog
):
    def args(name, *more):
        return cli(tiny_data, tmp_path / name, *SHORT, *UNTESTED, *more, config="plain")

    longer = ["SOLVER.MAX_ITER", "9", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    constant = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    train(args("run", *EMA, *constant))
    resumed = train(args("run", *longer), resume=True)
    assert "its average is left out" in caplog.text
    never = train(args("never", *longer))
    assert (
        difference(dict(resumed.bare_model.state_dict()), dict(never.bare_model.state_dict()))
        is None
    )
    assert "ema" not in saved(tmp_path / "run" / "model_final.pth")


def test_a_run_that_goes_on_with_an_average_begins_it_there(tiny_data, tmp_path, caplog):
    def args(*more):
        return cli(tiny_data, tmp_path, *SHORT, *UNTESTED, *more, config="plain")

    first = train(args())
    begins = []
    second = train(
        args(*EMA, "SOLVER.MAX_ITER", "7"),
        resume=True,
        before=lambda t: begins.append(dict(t.bare_model.state_dict())),
    )
    assert "the average begins with its weights" in caplog.text
    assert difference(begins[0], dict(second.bare_model.state_dict())) is None  # the same tensors
    final = saved(tmp_path / "model_final.pth")
    assert final["ema"]["updates"] == 1
    name = next(n for n in averaged_tensors(second.bare_model) if n.endswith("weight"))
    start, end = first.bare_model.state_dict()[name], final["ema"]["weights"][name]
    torch.testing.assert_close(final["model"][name], 0.1 * start + 0.9 * end)


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda state: state.pop("updates"), "is of another form"),
        (lambda state: state["weights"].popitem(), "and the run differ in"),
        (
            lambda state: state["weights"].update(other=torch.zeros(1)),
            "and the run differ in other",
        ),
        (
            lambda state: state["weights"].update(dict.fromkeys(list(state["weights"])[:1], 3)),
            "is not of shape",
        ),
    ],
)
def test_an_average_of_another_form_is_refused(tiny_data, tmp_path, spoil, told):
    args = cli(tiny_data, tmp_path, *SHORT, *UNTESTED, *EMA, "SOLVER.MAX_ITER", "1", config="plain")
    train(args)
    path = tmp_path / "model_final.pth"
    content = saved(path)
    spoil(content["ema"])
    torch.save(content, path)
    os.remove(f"{path}{HASH}")
    with pytest.raises(UserError, match=told) as refused:
        train([*args, "SOLVER.MAX_ITER", "2"], resume=True)
    assert str(path) in str(refused.value)
    cfg = setup_config(argument_parser().parse_args(args))
    with pytest.raises(
        UserError, match=told
    ):  # before anything is written, with MODEL.EMA or without
        build_for_training(cfg, resume=True)


def test_a_negative_number_of_updates_is_refused():
    like = {"a": torch.zeros(2)}
    assert read_state({"updates": 3, "weights": like}, like) == (3, like)
    with pytest.raises(ValueError, match="of another form"):
        read_state({"updates": -1, "weights": like}, like)


@pytest.mark.parametrize(
    "opts, told",
    [
        (["MODEL.EMA.DECAY", "1.0"], "MODEL.EMA.DECAY is 1.0: expected 0 or more and below 1"),
        (["MODEL.EMA.DECAY", "-0.1"], "MODEL.EMA.DECAY is -0.1"),
        (["MODEL.EMA.DECAY", "1e400"], "MODEL.EMA.DECAY is inf"),
        ([*EMA, "TEST.PRECISE_BN.ENABLED", "True"], "set one of the two False"),
        (
            [*EMA, "MODEL.DISTILLER.METHODS", "('SSKD',)", "MODEL.SSKD.STAGE", "head"],
            "alone",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_data, tmp_path, opts, told):
    args = cli(tiny_data, tmp_path / "run", *opts)
    with pytest.raises(UserError, match=told):
        setup_config(argument_parser().parse_args(args))
    assert not (tmp_path / "run").exists()


def test_a_batch_of_another_size_keeps_the_pictures_that_an_average_spans():
    cfg = tiny_cfg(
        "plain",
        "SOLVER.REFERENCE_WORLD_SIZE",
        "2",
        "SOLVER.IMS_PER_BATCH",
        "4",
        "MODEL.EMA.DECAY",
        "0.81",
    )
    found = [scale_to_world(cfg, processes).MODEL.EMA.DECAY for processes in (1, 2, 4)]
    assert found == pytest.approx([0.9, 0.81, 0.81**2])


def test_room_is_asked_for_what_lies_beside_the_average():
    model = tiny_model("plain")
    without, with_average = (room_for(tiny_cfg("plain", *opts), model) for opts in ((), EMA))
    beside = sum(t.numel() * 4 for t in averaged_tensors(model).values())
    assert with_average.checkpoint - without.checkpoint == beside > 0
