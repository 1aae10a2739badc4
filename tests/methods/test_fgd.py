"""FGD: masks by hand, each loss by hand and against numpy in float64, the context block, and which needs labels."""

import math

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_model
from detectron2.structures import Boxes, Instances
from numpy_maps import conv, softmax

from era.errors import UserError
from era.methods.fgd import (
    FGD,
    WEIGHTS,
    GlobalContext,
    attention,
    attention_loss,
    focal_loss,
    masks,
)
from era.modeling.detectors.recording import Recording

OPTS = ["MODEL.DISTILLER.METHODS", "('FGD',)", "MODEL.FGD.LEVELS", "['p3', 'p4', 'p5']"]
FEATURES, LOOKS = ("foreground", "background"), ("attention", "global")
NO = torch.zeros(0, 4)


def only(*names):
    """The weights of these losses at 1, of the others at 0."""
    return [
        x for name, (key, _) in WEIGHTS.items() for x in (f"MODEL.FGD.{key}", float(name in names))
    ]


def test_masks_by_hand():
    """A level of 3x4 of an image of 24x32 pixels. One box covers columns 1..2 and rows 0..1, 4 positions; the other
    columns 1..3 and rows 1..2, 6 positions. 4 are left."""
    boxes = torch.tensor([[9.0, 0.0, 15.0, 8.0], [8.0, 8.0, 24.0, 16.0]])
    foreground, background = masks([boxes, NO], (3, 4), (24, 32))
    assert foreground.shape == background.shape == (2, 1, 3, 4)
    quarter, sixth = 1 / 4, 1 / 6
    expected = [
        [0, quarter, quarter, 0],
        [0, quarter, quarter, sixth],  # of overlapping boxes the smallest
        [0, sixth, sixth, sixth],
    ]
    torch.testing.assert_close(foreground[0, 0], torch.tensor(expected))
    torch.testing.assert_close(background[0, 0], (torch.tensor(expected) == 0).float() / 4)
    assert foreground[1].sum() == 0
    torch.testing.assert_close(background[1], torch.full((1, 3, 4), 1 / 12))


def test_a_box_of_the_whole_image_leaves_no_background():
    """It ends beyond the last position, and weighs one over what it covers with that, as in the source."""
    foreground, background = masks([torch.tensor([[0.0, 0.0, 32.0, 16.0]])], (2, 4), (16, 32))
    torch.testing.assert_close(foreground, torch.full((1, 1, 2, 4), 1 / (3 * 5)))
    assert background.sum() == 0


def test_masks_against_a_loop():
    """Random boxes, every position asked for each of them."""
    draw = np.random.default_rng(0)
    corners = draw.uniform(0, 40, (2, 7, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(1, 30, (2, 7, 2))], axis=2)
    (height, width), (high, wide) = (9, 13), (72, 104)
    expected = np.zeros((2, 1, height, width))
    for image, own in enumerate(boxes):
        for x1, y1, x2, y2 in own:
            left, right = math.floor(x1 * width / wide), math.ceil(x2 * width / wide)
            top, bottom = math.floor(y1 * height / high), math.ceil(y2 * height / high)
            for y in range(height):
                for x in range(width):
                    if left <= x <= right and top <= y <= bottom:
                        value = 1 / ((right - left + 1) * (bottom - top + 1))
                        expected[image, 0, y, x] = max(expected[image, 0, y, x], value)
    found, rest = masks([torch.from_numpy(own) for own in boxes], (height, width), (high, wide))
    np.testing.assert_allclose(found.numpy(), expected)
    np.testing.assert_allclose(rest.sum(dim=(2, 3)).numpy(), 1)
    assert ((rest.numpy() > 0) == (expected == 0)).all()


def looks_of(maps, temperature):
    """Attention in numpy."""
    images, channels, height, width = maps.shape
    by_position = softmax(np.abs(maps).mean(1).reshape(images, -1) / temperature, 1)
    by_channel = softmax(np.abs(maps).mean((2, 3)) / temperature, 1)
    return (
        by_position.reshape(images, 1, height, width) * height * width,
        by_channel[:, :, None, None] * channels,
    )


def test_attention_by_hand():
    """Means of |F| over two channels 0 and T ln 3 at two positions: 2 (1/4, 3/4); and over positions alike."""
    t = 0.5
    maps = torch.tensor([[[[0.0, -2 * t * math.log(3)]], [[0.0, 0.0]]]])
    by_position, by_channel = attention(maps, t)
    torch.testing.assert_close(by_position, torch.tensor([[[[0.5, 1.5]]]]))
    torch.testing.assert_close(by_channel, torch.tensor([1.5, 0.5]).view(1, 2, 1, 1))


