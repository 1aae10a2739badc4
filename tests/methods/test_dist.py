"""DIST's terms: by hand, against numpy in float64, one row, no variance, two classes, and confident logits."""

import numpy as np
import pytest
import torch

from era.methods.dist import correlation, dist_terms


def test_correlation_by_hand():
    """1, -1, 0, and 0 for a row without variance."""
    a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 0.0, 1.0], [5.0, 5.0, 5.0]])
    b = torch.tensor([[2.0, 4.0, 6.0], [9.0, 5.0, 1.0], [0.0, 5.0, 10.0], [1.0, 2.0, 3.0]])
    torch.testing.assert_close(correlation(a, b), torch.tensor([1.0, -1.0, 0.0, 0.0]))


def test_terms_by_hand():
    """Probabilities 1/3 + d. The rows correlate by 1 and 1/2; the columns by 1, 0 (no variance in the teacher) and 1."""
    teacher = 1 / 3 + torch.tensor([[0.3, 0.0, -0.3], [-0.3, 0.0, 0.3]], dtype=torch.float64)
    student = 1 / 3 + torch.tensor([[0.15, 0.0, -0.15], [0.0, -0.3, 0.3]], dtype=torch.float64)
    inter, intra = dist_terms(student.log(), teacher.log() - 5, 1.0)
    assert inter.item() == pytest.approx(1 / 4, abs=1e-6)
    assert intra.item() == pytest.approx(1 / 3, abs=1e-6)


def test_against_numpy():
    """Of probabilities, not logits: numpy's own correlation of rows and of columns."""
    draw = np.random.default_rng(3)
    student, teacher, tau = draw.normal(0, 2, (9, 6)), draw.normal(0, 3, (9, 6)), 1.5
    p, q = (np.exp(x / tau) / np.exp(x / tau).sum(1, keepdims=True) for x in (teacher, student))
    rows = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
    columns = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)]
    inter, intra = dist_terms(torch.from_numpy(student), torch.from_numpy(teacher), tau)
    # the guard against rows without variance is 1e-8 beside a product of norms of 0.01 and more
    assert inter.item() == pytest.approx(np.mean(rows), abs=1e-6)
    assert intra.item() == pytest.approx(np.mean(columns), abs=1e-6)


def test_the_teachers_own_distributions_cost_nothing():
    logits = torch.randn(5, 4)
    assert sum(dist_terms(logits + 2, logits, 1.0)).item() == pytest.approx(0, abs=1e-5)


def test_one_row_is_compared_over_classes_alone():
    student = torch.randn(1, 5, requires_grad=True)
    inter, intra = dist_terms(student, torch.randn(1, 5), 1.0)
    assert inter > 0 and intra == 0
    intra.backward()  # connected
    assert student.grad.abs().sum() == 0


def test_of_two_classes_the_proposals_alone_teach():
    """Two numbers of known sum correlate by 1 or -1, however far apart; over proposals there is more to match."""
    student = torch.tensor([[2.0, 0.0], [0.3, 0.0], [-1.0, 0.0]], requires_grad=True)
    inter, intra = dist_terms(student, torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0]]), 1.0)
    assert inter.item() == pytest.approx(2 / 3, abs=1e-5)  # 1 - (1 + 1 - 1) / 3
    (gradient,) = torch.autograd.grad(inter, student, retain_graph=True)
    assert gradient.abs().max() < 1e-5
    intra.backward()
    assert student.grad.abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_confident_logits(dtype):
    """Columns of nothing but zeros, and rows that are all equal: no variance, no nan."""
    student = torch.tensor([[60000.0, 0, 0], [60000.0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[60000.0, 0, 0], [0, 60000.0, 0]], dtype=dtype)
    inter, intra = dist_terms(student, teacher, 0.5)
    assert inter.item() == pytest.approx(1 - (1 - 0.5) / 2) and intra == 1
    (inter + intra).backward()
    assert torch.isfinite(student.grad).all()


def test_uniform_distributions_have_a_finite_gradient():
    uniform = torch.zeros(3, 4, requires_grad=True)
    sum(dist_terms(uniform, torch.randn(3, 4), 1.0)).backward()
    assert torch.isfinite(uniform.grad).all()
