"""SSKD's terms on numbers worked by hand and against numpy in float64, and its queue."""

import math

import numpy as np
import pytest
import torch

from era.methods.sskd.losses import (
    chosen_rows,
    contrastive_loss,
    cosine_similarities,
    selected_kd_loss,
)
from era.methods.sskd.queue import EmbeddingQueue


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_cosines_by_hand_and_against_numpy():
    rows, columns = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -5.0]])
    found = cosine_similarities(rows, columns)
    torch.testing.assert_close(found, torch.tensor([[0.6, -0.8], [0.0, -1.0]]))
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(5, 7)), draw.normal(size=(8, 7))
    expected = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a]
    found = cosine_similarities(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_contrast_by_hand_and_against_numpy():
    """Each row has 1 at its own column and 0 or -1 elsewhere: log(1 + 1/e) and log(1 + e^-2)."""
    found = contrastive_loss(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    assert found.item() == pytest.approx(expected, rel=1e-6)
    draw = np.random.default_rng(1).uniform(-1, 1, (4, 6))
    expected = -np.mean(log_softmax(draw)[range(4), range(4)])
    assert contrastive_loss(torch.from_numpy(draw)).item() == pytest.approx(expected, rel=1e-12)


def test_the_best_of_the_wrong_rows_are_chosen():
    """Ranks of the right column 0, 2, 1, 0, 1, 3: of four wrong rows the share is taken in the order 2, 4, 1, 5."""
    scores = torch.tensor(
        [[4.0, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1], [1, 1, 1, 1], [0, 9, 0, 8], [4, 3, 2, 1]]
    )
    right = torch.tensor([0, 2, 1, 2, 3, 3])
    for share, rows in (
        (0.0, [0, 3]),
        (0.25, [0, 2, 3]),
        (0.5, [0, 2, 3, 4]),
        (0.75, [0, 1, 2, 3, 4]),
        (0.99, [0, 1, 2, 3, 4]),  # 3.96 rows are 3
        (1.0, [0, 1, 2, 3, 4, 5]),
    ):
        assert chosen_rows(scores, right, share).tolist() == rows


def test_the_choice_is_the_sources_where_no_scores_are_equal():
    """By sorting, as ``student.py`` does it, in numpy."""
    draw = np.random.default_rng(2)
    scores, right = draw.normal(size=(40, 9)), draw.integers(0, 9, 40)
    rank = np.argmax(np.argsort(-scores, axis=1) == right[:, None], axis=1)
    for share in (0.0, 0.3, 0.75, 1.0):
        wrong = int((rank > 0).sum())
        kept = np.argsort(rank, kind="stable")[: 40 - wrong + int(wrong * share)]
        found = chosen_rows(torch.from_numpy(scores), torch.from_numpy(right), share)
        assert found.tolist() == sorted(kept.tolist())


def test_kl_of_chosen_rows_against_numpy():
    draw = np.random.default_rng(3)
    own, other = draw.normal(0, 2, (12, 5)), draw.normal(0, 2, (12, 5))
    right = draw.integers(0, 5, 12)
    rank = (other > other[range(12), right][:, None]).sum(1)
    wrong = int((rank > 0).sum())
    rows = np.argsort(rank, kind="stable")[: 12 - wrong + int(0.75 * wrong)]
    assert 0 < len(rows) < 12
    log_p, log_q = log_softmax(own / 0.5)[rows], log_softmax(other / 0.5)[rows]
    expected = 0.25 * (np.exp(log_q) * (log_q - log_p)).sum(1).mean()
    given = torch.from_numpy(own), torch.from_numpy(other), torch.from_numpy(right)
    found = selected_kd_loss(*given, temperature=0.5, share=0.75)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_nothing_to_compare_is_zero_and_connected():
    rows = torch.zeros(0, 4, requires_grad=True)
    none = cosine_similarities(rows, torch.zeros(0, 4))
    for loss in (
        contrastive_loss(none),
        selected_kd_loss(none, none.detach(), torch.zeros(0, dtype=torch.long), 0.5, 0.75),
    ):
        assert loss.item() == 0 and loss.requires_grad
    one = torch.randn(1, 4, requires_grad=True)
    alone = cosine_similarities(one, torch.randn(1, 4))
    right = torch.zeros(1, dtype=torch.long)
    for loss in (contrastive_loss(alone), selected_kd_loss(alone, alone, right, 0.5, 0.75)):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, one, retain_graph=True)
        assert torch.equal(gradient, torch.zeros(1, 4))
    wrong = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = selected_kd_loss(wrong, wrong.detach(), right, 0.5, 0.75)  # 0.75 of one row: none
    assert loss.item() == 0 and loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    """The squared length of such a vector is beyond float16."""
    rows = torch.full((2, 64), 300.0, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cosine_similarities(rows, rows.detach())
        loss = contrastive_loss(found)
    assert found.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(found, torch.ones(2, 2))
    loss.backward()
    assert torch.isfinite(rows.grad).all()


def test_a_zero_vector_has_a_finite_gradient():
    rows = torch.zeros(2, 3, requires_grad=True)
    contrastive_loss(cosine_similarities(rows, torch.randn(2, 3))).backward()
    assert torch.isfinite(rows.grad).all()


def test_the_queue_keeps_the_newest():
    queue = EmbeddingQueue(3, 2, 1)
    assert [len(x) for x in queue.rows()] == [0, 0]
    number = torch.arange(1.0, 7.0)
    for rows, kept in (
        (number[:2], [1, 2]),
        (number[:0], [1, 2]),
        (number[2:4], [3, 4, 1]),
        (number, [1, 2, 3]),
    ):
        queue.push(rows[:, None].expand(-1, 2), 10 * rows[:, None])
        own, other = queue.rows()
        assert own.tolist() == [[x, x] for x in kept]
        assert other.tolist() == [[10 * x] for x in kept]
    copy = EmbeddingQueue(3, 2, 1)
    copy.load_state_dict(queue.state_dict())  # what a run that is resumed goes on with
    torch.testing.assert_close(copy.rows(), queue.rows())
    nothing = EmbeddingQueue(0, 2, 1)
    nothing.push(torch.ones(4, 2), torch.ones(4, 1))
    assert [len(x) for x in nothing.rows()] == [0, 0]
