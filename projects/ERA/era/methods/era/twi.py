"""Teacher Weight Integration (TWI): the teacher's frozen heads judge every estimate of its features.

ERA lets the teacher's classifier judge every estimate of the teacher's pooled feature. Here the estimate
is an FPN, so the judges are the detection heads, and the losses are the teacher's own detection losses
against the ground truth; soft judges ask instead that the heads say of the estimate what they say of the
teacher's maps (ERA's option ``featKL``, CrossKD). Gradients pass through the heads into the estimate; the
heads' weights never change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from era.modeling.detectors import Detector, Recording
from era.modeling.detectors.recording import ALL_POSITIONS


@dataclass(frozen=True)
class SoftJudges:
    """How the teacher's heads judge softly.

    Attributes:
        parts: of the heads; none = not at all.
        positions: ``all`` anchors of a dense head, or those that the student ``sampled``.
        temperature: ``tau`` of class distributions.
    """

    parts: tuple[str, ...] = ()
    positions: str = ALL_POSITIONS
    temperature: float = 1.0


NO_SOFT_JUDGES = SoftJudges()


def judge_weights(scales: Sequence[float]) -> list[float]:
    """Weights of the judgements of ``e_0..e_N``: 1, then ``s_i / N``."""
    return [1.0] + [scale / len(scales) for scale in scales]


def ends(weights: Sequence[float]) -> list[float]:
    """Weights of the judgements of ``e_0`` and ``e_N`` alone: what the estimates between would weigh goes to ``e_N``."""
    return [weights[0], sum(weights[1:])] if len(weights) > 1 else list(weights)


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

    def loss(estimate: dict[str, Tensor], count: int) -> Tensor:
        return judge.head_loss(part, estimate, recording, samples_per_image=count)

    return _over_estimates(loss, estimates, weights, samples_per_image)


def soft_twi_loss(
    judge: Detector,
    part: str,
    estimates: Sequence[dict[str, Tensor]],
    weights: Sequence[float],
    target: dict[str, Tensor],
    recording: Recording,
    *,
    samples_per_image: int,
    soft: SoftJudges,
) -> Tensor:
    """``sum_i w_i * D(h_T(e_i), sg h_T(F_T))``: one part of the teacher's heads judges every estimate by its own
    outputs on the teacher's maps, which are computed once; ``D`` is :meth:`Detector.soft_head_loss`.

    Args:
        judge, part, estimates, weights, recording: as in :func:`twi_loss`.
        target: ``F_T``, level name to (B, C_T, H, W).
        samples_per_image: as in :func:`twi_loss`; dense heads look at the positions that ``soft`` names.
        soft: how they judge.
    """
    targets = judge.soft_targets(part, target, recording, positions=soft.positions)

    def loss(estimate: dict[str, Tensor], count: int) -> Tensor:
        return judge.soft_head_loss(
            part,
            estimate,
            targets,
            recording,
            samples_per_image=count,
            positions=soft.positions,
            temperature=soft.temperature,
        )

    return _over_estimates(loss, estimates, weights, samples_per_image)


def _over_estimates(
    loss: Callable[[dict[str, Tensor], int], Tensor],
    estimates: Sequence[dict[str, Tensor]],
    weights: Sequence[float],
    samples_per_image: int,
) -> Tensor:
    """``sum_i w_i loss(e_i)``: ``e_0`` on all samples, the others on ``samples_per_image``."""
    counts = [0] + [samples_per_image] * (len(estimates) - 1)
    return sum(
        weight * loss(estimate, count)
        for weight, estimate, count in zip(weights, estimates, counts, strict=True)
    )


def judgements(
    judge: Detector,
    part: str,
    estimates: Sequence[dict[str, Tensor]],
    weights: Sequence[float],
    target: dict[str, Tensor],
    recording: Recording,
    *,
    samples_per_image: int,
    hard: bool,
    soft: SoftJudges | None,
) -> dict[str, Tensor]:
    """:func:`twi_loss` under ``twi`` and :func:`soft_twi_loss` under ``soft``, as far as each is asked for.

    Args:
        hard: whether the ground truth is asked.
        soft: how the heads judge by their own outputs on ``target``; None if they do not.
    """
    found = {}
    if hard:
        found["twi"] = twi_loss(
            judge, part, estimates, weights, recording, samples_per_image=samples_per_image
        )
    if soft is not None:
        found["soft"] = soft_twi_loss(
            judge,
            part,
            estimates,
            weights,
            target,
            recording,
            samples_per_image=samples_per_image,
            soft=soft,
        )
    return found
