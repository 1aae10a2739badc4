"""What must hold of losses, gradients, weights and files, on numbers by hand; the checks change nothing of a run."""

import math
from types import SimpleNamespace

import pytest
import torch
from builders import cli, tiny_cfg, tiny_model
from resume_case import difference, left_behind, run
from torch import nn

from era.checkpoint.finite import check_finite, largest
from era.checkpoint.reading import SafeCheckpointer
from era.checkpoint.student import save_plain_student
from era.config import load_config, validate_config
from era.engine import watch
from era.engine.guard import (
    Buffers,
    CheckWeights,
    Diverged,
    bad_gradients,
    check_losses,
    weights_problem,
)
from era.engine.stepping import numbers
from era.errors import UserError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("by_process, reason, ranks", [
    ([{"a": 1.0, "b": NAN}], "b is NaN at iteration 7", (0,)),
    ([{"a": -INF, "b": 2e6}], "a is infinite at iteration 7", (0,)),  # the worse of the two alone
    ([{"a": 1.0, "b": -1.5e6}], "b is -1.5e+06 at iteration 7, above SOLVER.MAX_LOSS 1e+06", (0,)),
    ([{"a": 1.0}, {"a": NAN}, {"a": NAN}], "a is NaN in process 1, a is NaN in process 2 at iteration 7", (1, 2)),
    ([dict.fromkeys("abcde", NAN)], "a is NaN, b is NaN, c is NaN and 2 more at iteration 7", (0,)),
])  # fmt: skip
def test_a_loss_out_of_bounds_is_named(by_process, reason, ranks):
    with pytest.raises(Diverged) as e:
        check_losses(by_process, 1e6, 7)
    assert str(e.value) == reason and e.value.ranks == ranks and e.value.together


def test_losses_within_bounds_pass():
    check_losses([{"a": 1e6, "b": -1e6}, {}], 1e6, 0)
    check_losses([{"a": 1e30}], INF, 0)
    with pytest.raises(Diverged, match="a is infinite"):
        check_losses([{"a": INF}], INF, 0)


def test_numbers_are_those_of_the_losses():
    third = torch.tensor(1 / 3)
    losses = {"a": third, "b": third.double()[None], "c": third.bfloat16()}
    assert numbers(losses) == {name: loss.item() for name, loss in losses.items()}
    assert numbers({}) == {}


def test_the_largest_value_of_each_tensor():
    tensors = [torch.tensor([-3.0, 2]), torch.zeros(0), torch.tensor([NAN, 1]), torch.tensor([-INF]).half()]  # fmt: skip
    found = largest(tensors)
    assert found[:2] == [3.0, 0.0] and math.isnan(found[2]) and found[3] == INF


def test_weights_and_gradients_that_are_spoilt_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    assert weights_problem(model) is None
    model(torch.ones(1, 2)).sum().backward()
    assert bad_gradients(model) == []
    model[1].weight.grad[0, 0] = NAN
    assert bad_gradients(model) == ["1.weight"]
    with torch.no_grad():
        model[0].bias[0] = 1.1e10
        assert weights_problem(model) == "0.bias reaches 1.1e+10"
        model[1].weight[0, 1] = NAN
        assert weights_problem(model) == "1.weight is NaN"


@pytest.mark.parametrize("iteration, is_due", [(0, False), (2, True), (4, True), (7, False), (9, True)])  # fmt: skip
def test_weights_are_looked_at_when_somebody_is_to_read_them(iteration, is_due):
    """Every 3 and every 5 iterations, and at the end."""
    hook = CheckWeights([3, 5, 0])
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, INF)
    hook.trainer = SimpleNamespace(iter=iteration, max_iter=10, model=model)
    if is_due:
        with pytest.raises(Diverged, match=f"after iteration {iteration} .weight is infinite") as e:
            hook.after_step()
        assert e.value.weights
    else:
        hook.after_step()


