"""MGD: the loss by hand and against numpy in float64, its masks, and that runs repeat."""

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_model
from detectron2.utils.events import EventStorage
from numpy_maps import conv

from era.errors import UserError
from era.methods import mgd
from era.methods.mgd import MGD, masks, mgd_loss

OPTS = ["MODEL.DISTILLER.METHODS", "('MGD',)", "MODEL.MGD.LEVELS", "['p3', 'p4', 'p5']"]


def test_the_loss_by_hand():
    """Two images: 1 + 4 + 9 and 16, a sum over elements and a mean over images."""
    generated = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 4.0]]]])
    assert mgd_loss(generated, torch.zeros(2, 2, 1, 2)).item() == 15.0


def test_against_numpy_on_random_maps():
    """Adapter, mask, 3x3 conv, ReLU, 3x3 conv at each level, in that order."""
    draw = np.random.default_rng(0)
    sizes = {"p3": (6, 4), "p4": (3, 2)}
    torch.manual_seed(0)
    method = MGD(levels=list(sizes), weight=1.0, mask_ratio=0.5, channels=(3, 5)).double()
    student = {level: draw.normal(1, 3, (2, 3, *size)) for level, size in sizes.items()}
    teacher = {level: draw.normal(-2, 2, (2, 5, *size)) for level, size in sizes.items()}
    kept = [masks(7, image, list(sizes.values()), 0.5) for image in (0, 1)]
    expected = 0.0
    for i, level in enumerate(sizes):
        mask = np.stack([image[i].numpy() for image in kept])[:, None]
        first, _, second = method.generators[level]
        hidden = conv(mask * conv(student[level], method.adapters[level]), first)
        expected += ((conv(np.maximum(hidden, 0), second) - teacher[level]) ** 2).sum() / 2
    maps = [{k: torch.from_numpy(x) for k, x in m.items()} for m in (student, teacher)]
    with EventStorage(7):
        assert method.feature_loss(*maps).item() == pytest.approx(expected, rel=1e-9)


def test_masks_drop_their_share_and_follow_from_iteration_and_image_alone():
    (found,) = masks(3, 1, [(200, 100)], 0.45)
    assert set(found.unique().tolist()) == {0.0, 1.0} and found.dtype == torch.float32
    assert found.mean().item() == pytest.approx(0.55, abs=0.01)
    state = torch.get_rng_state()
    np.random.seed(0)
    (again,) = masks(3, 1, [(200, 100)], 0.45)
    assert torch.equal(again, found) and torch.equal(torch.get_rng_state(), state)
    for other in ((4, 1), (3, 2), (1, 3)):
        assert not torch.equal(masks(*other, [(200, 100)], 0.45)[0], found)
    assert masks(3, 1, [(5, 5)], 0.0)[0].min() == 1


def drawn(monkeypatch, *counts, rank=0, world=1, iteration=5):
    """The images' numbers for which masks are drawn, in steps of so many images within one iteration."""
    numbers = []
    monkeypatch.setattr(mgd.comm, "get_rank", lambda: rank)
    monkeypatch.setattr(mgd.comm, "get_world_size", lambda: world)
    monkeypatch.setattr(
        mgd,
        "masks",
        lambda it, image, *rest: numbers.append((it, image)) or masks(it, image, *rest),
    )
    method = MGD(levels=["p3"], weight=1.0, mask_ratio=0.5, channels=(2, 2))
    with EventStorage(iteration - 1) as storage:
        maps = {"p3": torch.randn(3, 2, 2, 2)}
        method.feature_loss(maps, maps)  # of the iteration before
        numbers.clear()
        storage.iter = iteration
        for count in counts:
            maps = {"p3": torch.randn(count, 2, 2, 2)}
            method.feature_loss(maps, maps)
    assert {it for it, _ in numbers} == {iteration}
    return [image for _, image in numbers]


def test_images_are_counted_over_accumulated_batches_and_processes(monkeypatch):
    assert drawn(monkeypatch, 4) == drawn(monkeypatch, 2, 2) == [0, 1, 2, 3]
    ranks = [drawn(monkeypatch, 2, 1, rank=rank, world=2) for rank in (0, 1)]
    assert ranks == [[0, 1, 4], [2, 3, 5]]


def test_a_step_repeats_and_another_iteration_differs():
    model = tiny_model("era", *OPTS, "MODEL.MGD.WEIGHT", "1.0")
    first, _ = losses_of(model, batch())
    again, _ = losses_of(tiny_model("era", *OPTS, "MODEL.MGD.WEIGHT", "1.0"), batch(), seed=1)
    assert torch.equal(first["loss_mgd_feature"], again["loss_mgd_feature"])
    with EventStorage(1):
        later = model(batch())
    assert later["loss_mgd_feature"] != first["loss_mgd_feature"]


def test_no_gradient_into_the_teacher_and_finite_in_half():
    generated = torch.randn(1, 2, 4, 4, requires_grad=True)
    teacher = torch.randn(1, 2, 4, 4, requires_grad=True)
    mgd_loss(generated, teacher).backward()
    assert generated.grad.abs().sum() > 0 and teacher.grad is None
    large = mgd_loss(generated.half() * 1000, teacher.half())  # squares over 65504
    assert large.dtype == torch.float32 and torch.isfinite(large)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none(ratio):
    with pytest.raises(UserError, match=r"MODEL\.MGD\.MASK_RATIO is .*: expected a share"):
        tiny_model("era", *OPTS, "MODEL.MGD.MASK_RATIO", ratio)
