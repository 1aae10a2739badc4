"""KD on a detector's proposals: against numpy in float64, beside ERA's own term, and confident logits."""

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_model

from era.losses import kd_loss


def test_against_numpy():
    """Summed over classes, mean over rows, the teacher first, times tau squared."""
    draw = np.random.default_rng(0)
    student, teacher = draw.normal(0, 3, (7, 5)), draw.normal(1, 2, (7, 5))
    rows = []
    for s, t in zip(student / 2.5, teacher / 2.5, strict=True):
        p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
        rows.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
    found = kd_loss(torch.from_numpy(student), torch.from_numpy(teacher), 2.5)
    assert found.item() == pytest.approx(2.5**2 * np.mean(rows), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_confident_logits(dtype):
    """All on class 0 against all on class 1: KL = 60000 / tau, up to two e^-60000."""
    student = torch.tensor([[60000.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, 60000.0, 0.0]], dtype=dtype)
    loss = kd_loss(student, teacher, 0.5)
    assert loss.item() == pytest.approx(0.5**2 * 120000)
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.5, 0.0]], dtype=dtype))


def test_it_is_the_term_that_era_has_too():
    """On all proposals, with each weight and temperature."""
    found, _ = losses_of(
        tiny_model(
            "era", "MODEL.DISTILLER.METHODS", "('ERA', 'KD')",
            "MODEL.KD.WEIGHT", "3.0", "MODEL.KD.TEMPERATURE", "2.0",
            "MODEL.ERA.KD_WEIGHT", "1.5", "MODEL.ERA.KD_TEMPERATURE", "2.0",
            "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "0",
        ),
        batch(),
    )  # fmt: skip
    assert found["loss_kd_classes"] > 0
    torch.testing.assert_close(found["loss_kd_classes"], 2 * found["loss_era_kd"])
