"""DKD's terms: by hand, against numpy in float64, as parts of KD, of two classes, and confident logits."""

import math

import numpy as np
import pytest
import torch

from era.losses import kd_loss
from era.methods.dkd import dkd_terms


def log(*rows):
    """Logits of these probabilities, by row."""
    return torch.tensor(rows, dtype=torch.float64).log()


def test_by_hand():
    """Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2), the right class the first: b is (1/2, 1/2) and (1/4, 3/4), the
    others are (1/2, 1/2) and (1/3, 2/3)."""
    target, others = dkd_terms(
        log([1 / 4, 1 / 4, 1 / 2]) + 7, log([1 / 2, 1 / 4, 1 / 4]), torch.tensor([0]), 1.0
    )
    assert target.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert others.item() == pytest.approx(0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4))


def test_against_numpy():
    """Means over rows of sums over classes; background, the last class, is a right class as any other."""
    draw = np.random.default_rng(1)
    student, teacher = draw.normal(0, 2, (6, 4)), draw.normal(0, 3, (6, 4))
    classes, tau = np.array([0, 3, 1, 3, 2, 0]), 4.0
    target, others = [], []
    for s, t, y in zip(student / tau, teacher / tau, classes, strict=True):
        p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
        target.append(p[y] * np.log(p[y] / q[y]) + (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y])))
        p, q = np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])
        others.append((p * np.log(p / q)).sum())
    found = dkd_terms(*map(torch.from_numpy, (student, teacher, classes)), tau)
    assert found[0].item() == pytest.approx(tau**2 * np.mean(target), rel=1e-10)
    assert found[1].item() == pytest.approx(tau**2 * np.mean(others), rel=1e-10)


def test_alpha_1_and_beta_the_teachers_doubt_are_kd():
    """KL = TCKD + (1 - p_T(y)) NCKD, in each row."""
    student, teacher = torch.randn(2, 8, 5, dtype=torch.float64)
    classes = torch.randint(0, 5, (8,))
    doubt = 1 - (teacher / 2).softmax(1)[range(8), classes]
    for i in range(8):
        row = slice(i, i + 1)
        target, others = dkd_terms(student[row], teacher[row], classes[row], 2.0)
        expected = kd_loss(student[row], teacher[row], 2.0)
        torch.testing.assert_close(target + doubt[i] * others, expected)


def test_of_one_class_and_background_the_target_is_all():
    student, teacher = torch.randn(2, 5, 2)
    target, others = dkd_terms(student, teacher, torch.tensor([0, 1, 0, 1, 1]), 1.0)
    torch.testing.assert_close(target, kd_loss(student, teacher, 1.0))
    assert others == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_confident_logits(dtype):
    """Student sure of the right class 0, teacher of class 1: b_T = (0, 1), b_S = (1, 2 e^-z) and q_S = (1/2, 1/2)."""
    z = 60000.0
    student = torch.tensor([[z, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, z, 0.0]], dtype=dtype)
    target, others = dkd_terms(student, teacher, torch.tensor([0]), 0.5)
    assert target.item() == pytest.approx(0.25 * (2 * z - math.log(2)), rel=1e-6)
    assert others.item() == pytest.approx(0.25 * math.log(2))
    (target + others).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.5, 0.0]], dtype=dtype))


def test_a_row_without_its_class_is_an_error():
    with pytest.raises(ValueError, match=r"shapes differ: \(2,\) classes"):
        dkd_terms(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), 1.0)
