"""Mimic: the loss by hand and against numpy in float64."""

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_model
from numpy_maps import conv
from torch import nn

from era.methods.mimic import Mimic

MIMIC = ["MODEL.DISTILLER.METHODS", "('Mimic',)", "MODEL.MIMIC.LEVELS", "['p3', 'p4', 'p5']"]


def test_by_hand():
    """Two levels through convs that add 1: (2 - 0)^2 and (3 - 4)^2 at p3, (1 - 4)^2 at p4; means 2.5 and 9."""
    method = Mimic(levels=["p3", "p4"], weight=1.0, channels=(1, 1))
    for adapter in method.adapters.values():
        nn.init.ones_(adapter.weight)
        nn.init.ones_(adapter.bias)
    student = {"p3": torch.tensor([[[[1.0, 2.0]]]]), "p4": torch.tensor([[[[0.0]]]])}
    teacher = {"p3": torch.tensor([[[[0.0, 4.0]]]]), "p4": torch.tensor([[[[4.0]]]])}
    assert method.feature_loss(student, teacher).item() == pytest.approx(11.5)


def test_against_numpy_on_random_maps():
    """Of unequal widths and of levels of unequal size: a mean over each level's elements, then a sum."""
    draw = np.random.default_rng(0)
    method = Mimic(levels=["p3", "p4"], weight=1.0, channels=(3, 5)).double()
    sizes = {"p3": (6, 4), "p4": (3, 2)}
    student = {level: draw.normal(1, 3, (2, 3, *size)) for level, size in sizes.items()}
    teacher = {level: draw.normal(-2, 2, (2, 5, *size)) for level, size in sizes.items()}
    expected = sum(
        np.mean((conv(student[level], method.adapters[level]) - teacher[level]) ** 2)
        for level in sizes
    )
    maps = [{k: torch.from_numpy(x) for k, x in m.items()} for m in (student, teacher)]
    assert method.feature_loss(*maps).item() == pytest.approx(expected, rel=1e-9)


def test_the_teachers_maps_through_the_identity_are_at_distance_0():
    method = Mimic(levels=["p3"], weight=1.0, channels=(4, 4))
    nn.init.eye_(method.adapters["p3"].weight.view(4, 4).data)
    nn.init.zeros_(method.adapters["p3"].bias)
    maps = {"p3": torch.randn(2, 4, 3, 5)}
    assert method.feature_loss(maps, maps).item() == pytest.approx(0, abs=1e-12)


def test_there_is_a_conv_at_each_level_also_at_equal_width():
    model = tiny_model("era", *MIMIC, "MODEL.MIMIC.WEIGHT", "3.0")
    method = model.methods["mimic"]
    shapes = {level: tuple(adapter.weight.shape) for level, adapter in method.adapters.items()}
    assert shapes == dict.fromkeys(("p3", "p4", "p5"), (16, 16, 1, 1))
    losses, _ = losses_of(model, batch())
    images = model.student.preprocess_image(batch()).tensor
    with torch.no_grad():
        own = model.student.backbone(images)
        other = model.teacher.features(batch(), own, images.shape[-2:])
    torch.testing.assert_close(losses["loss_mimic_feature"], 3 * method.feature_loss(own, other))