def test_buffers_are_remembered_as_they_were():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[1].register_buffer("constant", torch.ones(1), persistent=False)
    buffers = Buffers(model)
    for _ in range(3):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        buffers.remember()
        model(torch.randn(4, 2))
        found = buffers.by_name()
        assert found.keys() == before.keys() - {"1.constant"}
        assert all(torch.equal(found[name], before[name]) for name in found)
        assert not torch.equal(found["0.running_mean"], model[0].running_mean)


class State:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


def test_nothing_that_is_not_finite_is_written(tmp_path):
    """Weights, statistics or the optimiser's momentum; neither the file nor its hash nor the marker."""
    model = tiny_model("plain")
    momentum = {"_trainer": {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}}}
    checkpointer = SafeCheckpointer(model, str(tmp_path), trainer=State(momentum))
    momentum["_trainer"]["optimizer"]["state"][0]["momentum_buffer"][1] = INF
    with pytest.raises(FloatingPointError, match=r"x\.pth is not written, for trainer\._trainer\.optimizer\.state\.0\."):  # fmt: skip
        checkpointer.save("x")
    checkpointer.save_weights("whole")
    model.backbone.fpn_output3.weight.data[0, 0] = NAN
    name = r"model\.backbone\.fpn_output3\.weight is not finite \(1 of"
    with pytest.raises(FloatingPointError, match=name):
        checkpointer.save_weights("x")
    with pytest.raises(FloatingPointError, match=r"backbone\.fpn_output3\.weight is not finite"):
        save_plain_student(model, tiny_cfg("plain"), str(tmp_path / "student"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.pth", "whole.pth.sha256"]
    check_finite({"a": [torch.ones(1), 3], "b": torch.tensor([2**40]), "c": "text"}, "")


@pytest.mark.parametrize("key, value", [
    ("SOLVER.MAX_LOSS", "0.0"), ("SOLVER.MAX_LOSS", "float('nan')"), ("MODEL.DISTILLER.MAX_TASK_RATIO", "-1.0"),
])  # fmt: skip
def test_bounds_that_bound_nothing_are_refused(key, value):
    cfg = tiny_cfg("era")
    node, name = (cfg.SOLVER, "MAX_LOSS") if "SOLVER" in key else (cfg.MODEL.DISTILLER, "MAX_TASK_RATIO")  # fmt: skip
    node[name] = NAN if "nan" in value else float(value)
    with pytest.raises(UserError, match=key):
        validate_config(cfg)


@pytest.mark.parametrize("key", ["SOLVER.MAX_LOSS", "MODEL.DISTILLER.MAX_TASK_RATIO"])
def test_no_bound_is_said_alike_in_a_file_and_on_the_command_line(key, tmp_path):
    """As the refusal of other values names it."""
    section, name = key.rsplit(".", 1)
    file = tmp_path / "c.yaml"
    file.write_text("".join(f"{'  ' * i}{part}:\n" for i, part in enumerate(section.split(".")))
                    + "  " * (section.count(".") + 1) + f"{name}: .inf\n")  # fmt: skip
    for cfg in (load_config(str(file)), load_config("", [key, ".inf"])):
        validate_config(cfg)
        for part in section.split("."):
            cfg = cfg[part]
        assert cfg[name] == float("inf")


@pytest.mark.parametrize("processes", [1, 2])
def test_looking_at_gradients_changes_no_bit_of_a_run(processes, tiny_data, tmp_path, monkeypatch):
    """In the middle of a run with accumulated batches."""
    own = watch.gradient_size

    def said(*args):
        print("a gradient is looked at")
        return own(*args)

    monkeypatch.setattr(watch, "gradient_size", said)
    for name, step in (("with", 2), ("without", 0)):
        monkeypatch.setattr(watch, "GRADIENT_STEP", step)
        args = cli(tiny_data, tmp_path / name, "SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()", "SEED", "5",
                   "SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATION_STEPS", "2", "SOLVER.WARMUP_ITERS", "0")  # fmt: skip
        log = tmp_path / f"{name}.log"
        assert run(["--num-gpus", processes, *args], log=log) == 0, log.read_text()[-3000:]
        assert log.read_text().count("a gradient is looked at") == (4 if step else 0)
    found = [left_behind(tmp_path / name) for name in ("with", "without")]
    assert difference(*found) is None
