"""Warnings about losses that teach nothing or drown the task, each once by its name; and none about healthy runs."""

import re

import pytest
import torch
from builders import TOY, Once, batch, tiny_cfg
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from era.engine import watch
from era.engine.stepping import StepTrainer
from era.engine.watch import LossWatch, gradient_size, watch_of
from era.registry import forget_parts


class Model(nn.Module):
    """A student of one weight, and a method with an adapter of its own."""

    def __init__(self, term):
        super().__init__()
        self.student, self.adapter, self.term = nn.Linear(1, 1, bias=False), nn.Linear(1, 1), term
        nn.init.ones_(self.student.weight)

    def forward(self, data):
        own = self.student(torch.ones(1, 1)).square().sum()
        return {"loss_cls": own, "loss_kd_term": self.term(self, own), "loss_kd_other": own * 0.1}


TERMS = {
    "healthy": (lambda model, own: own * 2, None),
    "zero": (lambda model, own: own * 0, "loss_kd_term was exactly 0 in 25 steps in a row"),
    "no way": (lambda model, own: model.adapter(torch.ones(1, 1)).square().sum() + 1, "has no gradient in the student"),
    "detached": (lambda model, own: own.detach() * 2 + 0 * model.adapter.weight.sum(), "has no gradient in the student"),
    "a gradient of 0": (lambda model, own: own * 0 + 2, "loss_kd_term is 2 and has no gradient in the student"),
    "a constant": (lambda model, own: torch.tensor(2.0), "has no gradient in the student"),
    "large": (lambda model, own: own * 301, r"more than 300 times as much \(MODEL.DISTILLER.MAX_TASK_RATIO\)"),
    "not yet large": (lambda model, own: own * 299, None),
    "large and negative": (lambda model, own: own * -301, "more than 300 times as much"),
}  # fmt: skip


def steps(model, found, count, caplog, amp=None):
    """Train it; the warnings."""
    trainer = StepTrainer(
        model, Once(*[None] * count), torch.optim.SGD(model.parameters(), lr=1e-6), amp_dtype=amp,
        device_type="cpu", watch=found,
    )  # fmt: skip
    caplog.clear()
    with EventStorage(0) as storage, caplog.at_level("INFO", logger="era.engine.watch"):
        for trainer.iter in range(count):
            storage.iter = trainer.iter
            trainer.run_step()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("term, warning", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("amp", [None, torch.float16])
def test_what_is_warned_of(term, warning, amp, monkeypatch, caplog):
    """Once in three windows, and of no other loss."""
    monkeypatch.setattr(watch, "WINDOW", 25)
    model = Model(term)
    told = steps(model, LossWatch(model.student, ["loss_kd_"], [], 300.0), 75, caplog, amp)
    assert len(told) == (warning is not None), told
    if warning is not None:
        assert re.search(warning, told[0]) and told[0].startswith("loss_kd_term ")


def test_a_loss_that_trains_a_part_of_its_method_is_not_warned_of(caplog):
    model = Model(TERMS["no way"][0])
    found = LossWatch(model.student, ["loss_kd_"], ["loss_kd_term"], 300.0)
    assert steps(model, found, 30, caplog) == []


def test_a_loss_that_is_0_now_and_then_is_not_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(watch, "WINDOW", 10)
    found = LossWatch(nn.Linear(1, 1), ["loss_kd_"], [], 300.0)
    for i in range(100):
        found.see({"loss_cls": 1.0, "loss_kd_term": float(i % 10 == 9)})
    assert not caplog.records


def test_what_cannot_be_asked_is_said_and_nothing_else_happens(monkeypatch, caplog):
    """As where there is no memory for it."""

    def fails(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(watch, "gradient_size", fails)
    model = Model(TERMS["no way"][0])
    told = steps(model, LossWatch(model.student, ["loss_kd_"], [], 300.0), 30, caplog)
    assert told == [
        f"Not known whether loss_kd_{name} has a gradient in the student: CUDA out of memory"
        for name in ("term", "other")
    ]


def test_the_size_of_a_gradient():
    """Of d(3 a^2 + b) / da at a = (1, -2) and of b alone; one that underflows in its square counts."""
    a, b = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    loss = (3 * a.square()).sum() + b
    assert gradient_size(loss, [a]) == 12.0 and gradient_size(loss, [b]) == 1.0
    assert gradient_size(b * 1e-30, [b]) == pytest.approx(1e-30)
    assert gradient_size(b * 2, [a]) == 0.0 and a.grad is None and b.grad is None
    loss.backward()  # the graph is still there
    assert a.grad.tolist() == [6.0, -12.0]


METHODS = [
    "era", "plain_init", "methods/residualkd", "methods/mimic", "methods/reviewkd", "methods/okdhp", "methods/dskd",
    "methods/crosskd", "methods/fgd", "methods/cwd", "methods/r2kd", "methods/sskd", "methods/rdd", "methods/mgd",
]  # fmt: skip


@pytest.mark.parametrize("config", METHODS)
def test_healthy_runs_are_not_warned_of(config, monkeypatch, caplog):
    monkeypatch.setattr(watch, "WINDOW", 3)
    monkeypatch.setattr(watch, "GRADIENT_STEP", 2)
    cfg = tiny_cfg(config)
    forget_parts(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    found = watch_of(cfg, model)
    assert (found is None) == (config == "plain_init")  # inherits, and has no method
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    data = Once(*[batch((2, 1), seed=i) for i in range(3)])
    trainer = StepTrainer(model, data, optimizer, device_type="cpu", watch=found)
    with EventStorage(0) as storage, caplog.at_level("INFO", logger="era.engine.watch"):
        for trainer.iter in range(3):
            storage.iter = trainer.iter
            trainer.run_step()
    assert [r.getMessage() for r in caplog.records if r.name == "era.engine.watch"] == []
    assert found is None or found._count == 0  # a window was looked at


@pytest.mark.parametrize("config", ["plain", "methods/sskd_head"])
def test_nobody_watches_a_run_that_distils_nothing(config):
    cfg = tiny_cfg(config)
    assert isinstance(cfg, CfgNode) and (TOY / f"{config}.yaml").exists()
    assert watch_of(cfg, build_model(cfg)) is None