def test_losses_against_numpy_on_random_maps():
    draw = np.random.default_rng(0)
    a, b = draw.normal(0, 2, (2, 5, 4, 6)), draw.normal(1, 2, (2, 5, 4, 6))
    mask = draw.uniform(0, 1, (2, 1, 4, 6))
    own, looks = looks_of(a, 0.5), looks_of(b, 0.5)
    student, teacher = torch.from_numpy(a), torch.from_numpy(b)
    for found, expected in zip(attention(teacher, 0.5), looks, strict=True):
        np.testing.assert_allclose(found.numpy(), expected)
    expected = (mask * looks[0] * looks[1] * (a - b) ** 2).sum() / 2
    found = focal_loss(student, teacher, torch.from_numpy(mask), attention(teacher, 0.5))
    assert found.item() == pytest.approx(expected, rel=1e-9)
    expected = sum(np.abs(x - y).sum() for x, y in zip(own, looks, strict=True)) / 2
    found = attention_loss(attention(student, 0.5), attention(teacher, 0.5))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_global_context_against_numpy():
    draw = np.random.default_rng(0)
    torch.manual_seed(0)
    block = GlobalContext(6).double()
    maps = draw.normal(1, 2, (2, 6, 3, 5))
    torch.testing.assert_close(block(torch.from_numpy(maps)), torch.from_numpy(maps))  # at first
    torch.nn.init.normal_(block.leave.weight)
    share = softmax(conv(maps, block.where), (2, 3))
    hidden = conv((maps * share).sum((2, 3), keepdims=True), block.enter)
    deviation = np.sqrt(hidden.var(axis=1, keepdims=True) + 1e-5)
    hidden = np.maximum((hidden - hidden.mean(axis=1, keepdims=True)) / deviation, 0)
    expected = torch.from_numpy(maps + conv(hidden, block.leave))
    torch.testing.assert_close(block(torch.from_numpy(maps)), expected)


class OneStep:
    """What the method asks a step for."""

    labeled = True

    def __init__(self, own, other, boxes, image_size):
        images = type("Images", (), {"tensor": torch.zeros(len(boxes), 3, *image_size)})()
        targets = [Instances(image_size, gt_boxes=Boxes(x)) for x in boxes]
        self.student = Recording(images=images, targets=targets, features=own)
        self.teacher_features = other


def test_the_method_puts_the_pieces_together():
    """At two levels of unequal width: adapters, masks of each level's size, all four losses with their weights."""
    torch.manual_seed(0)
    weights = {"foreground": 2.0, "background": 3.0, "attention": 5.0, "global": 7.0}
    method = FGD(levels=["p3", "p4"], weights=weights, temperature=0.5, channels=(3, 4))
    sizes = {"p3": (6, 8), "p4": (3, 4)}
    own = {level: torch.randn(2, 3, *size) for level, size in sizes.items()}
    other = {level: torch.randn(2, 4, *size) for level, size in sizes.items()}
    boxes = [torch.tensor([[4.0, 8.0, 30.0, 40.0]]), NO]
    found = method.losses(OneStep(own, other, boxes, (48, 64)))
    expected = dict.fromkeys(weights, 0.0)
    for level, size in sizes.items():
        student, teacher = method.adapters[level](own[level]), other[level]
        looks = attention(teacher, 0.5)
        pair = masks(boxes, size, (48, 64))
        expected["foreground"] += 2 * focal_loss(student, teacher, pair[0], looks)
        expected["background"] += 3 * focal_loss(student, teacher, pair[1], looks)
        expected["attention"] += 5 * attention_loss(attention(student, 0.5), looks)
        expected["global"] += 7 * (student - teacher).square().sum() / 2  # R(F) = F at first
    assert found.keys() == {f"loss_fgd_{name}" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"loss_fgd_{name}"], value)


def test_without_boxes_the_foreground_is_0_and_connected():
    model = tiny_model("era", *OPTS)
    losses, _ = losses_of(model, batch((0, 0)))
    assert losses["loss_fgd_foreground"].item() == 0 and losses["loss_fgd_background"] > 0
    losses["loss_fgd_foreground"].backward()
    assert all(p.grad is not None for p in model.student.backbone.fpn_output3.parameters())


def test_only_attention_and_context_go_without_labels():
    """A step without labels gives those alone, and a run of the others alone is given none."""
    unlabelled = [{"unlabeled": True, "image": item["image"]} for item in batch()]
    for names, expected in ((FEATURES, set()), (LOOKS, {f"loss_fgd_{name}" for name in LOOKS})):
        model = tiny_model("era", *OPTS, *only(*names))
        assert model.label_free == (("fgd",) if expected else ())
        alone, _ = losses_of(model, batch())
        beside, _ = losses_of(model, [*batch(), *unlabelled])
        assert {key for key in beside if "fgd" in key} == {f"loss_fgd_{name}" for name in names}
        assert beside.keys() == alone.keys()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_loss_of_weight_0_is_left_out_and_its_modules_rest(name):
    model = tiny_model("era", *OPTS, *only(name))
    losses, _ = losses_of(model, batch())
    assert {key for key in losses if "fgd" in key} == {f"loss_fgd_{name}"}
    assert any(p.requires_grad for p in model.methods.parameters()) == (name == "global")


def test_no_gradient_into_the_teacher_and_finite_in_half():
    student = torch.randn(1, 2, 4, 4, requires_grad=True)
    teacher = torch.randn(1, 2, 4, 4, requires_grad=True)
    looks = attention(teacher, 0.5)
    mask = torch.ones(1, 1, 4, 4)
    (
        focal_loss(student, teacher, mask, looks) + attention_loss(attention(student, 0.5), looks)
    ).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    half = student.half() * 10000  # squares over 65504
    losses = [
        focal_loss(half, teacher.half(), mask.half(), attention(teacher.half(), 0.5)),
        attention_loss(attention(half, 0.5), attention(teacher.half(), 0.5)),
        GlobalContext(2)(half).sum(),
    ]
    assert all(x.dtype == torch.float32 and torch.isfinite(x) for x in losses)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_temperature_that_is_none(value):
    with pytest.raises(UserError, match=r"MODEL\.FGD\.TEMPERATURE is .*: expected a finite number"):
        tiny_model("era", *OPTS, "MODEL.FGD.TEMPERATURE", value)
