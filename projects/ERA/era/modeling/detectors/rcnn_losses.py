"""What an R-CNN's training step holds, and its losses sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn import functional as F

from era.losses import at_least_float32
from era.modeling.detectors.box_losses import box_losses
from era.modeling.detectors.proposals import ProposalSample, sample_proposals
from era.modeling.detectors.recording import Predictions, Recording, TaskLoss


@dataclass
class RCNNRecording(Recording):
    """A training step of an R-CNN.

    Attributes:
        anchors: the RPN's anchors, one :class:`Boxes` a level, pixels.
        anchor_labels: per image, (sum of H * W * A,) of 1 object, 0 background, -1 not sampled.
        anchor_boxes: per image, the matched ground-truth box of every anchor, (sum of H * W * A, 4).
        anchors_per_image: ``MODEL.RPN.BATCH_SIZE_PER_IMAGE``, what the RPN's losses are divided by.
        rpn_output: the RPN head's objectness logits (B, A, H, W) and deltas (B, 4A, H, W), lists by level.
        proposals: per image, the sampled proposals with ``gt_classes`` (and ``gt_boxes`` if any).
        num_classes: the class of background.
        roi_features: the box pooler's output on those proposals, (R, C_S, P, P), with gradient.
        hidden: what the box head's first fully connected layer makes of them, before the ReLU, (R, D), with
            gradient; None if it has none.
    """

    anchors: list[Boxes] = field(default_factory=list)
    anchor_labels: list[Tensor] = field(default_factory=list)
    anchor_boxes: list[Tensor] = field(default_factory=list)
    anchors_per_image: int = 0
    rpn_output: tuple[list[Tensor], list[Tensor]] = ((), ())
    proposals: list[Instances] = field(default_factory=list)
    num_classes: int = 0
    roi_features: Tensor = None
    hidden: Tensor = None
    _samples: dict[int, ProposalSample] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> list[Instances]:
        """The sampled proposals."""
        return self.proposals

    @property
    def classes(self) -> Tensor:
        """``gt_classes`` of the sampled proposals, all images one after the other."""
        return classes_of(self.proposals)

    @property
    def sampled_anchors(self) -> Tensor:
        """(n,), rows of the anchors that the RPN's losses look at, all images one after the other."""
        return (torch.stack(self.anchor_labels).flatten() >= 0).nonzero(as_tuple=True)[0]

    def sample(self, per_image: int) -> ProposalSample:
        """A part of the proposals that stands for all (0 = all); taken once a step, whoever asks."""
        if per_image not in self._samples:
            self._samples[per_image] = sample_proposals(self.proposals, self.num_classes, per_image)
        return self._samples[per_image]


def rpn_task_losses(model: GeneralizedRCNN, recording: RCNNRecording) -> dict[str, TaskLoss]:
    """``loss_rpn_cls`` over sampled anchors, ``loss_rpn_loc`` over those of them that are objects."""
    rpn = model.proposal_generator
    logits, deltas = (torch.cat(x, dim=1) for x in by_anchor(*recording.rpn_output))
    labels = torch.stack(recording.anchor_labels)
    boxes = torch.cat([anchors.tensor for anchors in recording.anchors]).repeat(len(labels), 1)
    normaliser = float(recording.anchors_per_image * len(labels))
    rows = recording.sampled_anchors
    objects = (labels.flatten() == 1).nonzero(as_tuple=True)[0]
    truth = labels.flatten()[rows].to(logits.dtype)
    objectness = F.binary_cross_entropy_with_logits(logits.flatten()[rows], truth, reduction="none")
    matched = torch.cat(recording.anchor_boxes)[objects]
    location = box_losses(rpn, boxes[objects], matched, deltas.flatten(0, 1)[None, objects])[0]
    scale = rpn.loss_weight
    return {
        "loss_rpn_cls": TaskLoss(scale.get("loss_rpn_cls", 1.0) * objectness, normaliser, rows),
        "loss_rpn_loc": TaskLoss(scale.get("loss_rpn_loc", 1.0) * location, normaliser, objects),
    }  # fmt: skip


def roi_task_losses(
    predictor: FastRCNNOutputLayers, predictions: Predictions, proposals: list[Instances]
) -> dict[str, TaskLoss]:
    """``loss_cls`` over proposals (left out where it is federated), ``loss_box_reg`` over those of them that are
    objects.

    Args:
        predictor: of the student, for its settings.
        predictions: what it said of them, with gradient.
        proposals: with ``gt_classes`` (and ``gt_boxes`` if any), one an image.
    """
    logits, deltas = (at_least_float32(x) for x in predictions)
    classes = classes_of(proposals)
    rows, normaliser = torch.arange(len(classes), device=classes.device), max(len(classes), 1)
    scale, losses = predictor.loss_weight, {}
    if not predictor.use_fed_loss:
        if predictor.use_sigmoid_ce:
            truth = F.one_hot(classes, predictor.num_classes + 1)[:, :-1].to(logits.dtype)
            values = F.binary_cross_entropy_with_logits(
                logits[:, :-1], truth, reduction="none"
            ).sum(1)
        else:
            values = F.cross_entropy(logits, classes, reduction="none")
        values = scale.get("loss_cls", 1.0) * values
        losses["loss_cls"] = TaskLoss(values, normaliser, rows)
    objects = (classes < predictor.num_classes).nonzero(as_tuple=True)[0]
    boxes, matched = boxes_and_truth(proposals)
    location = box_losses(
        predictor,
        boxes[objects],
        matched[objects],
        deltas_of_class(deltas[None, objects], classes[objects], boxes.shape[1]),
    )[0]
    location = scale.get("loss_box_reg", 1.0) * location
    losses["loss_box_reg"] = TaskLoss(location, normaliser, objects)
    return losses


