"""Every method with a Cascade R-CNN as student, as teacher, and as both: two steps of it."""

from unittest import mock

import pytest
import torch
import yaml
from builders import TOY, batch, tiny_cfg, tiny_model
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage

from era.errors import UserError
from era.modeling import distiller
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY, forget_parts

METHODS = sorted(name for name, _ in METHOD_REGISTRY)
FASTER, CASCADE = "plain", "cascade_plain"
PAIRS = {
    "cascade from cascade": (CASCADE, "cascade_teacher"),
    "Faster R-CNN from cascade": (FASTER, "cascade_teacher"),
    "cascade from Faster R-CNN": (CASCADE, "teacher"),
}
# Beyond a method's toy config: settings by which two steps go through all of it.
SETTINGS = {
    "RDD": {"SWITCH_ITER": 1},
    "ERA": {
        "KD_WEIGHT": 1.0, "TWI.PROPOSALS_PER_IMAGE": 4, "TWI.SOFT_RPN_WEIGHT": 1.0, "TWI.SOFT_ROI_WEIGHT": 1.0,
        "ROI.FEATURE_WEIGHT": 1.0, "ROI.RESIDUAL_WEIGHT": 1.0, "ROI.TWI_WEIGHT": 1.0, "ROI.SOFT_WEIGHT": 1.0,
    },
}  # fmt: skip
# Runs that train a part of a method first.
PARTS = {"SSKD": "sskd_head", "TRED": "tred_disentangle", "R2KD": "r2kd_prune"}


def settings(name: str, config: str = "") -> dict:
    """What a toy config says of a method's keys; by default the method's own config."""
    path = TOY / "methods" / f"{config or name.lower()}.yaml"
    path = path if path.is_file() else TOY / path.name
    return yaml.safe_load(path.read_text())["MODEL"].get(name.upper(), {})


@pytest.fixture(scope="module")
def teachers():
    """Each tiny random teacher, built once."""
    found = {}
    for config in {teacher for _, teacher in PAIRS.values()}:
        torch.manual_seed(1)
        found[config] = Teacher(
            tiny_cfg("era", "MODEL.TEACHER.CONFIG_FILE", str(TOY / f"{config}.yaml"))
        )
    return found


def pair_cfg(pair: str, name: str, keys: dict):
    student, teacher = PAIRS[pair]
    own = tiny_cfg(student)
    cfg = tiny_cfg("era", "MODEL.TEACHER.CONFIG_FILE", str(TOY / f"{teacher}.yaml"))
    for key in ("ROI_HEADS", "ROI_BOX_HEAD"):
        cfg.MODEL[key] = own.MODEL[key]
    cfg.MODEL.DISTILLER.METHODS = [name]
    for key, value in keys.items():
        cfg.merge_from_list([f"MODEL.{name.upper()}.{key}", value])
    forget_parts(cfg)
    return cfg


def trained(cfg, teacher) -> tuple[torch.nn.Module, list[dict]]:
    """A distiller after two optimiser steps, and the losses of each."""
    torch.manual_seed(0)
    with mock.patch.object(distiller, "Teacher", lambda _: teacher):
        model = build_model(
            cfg
        ).train()  # a shared teacher is in eval mode, and so would a copy of it be
    optimizer, history = build_optimizer(cfg, model), []
    with EventStorage(0) as storage:
        for step in range(2):
            losses = model(batch((2, 0), seed=step))
            history.append(losses)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            storage.step()
    return model, history


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", METHODS)
def test_two_steps(name, pair, teachers):
    keys = settings(name) | SETTINGS.get(name, {})
    keys.pop("TWI", None)  # as tiny_cfg has it
    model, history = trained(pair_cfg(pair, name, keys), teachers[PAIRS[pair][1]])
    for losses in history:
        own = [key for key in losses if key.startswith(f"loss_{name.lower()}_")]
        assert own and all(losses[key].isfinite() for key in losses)
    gradients = [p.grad for p in model.student.backbone.parameters() if p.requires_grad]
    assert all(g is not None for g in gradients) and any(g.any() for g in gradients)


@pytest.mark.parametrize("pair", ["cascade from cascade", "Faster R-CNN from cascade"])
@pytest.mark.parametrize("name", PARTS)
def test_two_steps_of_a_part_that_is_trained_first(name, pair, teachers):
    cfg = pair_cfg(pair, name, settings(name) | settings(name, PARTS[name]))
    _, history = trained(cfg, teachers[PAIRS[pair][1]])
    for losses in history:
        assert losses and all(
            loss.isfinite() and key.startswith(f"loss_{name.lower()}_")
            for key, loss in losses.items()
        )


def test_class_distributions_need_a_softmax_in_both():
    sigmoid = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"]
    opts = [
        "MODEL.TEACHER.CONFIG_FILE",
        str(TOY / "cascade_teacher.yaml"),
        "MODEL.DISTILLER.METHODS",
        "('KD',)",
    ]
    with pytest.raises(
        UserError, match="USE_SIGMOID_CE is True in the student: KD needs a softmax"
    ):
        tiny_model("cascade_era", *opts, *sigmoid)
    with pytest.raises(
        UserError, match="USE_SIGMOID_CE is True in the teacher: KD needs a softmax"
    ):
        tiny_model("cascade_era", *opts, teacher_opts=sigmoid)
