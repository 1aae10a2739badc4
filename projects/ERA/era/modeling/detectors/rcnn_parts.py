"""An R-CNN's RPN and ROI head as parts: where CrossKD cuts them and its losses of each, what they say of classes.

CrossKD (arXiv 2306.11369, ``jbwang1997/CrossKD``) is for dense heads, and an RPN's is one. For the ROI head the
repository has a two-stage form, ``crosskd_faster_rcnn.py``, whose losses are taken where the dense form has no answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from fvcore.nn import giou_loss
from torch import Tensor

from era.losses import at_least_float32, kd_loss, quality_bce
from era.modeling.detectors.parts import HeadPart
from era.modeling.detectors.rcnn_losses import RCNNRecording, by_anchor, deltas_of_class
from era.modeling.detectors.rcnn_soft import predict_anchors_at
from era.modeling.detectors.recording import ALL_POSITIONS, Predictions

if TYPE_CHECKING:
    from era.modeling.detectors.rcnn import RCNN


def weighted_giou(boxes: Tensor, targets: Tensor, weights: Tensor, normaliser: Tensor) -> Tensor:
    """``sum w GIoU_loss(boxes, targets) / normaliser`` of boxes (R, 4) each as x1, y1, x2, y2 and weights (R,)."""
    return (weights * giou_loss(boxes, targets, reduction="none")).sum() / normaliser


def cross_anchor_losses(
    logits: Tensor, boxes: Tensor, target_logits: Tensor, target_boxes: Tensor
) -> dict[str, Tensor]:
    """CrossKD's losses of a dense head of one class, at the same anchors.

    With ``p_T`` and ``p`` the objectness probabilities, ``b_T`` and ``b`` the decoded boxes of the target and of the
    judged predictions::

        class = sum_a |p_T - p| BCE(p, p_T) / n,   box = sum_a p_T (1 - GIoU(b, b_T)) / n,   n = max(sum_a p_T, 1)

    As CrossKD's code for RetinaNet: gradients also flow through ``|p_T - p|``, and a box counts by the teacher's score.
    Differs in ``n``, which there is the number of anchors matched to ground truth: ``sum p_T`` needs no label and is the
    teacher's count of the same; and in that no anchor is left out, where CrossKD's leaves out those in the padding
    and those that are neither object nor background.

    Args:
        logits, target_logits: (A,); boxes, target_boxes: (A, 4) as x1, y1, x2, y2. Targets are constants.

    Returns:
        Scalars ``class`` and ``box``; 0, connected to the graph, for no anchor.
    """
    scores = at_least_float32(target_logits).sigmoid()
    normaliser = scores.sum().clamp(min=1)
    return {
        "class": quality_bce(logits, target_logits).sum() / normaliser,
        "box": weighted_giou(boxes, target_boxes, scores, normaliser),
    }


def cross_proposal_losses(
    predictor: FastRCNNOutputLayers,
    predictions: Predictions,
    targets: Predictions,
    proposals: Tensor,
    temperature: float,
) -> dict[str, Tensor]:
    """CrossKD's losses of a ROI head; inspired by its dense form, with what the repository's two-stage form does where
    that has no answer.

    With ``p_T``, ``p`` the class distributions, ``c`` the foreground class that the teacher holds most likely in a
    proposal, and ``b_T(c)``, ``b(c)`` the decoded boxes of that class::

        class = tau^2 mean_r KL(p_T^tau || p^tau),   box = sum_r p_T(c) (1 - GIoU(b(c), b_T(c))) / max(sum_r p_T(c), 1)

    ``|p_T - p| BCE`` is made for independent sigmoids of thousands of anchors of which nearly all are background: its
    factor keeps them from drowning the rest. Classes of a softmax are not independent, and sampled proposals are
    balanced already, so the class loss is the two-stage form's KL (there with tau 3 and weight 0.5). A head of
    sigmoids gets the dense form: ``sum |p_T - p| BCE`` over proposals and foreground classes, over the sum of weights.
    Class ``c`` alone, its weight and its divisor are the two-stage form's too; GIoU is the dense form's, where the
    two-stage one has L1 of deltas. That the divisor is at least 1 is this project's choice.

    Args:
        predictor: the head's last layers, for the meaning of its outputs.
        predictions, targets: (R, C + 1) and (R, 4C or 4), targets constants.
        proposals: (R, 4).
        temperature: ``tau`` > 0.

    Returns:
        Scalars ``class`` and ``box``; 0, connected to the graph, for no proposal.
    """
    logits, goal = predictions.class_logits, at_least_float32(targets.class_logits)
    is_sigmoid = predictor.use_sigmoid_ce
    probability = (goal.sigmoid() if is_sigmoid else goal.softmax(1))[:, :-1]
    scores, classes = probability.max(1)
    normaliser = scores.sum().clamp(min=1)
    if is_sigmoid:
        class_loss = quality_bce(logits[:, :-1], goal[:, :-1]).sum() / normaliser
    else:
        class_loss = kd_loss(logits, goal, temperature)
    coder = predictor.box2box_transform
    boxes, target_boxes = (
        coder.apply_deltas(deltas_of_class(own.box_deltas[None], classes, 4)[0], proposals)
        for own in (predictions, targets)
    )
    return {
        "class": class_loss,
        "box": weighted_giou(boxes, target_boxes, scores, normaliser),
    }


def mirrored_level(
    value: Tensor, size: tuple[int, int], offset: float, stride: int, width: int
) -> Tensor:
    """What a dense head says of mirrored pictures, put where it belongs in the pictures themselves.

    An anchor's centre is ``(j + offset) * stride``, with Detectron2's offset 0 the left edge of a cell, so position j is
    mirrored to ``width / stride - j``, not to that less 1; with offset 0.5 the other way round. Between the two the nearer
    one is taken.

    Args:
        value: of one level, (B, C, H, W).
        size: height and width of the student's level.
        offset, stride: of the anchors.
        width: of :meth:`~era.modeling.teacher.Teacher.mirrored_maps`.
    """
    height, columns = size
    first = max(0, 1 - round(2 * offset))
    return value[..., :height, first : first + width // stride].flip(-1)[..., :columns]


class RPNPart(HeadPart):
    """The RPN. Its hidden tensors are its input, the FPN maps: its head is one shared conv and a 1x1 conv an output, so
    a later cut would leave nothing to share. CrossKD's code does the same where its cut is set to 0."""

    dense = True
    class_loss = "loss_rpn_cls"
    exclusive = True  # an object, or none

    def __init__(self, detector: RCNN):
        self.detector = detector
        self.names = tuple(detector.model.proposal_generator.in_features)
        self.channels = detector.feature_shapes[self.names[0]].channels

    def own_hidden(self, recording: RCNNRecording) -> dict[str, Tensor]:
        """The student's FPN maps."""
        return {level: recording.features[level] for level in self.names}

    def hidden(self, features: dict[str, Tensor], recording: RCNNRecording) -> dict[str, Tensor]:
        """The given maps at the RPN's levels."""
        return {level: features[level] for level in self.names}

    def predict_hidden(self, hidden: dict[str, Tensor]) -> Predictions:
        """Of the RPN's head, at all anchors, images one after the other."""
        return predict_anchors_at(self.detector, hidden, None, ALL_POSITIONS)

    def cross_losses(
        self,
        predictions: Predictions,
        targets: Predictions,
        recording: RCNNRecording,
        temperature: float,
    ) -> dict[str, Tensor]:
        """:func:`cross_anchor_losses`; objectness has no temperature."""
        images = len(recording.images)
        anchors = torch.cat([own.tensor for own in recording.anchors]).repeat(images, 1)
        coder = self.detector.model.proposal_generator.box2box_transform
        (logits, boxes), (target_logits, target_boxes) = (
            (own.class_logits, coder.apply_deltas(own.box_deltas, anchors))
            for own in (predictions, targets)
        )
        return cross_anchor_losses(logits, boxes, target_logits, target_boxes)

    def own_logits(self, recording: RCNNRecording) -> Tensor:
        """Objectness of the sampled anchors, (n,)."""
        logits, _ = by_anchor(recording.rpn_output[0], [])
        return torch.cat(logits, dim=1).flatten()[recording.sampled_anchors]

    def truth(self, recording: RCNNRecording) -> Tensor:
        """Whether a sampled anchor is an object."""
        return torch.stack(recording.anchor_labels).flatten()[recording.sampled_anchors].long()

    @torch.no_grad()
    def mirrored_logits(
        self, features: dict[str, Tensor], recording: RCNNRecording, width: int
    ) -> Tensor:
        """At the mirror image of every sampled anchor."""
        rpn = self.detector.model.proposal_generator
        generator = rpn.anchor_generator
        logits, _ = rpn.rpn_head([features[level] for level in self.names])
        found = [
            mirrored_level(value, own.shape[-2:], generator.offset, stride, width)
            for own, value, stride in zip(
                recording.rpn_output[0], logits, generator.strides, strict=True
            )
        ]
        logits, _ = by_anchor(found, [])
        return torch.cat(logits, dim=1).flatten()[recording.sampled_anchors]