def sample_loss(
    predictor: FastRCNNOutputLayers,
    predictions: Predictions,
    sample: ProposalSample,
    instead: list[Instances] | None = None,
    knows: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Detectron2's class and box losses of a part of a step's proposals that stands for all, stratum by stratum.

    Args:
        predictor: for its loss settings.
        predictions: row by row of the sample.
        instead: what a cascade made of the sample's proposals, row by row, with classes and boxes of their own; those
            without area are left out, as in Detectron2's training.
        knows: of classes (R,) whether the predictor has learnt them; a proposal of another one counts, and adds nothing.
            None if it has learnt all.

    Returns:
        Scalar; 0, connected to the graph, of no proposal.
    """
    if not sample.strata:
        return sum(x.sum() * 0 for x in predictions)
    joined = None if instead is None else _joined(instead)
    total = 0.0
    for stratum in sample.strata:
        rows, proposals = stratum.indices, stratum.proposals
        if joined is not None:
            rows = rows[joined.proposal_boxes[rows].nonempty()]
            proposals = [joined[rows]]
        share = stratum.share
        if knows is not None:
            kept = knows(classes_of(proposals))
            share = share * kept.sum() / max(len(kept), 1)
            parts = kept.split([len(own) for own in proposals])
            proposals = [own[part] for own, part in zip(proposals, parts, strict=True)]
            rows = rows[kept]
        with _statistics_apart():
            losses = predictor.losses(tuple(x[rows] for x in predictions), proposals)
        total = total + share * sum(losses.values())
    return total


def _joined(proposals: Sequence[Instances]) -> Instances:
    """Labelled proposals of all images as if they were of one."""
    found = Instances((0, 0))
    for name in ("proposal_boxes", "gt_boxes"):
        found.set(name, Boxes.cat([own.get(name) for own in proposals]))
    found.gt_classes = classes_of(proposals)
    return found


@contextmanager
def _statistics_apart() -> Iterator[None]:
    """Keep the statistics that Detectron2's loss functions log apart from the student's own."""
    with get_event_storage().name_scope("teacher_heads"):
        yield


def rpn_loss(
    model: GeneralizedRCNN, output: tuple[list[Tensor], list[Tensor]], recording: RCNNRecording
) -> Tensor:
    """Detectron2's objectness and anchor-delta losses of an RPN on the student's sampled anchors, per anchor that
    the STUDENT samples.

    Args:
        model: whose RPN it is, for its loss settings.
        output: as of :func:`by_anchor`.
    """
    rpn = model.proposal_generator
    logits, deltas = output
    with _statistics_apart():
        losses = rpn.losses(
            recording.anchors, logits, recording.anchor_labels, deltas, recording.anchor_boxes
        )
    return sum(losses.values()) * (rpn.batch_size_per_image / recording.anchors_per_image)


def by_anchor(logits: list[Tensor], deltas: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """An RPN head's maps, (B, A, H, W) and (B, 4A, H, W), in the order of its anchors, float32:
    (B, H * W * A) and (B, H * W * A, 4)."""
    logits = [at_least_float32(x.permute(0, 2, 3, 1).flatten(1)) for x in logits]
    deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas]
    return logits, [at_least_float32(x) for x in deltas]


def classes_of(proposals: Sequence[Instances]) -> Tensor:
    """``gt_classes`` of proposals, (R,), all images one after the other."""
    return torch.cat([own.gt_classes for own in proposals])


def boxes_and_truth(proposals: list[Instances]) -> tuple[Tensor, Tensor]:
    """Boxes of proposals and the ground-truth box of each, (R, 4) each; its own where there is none."""
    boxes = torch.cat([own.proposal_boxes.tensor for own in proposals])
    truth = [(own.gt_boxes if own.has("gt_boxes") else own.proposal_boxes) for own in proposals]
    return boxes, torch.cat([own.tensor for own in truth])


def deltas_of_class(deltas: Tensor, classes: Tensor, size: int) -> Tensor:
    """The deltas of each row's class, (K, R, size), out of (K, R, size * classes), or (K, R, size) for all
    classes alike."""
    deltas = deltas.unflatten(2, (-1, size))
    slot = classes if deltas.shape[2] > 1 else torch.zeros_like(classes)
    return deltas[:, torch.arange(len(classes), device=classes.device), slot]
