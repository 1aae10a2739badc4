"""Teacher Weight Integration (TWI): the teacher's frozen heads judge every estimate of its features.

ERA lets the teacher's classifier judge every estimate of the teacher's pooled feature. Here the estimate
is an FPN, so the judges are the detection heads, and the losses are the teacher's own detection losses
against the ground truth. Gradients pass through the heads into the estimate; the heads' weights never
change.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from era.modeling.detectors import Detector, Recording


def judge_weights(scales: Sequence[float]) -> list[float]:
    """Weights of the judgements of ``e_0..e_N``: 1, then ``s_i / N``."""
    return [1.0] + [scale / len(scales) for scale in scales]


def twi_loss(
    judge: Detector,
    part: str,
    estimates: Sequence[dict[str, Tensor]],
    weights: Sequence[float],
    recording: Recording,
    *,
    samples_per_image: int,
) -> Tensor:
    """``sum_i w_i * L(h_T(e_i), y)``: the losses of one part of the teacher's heads, summed over estimates.

    Args:
        judge: the teacher.
        part: of its heads, e.g. ``rpn`` or ``roi``.
        estimates: ``e_0..e_N``, each level name to (B, C_T, H, W).
        weights: one an estimate, see :func:`judge_weights`.
        recording: the student's step, for its samples and their ground truth.
        samples_per_image: ``e_1..e_N`` are judged on a part of the samples that stands for all; 0 = all.
            ``e_0``, which has the largest weight, is always judged on all.
    """
    total = 0.0
    for i, (weight, estimate) in enumerate(zip(weights, estimates, strict=True)):
        count = samples_per_image if i > 0 else 0
        loss = judge.head_loss(part, estimate, recording, samples_per_image=count)
        total = total + weight * loss
    return total
