"""The heads of RetinaNet and FCOS as judges: against the ground truth and softly, at all positions and at a sample."""

import copy

import numpy as np
import pytest
import torch
from builders import tiny_model
from dense_case import FAMILIES, OBJECTS, loud, recorded
from detectron2.utils.events import EventStorage

from era.modeling.detectors import dense_losses, dense_record, detector_of
from era.modeling.detectors.recording import ALL_POSITIONS, SAMPLED_POSITIONS

both = pytest.mark.parametrize("name", FAMILIES)
batches = pytest.mark.parametrize("objects", OBJECTS.values(), ids=OBJECTS)


# ---- the positions that stand for all -----------------------------------------------------------------


def test_positions_are_objects_first_and_the_same_for_every_image():
    """Two levels of 4x4 and 2x2 positions with two anchors each; image 0 has 3 objects, image 1 eighteen."""
    labels = torch.full((2, 40), 5)
    labels[0, [4, 5, 38]] = torch.tensor([0, -1, 2])  # positions 2 and 19
    labels[0, 7] = -1  # position 3 counts for nothing
    labels[1, :36] = 1  # positions 0 to 17
    state = torch.get_rng_state()
    found = dense_record.sample_positions(labels, [(4, 4), (2, 2)], 5, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    places = [[], []]
    for level, start in ((0, 0), (1, 16)):
        width = (4, 2)[level]
        for image, y, x in zip(*found.by_level[level], strict=True):
            places[image].append(int(start + y * width + x))
    assert len(places[0]) == len(places[1]) == 8
    assert {2, 19} <= set(places[0])
    assert len([p for p in places[1] if p < 18]) == 6  # three quarters
    rows = [r for p in places[0] for r in (2 * p, 2 * p + 1)]
    assert sorted(found.rows.tolist()) == sorted(
        [*rows, *(40 + 2 * p + a for p in places[1] for a in (0, 1))]
    )
    alone = [
        dense_record.sample_positions(own[None], [(4, 4), (2, 2)], 5, 8, seed=3) for own in labels
    ]
    assert {*found.rows.tolist()} == {*alone[0].rows.tolist(), *(alone[1].rows + 40).tolist()}
    other = dense_record.sample_positions(labels, [(4, 4), (2, 2)], 5, 8, seed=4)
    assert other.rows.tolist() != found.rows.tolist()


def test_more_positions_than_there_are_is_all():
    labels = torch.full((1, 5), 3)
    found = dense_record.sample_positions(labels, [(2, 2), (1, 1)], 3, 64, seed=0)
    assert found.rows.tolist() == [0, 1, 2, 3, 4]


# ---- the heads as judges --------------------------------------------------------------------------------


@both
@batches
def test_the_hard_judge_is_the_stock_loss_with_the_students_normaliser(name, objects):
    """A judge of the student's own weights says what the student's losses are; its own normaliser is not asked."""
    student, _, recording, stock = recorded(name, objects)
    teacher = copy.deepcopy(student)
    teacher.loss_normalizer = 1e9
    judge = detector_of(teacher)
    found = judge.head_loss("dense", recording.features, recording)
    torch.testing.assert_close(found, sum(stock.values()), rtol=1e-5, atol=1e-6)
    assert teacher.loss_normalizer == 1e9


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_soft_losses_against_numpy():
    draw = np.random.default_rng(0)
    z, target = draw.normal(0, 2, (6, 3)), draw.normal(-1, 2, (6, 3))
    p, q = sigmoid(target), sigmoid(z)
    bce = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    classes = dense_losses.soft_class_losses(torch.from_numpy(z), torch.from_numpy(target))
    np.testing.assert_allclose(classes, (np.abs(p - q) * bce).sum(1), rtol=1e-9)
    boxes = draw.uniform(0, 3, 6)
    found = dense_losses.soft_dense_loss(
        classes, torch.from_numpy(boxes), torch.from_numpy(p.max(1))
    )
    count = max(p.max(1).sum(), 1)
    expected = ((np.abs(p - q) * bce).sum() + (p.max(1) * boxes).sum()) / count
    assert found.item() == pytest.approx(expected, rel=1e-9)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    found = dense_losses.bernoulli_divergence(torch.from_numpy(z), torch.from_numpy(target))
    np.testing.assert_allclose(found, kl, rtol=1e-7, atol=1e-9)


def test_less_than_one_object_is_divided_by_one():
    values = torch.tensor([2.0, 4.0])
    assert dense_losses.soft_dense_loss(values, values, torch.tensor([0.25, 0.25])) == 6 + 1.5
    none = torch.zeros(0, requires_grad=True)
    assert dense_losses.soft_dense_loss(none, none, none).requires_grad


def test_centerness_by_hand():
    """A point at a quarter of the width and the middle of the height: sqrt(1/3 * 1)."""
    deltas = torch.tensor([[1.0, 2.0, 3.0, 2.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 2.0, 8.0]])
    expected = torch.tensor([(1 / 3) ** 0.5, 1.0, (1 / 16) ** 0.5])
    torch.testing.assert_close(dense_losses.centerness(deltas), expected)


@both
@pytest.mark.parametrize("positions", [ALL_POSITIONS, SAMPLED_POSITIONS])
@batches
def test_the_soft_judge_sends_no_gradient_on_the_targets_own_maps(name, positions, objects):
    """And one into other maps, none into its weights, without a look at the ground truth's boxes."""
    _, _, recording, _ = recorded(name, objects)
    judge = detector_of(loud(tiny_model(f"{name}_plain", seed=1)).requires_grad_(False).eval())
    maps = {k: v.detach().requires_grad_() for k, v in recording.features.items()}
    with EventStorage(0):
        targets = judge.soft_targets("dense", maps, recording, positions=positions)
        own = judge.soft_head_loss("dense", maps, targets, recording, positions=positions)
        at_rest = torch.autograd.grad(own, maps.values())
        others = {
            k: (v + torch.randn(v.shape, generator=torch.Generator().manual_seed(0)))
            for k, v in maps.items()
        }
        loss = judge.soft_head_loss("dense", others, targets, recording, positions=positions)
        recording.boxes = [b * 0 for b in recording.boxes]
        again = judge.soft_head_loss("dense", others, targets, recording, positions=positions)
    assert loss > own >= 0 and again == loss
    pulled = torch.autograd.grad(loss, maps.values())
    largest = [max(x.abs().max() for x in gradients) for gradients in (at_rest, pulled)]
    assert largest[0] < 1e-3 * largest[1]  # GIoU is rounded up for boxes of next to no area
    assert all(not t.requires_grad for t in targets)
    assert all(p.grad is None for p in judge.model.parameters())


@both
def test_sampled_positions_are_some_of_all(name):
    """The same head's outputs at the same anchors."""
    _, detector, recording, _ = recorded(name)
    whole, some = (
        detector.soft_targets("dense", recording.features, recording, positions=positions)
        for positions in (ALL_POSITIONS, SAMPLED_POSITIONS)
    )
    rows = recording.positions.rows
    assert 0 < len(rows) < len(whole.class_logits)
    for a, b in zip(whole, some, strict=True):
        torch.testing.assert_close(a[rows], b)
    torch.testing.assert_close(recording.anchor_boxes()[rows], recording.anchor_boxes(rows))


@both
def test_foreground_is_the_highest_probability_of_a_position(name):
    _, detector, recording, _ = recorded(name)
    assert detector.foreground_levels == detector.head_levels
    found = detector.foreground({"p4": recording.features["p4"]})
    logits = recording.output[0][1]
    assert found.keys() == {"p4"} and found["p4"].shape == (2, 1, *logits.shape[-2:])
    torch.testing.assert_close(found["p4"], logits.sigmoid().amax(1, keepdim=True))
    assert not found["p4"].requires_grad
