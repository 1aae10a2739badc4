"""An R-CNN's heads judge feature maps by their own outputs on other maps, without ground truth.

``h_T`` are the frozen heads, ``F_T`` the maps that set the example (the teacher's) and ``e`` the maps that are judged.
The formulas of the RPN are CrossKD's (arXiv 2306.11369: the frozen head on the student's features is matched to the
teacher's predictions), with L1 on deltas in the place of GIoU; those of the ROI head are ERA's ``featKL``
with a box term of the same kind. No loss weight of Detectron2 enters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from era.modeling.detectors.rcnn_losses import RCNNRecording
from era.modeling.detectors.recording import SAMPLED_POSITIONS, Predictions

if TYPE_CHECKING:
    from era.modeling.detectors.rcnn import RCNN


class StageTargets(NamedTuple):
    """What one box head is to say.

    Attributes:
        proposals: of what, one an image, row by row of the student's sampled ones.
        targets: its outputs on ``F_T``, constants.
    """

    proposals: list[Instances]
    targets: Predictions


def predict_anchors_at(
    detector: RCNN, features: dict[str, Tensor], recording: RCNNRecording, positions: str
) -> Predictions:
    """Objectness logits (A,) and deltas (A, 4) of the RPN's head: at ``all`` anchors, images one after the other, or
    at those that the student ``sampled``."""
    logits, deltas = (torch.cat(x, dim=1).flatten(0, 1) for x in detector.predict_anchors(features))
    if positions == SAMPLED_POSITIONS:
        logits, deltas = (x[recording.sampled_anchors] for x in (logits, deltas))
    return Predictions(logits, deltas)


def soft_anchor_losses(logits: Tensor, deltas: Tensor, target: Predictions) -> Tensor:
    """The soft RPN loss of E estimates at the same anchors.

    With ``p_T`` and ``p`` the objectness probabilities on ``F_T`` and ``e``, ``t_T`` and ``t`` the deltas::

        (sum_a sg|p_T - p| BCE(p, p_T) + sum_a p_T |t - t_T|_1) / max(sum_a p_T, 1)

    L1 is summed over the four deltas. The sums run over the anchors of the whole batch. That a batch in which the
    teacher sees less than one object is divided by 1 is this project's choice.

    Args:
        logits, deltas: on ``e``, (E, A) and (E, A, 4).
        target: on ``F_T``, (A,) and (A, 4), constants.

    Returns:
        (E,); 0, connected to the graph, for no anchor.
    """
    target_logits, target_deltas = target
    p = target_logits.sigmoid()
    distance = (p - logits.detach().sigmoid()).abs()
    objectness = F.binary_cross_entropy_with_logits(logits, p.expand_as(logits), reduction="none")
    location = (deltas - target_deltas).abs().sum(2)
    return (distance * objectness + p * location).sum(1) / p.sum().clamp(min=1)


def soft_proposal_losses(
    predictor: FastRCNNOutputLayers,
    logits: Tensor,
    deltas: Tensor,
    target: Predictions,
    temperature: float,
) -> Tensor:
    """The soft ROI loss of E estimates, proposal by proposal; the mean over proposals is the loss.

    With ``p_T`` the class probabilities on ``F_T``, and ``t_T``, ``t`` the deltas of class c::

        tau^2 KL(p_T^tau || p^tau) + sum_{c foreground} p_T(c) |t(c) - t_T(c)|_1

    So a box counts by how likely the teacher holds its class there, and over the classes by its foreground
    probability, which is also the weight of class-agnostic deltas. L1 is summed over a box's deltas. Heads of sigmoids
    have a KL a foreground class, summed, and their most likely class is the foreground probability. That the box
    term is divided by the number of proposals, as Detectron2's is, and not by ``sum p_T`` is this project's choice: the
    loss of a part of the proposals then stands for that of all.

    Args:
        predictor: the head's last layers, for the meaning of its outputs.
        logits, deltas: on ``e``, (E, R, C + 1) and (E, R, 4C or 4).
        target: on ``F_T``, (R, C + 1) and (R, 4C or 4), constants.
        temperature: ``tau`` > 0.

    Returns:
        (E, R).
    """
    target_logits, target_deltas = target
    size = len(predictor.box2box_transform.weights)
    if predictor.use_sigmoid_ce:
        own, goal = (x[..., :-1] / temperature for x in (logits, target_logits))
        probability = goal.sigmoid()
        divergence = (
            F.binary_cross_entropy_with_logits(own, probability.expand_as(own), reduction="none")
            - F.binary_cross_entropy_with_logits(goal, probability, reduction="none")
        ).sum(2)
        weights = target_logits[:, :-1].sigmoid()
        foreground = weights.amax(1, keepdim=True)
    else:
        own, goal = (F.log_softmax(x / temperature, dim=-1) for x in (logits, target_logits))
        divergence = (goal.exp() * (goal - own)).sum(2)
        weights = target_logits.softmax(1)[:, :-1]
        foreground = weights.sum(1, keepdim=True)
    if deltas.shape[2] == size:
        weights = foreground
    distance = (deltas - target_deltas).abs().unflatten(2, (-1, size)).sum(3)  # by class
    return temperature**2 * divergence + (weights * distance).sum(2)


def soft_roi_loss(
    detector: RCNN,
    features: dict[str, Tensor],
    target: Predictions,
    recording: RCNNRecording,
    samples_per_image: int,
    temperature: float,
) -> Tensor:
    """Mean of :func:`soft_proposal_losses` on given maps, over a part of the student's sampled proposals that stands
    for all (0 = all), and over the box heads.

    Args:
        target: :meth:`RCNN.soft_targets` on all of the step's sampled proposals.
    """
    sample = recording.sample(samples_per_image)
    stages, total = detector.soft_stages(target, recording), 0.0
    for stage, (proposals, expected) in enumerate(stages):
        predictions = detector.predict_stage(stage, features, sample.rows_of(proposals))
        if not sample.strata:  # no proposal at all
            total = total + sum(x.sum() * 0 for x in predictions)
            continue
        values = soft_proposal_losses(
            detector.box_stages[stage].predictor,
            *(x[None] for x in predictions),
            Predictions(*(x[sample.rows] for x in expected)),
            temperature,
        )[0]
        means = (stratum.share * values[stratum.indices].mean() for stratum in sample.strata)
        total = total + sum(means)
    return total / len(stages)
