"""R2KD's losses: against numpy in float64 and by hand, identities, and gradients where the published ranks have none."""

import numpy as np
import pytest
import torch

from era.methods.r2kd.losses import RANK_GUARD, VALUE_GUARD, rank_loss, soft_ranks, value_loss


def numpy_value(own, other, tau):
    p, q = (np.exp(z / tau) / np.exp(z / tau).sum(1, keepdims=True) for z in (own, other))

    def term(a, b):
        lengths = [np.sqrt((x * x).sum(1)) for x in (a, b)]
        return 1 - np.mean(np.abs((a * b).sum(1)) / (lengths[0] * lengths[1] + VALUE_GUARD))

    return tau**2 * (term(p, q) + term(p.T, q.T))


def numpy_rank(own, other, epsilon):
    def ranks(z):
        found = np.ones_like(z)
        for r, i, j in np.ndindex(len(z), z.shape[1], z.shape[1]):
            if i != j:
                found[r, i] += 1 / (1 + np.exp((z[r, j] - z[r, i]) / epsilon))
        return found - found.mean(1, keepdims=True)

    a, b = ranks(own), ranks(other)
    lengths = np.sqrt((a * a).sum(1)) * np.sqrt((b * b).sum(1))
    return 1 - np.mean((a * b).sum(1) / (lengths + RANK_GUARD))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_against_numpy_on_random_logits(temperature):
    """More rows than classes: rows and columns cannot be mistaken for each other."""
    own, other = np.random.default_rng(0).normal(0, 3, (2, 12, 5))
    logits = tuple(map(torch.from_numpy, (own, other)))
    expected = numpy_value(own, other, temperature)
    assert value_loss(*logits, temperature).item() == pytest.approx(expected, rel=1e-9)
    expected = numpy_rank(own, other, temperature)
    assert rank_loss(*logits, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_value_by_hand():
    """p_S is (1/2, 1/2) twice, p_T (4/5, 1/5) and (1/5, 4/5). Rows: cos = (1/2) / (sqrt(1/2) sqrt(17/25)); columns: the
    same numbers, turned round."""
    teacher = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()
    expected = 2 * (1 - 0.5 / np.sqrt(0.5 * 0.68))
    assert value_loss(torch.zeros(2, 2), teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    # at tau = 2 the teacher is (2, 1) / 3, and the loss is multiplied by 4
    expected = 8 * (1 - 0.5 / np.sqrt(0.5 * 5 / 9))
    assert value_loss(torch.zeros(2, 2), teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_columns_compare_the_rows_with_each_other():
    """Rows that are mistaken for each other: with one and the same rows, rows agree as little, columns do."""
    teacher = torch.eye(2) * 50
    assert value_loss(teacher.flip(0), teacher, 1.0).item() == pytest.approx(2.0, abs=1e-6)
    same = teacher[[0, 0]]
    assert value_loss(same, same, 1.0).item() == pytest.approx(0.5, abs=1e-6)  # column 1 is 0


def test_ranks_by_hand_and_in_the_limit():
    values = torch.tensor([[1.0, 3.0, 9.0]]).log()
    # 1 over 3 and 1 over 9 to 1: 1/4 and 1/10, and so on
    expected = [[1 + 0.25 + 0.1, 1 + 0.75 + 0.25, 1 + 0.9 + 0.75]]
    torch.testing.assert_close(soft_ranks(values, 1.0), torch.tensor(expected))
    values = torch.randn(20, 7, dtype=torch.double)
    hard = values.argsort(1).argsort(1) + 1
    torch.testing.assert_close(soft_ranks(values, 1e-6), hard.double())
    torch.testing.assert_close(soft_ranks(torch.zeros(1, 5), 0.1), torch.full((1, 5), 3.0))


def test_it_tends_to_spearmans_correlation():
    own, other = torch.randn(2, 30, 8, dtype=torch.double)
    expected = []
    for a, b in zip(own.argsort(1).argsort(1), other.argsort(1).argsort(1), strict=True):
        expected.append(1 - np.corrcoef(a, b)[0, 1])
    assert rank_loss(own, other, 1e-7).item() == pytest.approx(np.mean(expected), abs=1e-4)
    by_hand = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]])  # 1 - 6 * 2 / 24
    assert rank_loss(*by_hand, 1e-3).item() == pytest.approx(0.5, abs=1e-3)


def test_equal_logits_are_no_distance_and_a_shift_of_a_row_is_none():
    logits, shift = torch.randn(9, 5), torch.randn(9, 1)
    for loss in (value_loss, rank_loss):
        assert loss(logits + shift, logits, 1.0).item() == pytest.approx(0, abs=1e-3)


def test_the_rank_term_sends_a_gradient_that_brings_the_order_nearer():
    """The published one, by argsort, sends none."""
    student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, 2.0, 1.0]], requires_grad=True)
    before = rank_loss(student, teacher, 1.0)
    before.backward()
    assert teacher.grad is None and student.grad[0, 0] < 0 < student.grad[0, 2]
    assert rank_loss(student - 0.5 * student.grad, teacher, 1.0) < before


@pytest.mark.parametrize("loss", [value_loss, rank_loss])
def test_no_row_is_a_connected_zero_and_half_precision_becomes_float32(loss):
    student = torch.zeros(0, 4, requires_grad=True)
    found = loss(student, torch.zeros(0, 4), 1.0)
    assert found == 0
    found.backward()
    student, teacher = torch.randn(2, 6, 4)
    halves = (student * 2e4).half().requires_grad_(), (teacher * 2e4).half()
    found = loss(*halves, 4.0)
    found.backward()
    assert found.dtype == torch.float32 and found.isfinite() and halves[0].grad.isfinite().all()
    level = torch.zeros(3, 4, requires_grad=True)  # no variance
    loss(level, teacher[:3], 1.0).backward()
    assert level.grad.isfinite().all()


@pytest.mark.parametrize("loss", [value_loss, rank_loss])
def test_autocast_changes_nothing(loss):
    student, teacher = torch.randn(2, 8, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher, 2.0)
    torch.testing.assert_close(found, loss(student, teacher, 2.0))