class ROIPart(HeadPart):
    """The box head, cut after its first fully connected layer, before the ReLU; it can be cut if it is Detectron2's and
    has such a layer."""

    dense = False
    names = ("fc1",)
    class_loss = "loss_cls"

    def __init__(self, detector: RCNN):
        self.detector = detector
        head = detector.box_head
        self.exclusive = not detector.box_predictor.use_sigmoid_ce
        can_be_cut = isinstance(head, FastRCNNConvFCHead) and head.fcs
        self.channels = head.fc1.out_features if can_be_cut else None

    def own_hidden(self, recording: RCNNRecording) -> dict[str, Tensor]:
        """(R, C) of the student's sampled proposals."""
        return {"fc1": recording.hidden}

    def hidden(self, features: dict[str, Tensor], recording: RCNNRecording) -> dict[str, Tensor]:
        """(R, C) of the student's sampled proposals, pooled from the given maps."""
        value = self.detector.box_features(features, recording.proposals)
        for name, layer in self.detector.box_head.named_children():
            value = layer(value)
            if name == "fc1":
                break
        return {"fc1": value}

    def predict_hidden(self, hidden: dict[str, Tensor]) -> Predictions:
        """Of the layers after ``fc1`` and of the box predictor."""
        (value,) = hidden.values()
        layers = list(self.detector.box_head.named_children())
        for _, layer in layers[[name for name, _ in layers].index("fc1") + 1 :]:
            value = layer(value)
        return self.detector.predict_vectors(value)

    def cross_losses(
        self,
        predictions: Predictions,
        targets: Predictions,
        recording: RCNNRecording,
        temperature: float,
    ) -> dict[str, Tensor]:
        """:func:`cross_proposal_losses`."""
        proposals = torch.cat([own.proposal_boxes.tensor for own in recording.proposals])
        predictor = self.detector.box_predictor
        return cross_proposal_losses(predictor, predictions, targets, proposals, temperature)

    def own_logits(self, recording: RCNNRecording) -> Tensor:
        """Of the sampled proposals, (R, K + 1)."""
        return recording.predictions.class_logits

    def truth(self, recording: RCNNRecording) -> Tensor:
        """The class of a proposal, the last is background."""
        return recording.classes

    @torch.no_grad()
    def mirrored_logits(
        self, features: dict[str, Tensor], recording: RCNNRecording, width: int
    ) -> Tensor:
        """In the mirror image of every sampled proposal."""
        mirrored = []
        for own in recording.proposals:
            left, top, right, bottom = own.proposal_boxes.tensor.unbind(1)
            boxes = Boxes(torch.stack([width - right, top, width - left, bottom], dim=1))
            mirrored.append(Instances(own.image_size, proposal_boxes=boxes))
        return self.detector.predict(features, mirrored).class_logits


def parts_of(detector: RCNN) -> dict[str, HeadPart]:
    """``rpn`` and ``roi``; none if boxes are rotated."""
    if len(detector.model.proposal_generator.box2box_transform.weights) != 4:
        return {}
    return {"rpn": RPNPart(detector), "roi": ROIPart(detector)}
