"""Faster and Mask R-CNN: ``GeneralizedRCNN`` with an RPN and one box head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from era.errors import UserError
from era.losses import at_least_float32
from era.modeling.detectors.base import Detector, Predictions, Recording, TaskLoss
from era.modeling.detectors.box_losses import box_losses
from era.modeling.detectors.families import DETECTOR_FAMILIES
from era.modeling.detectors.proposals import ProposalSample, sample_proposals
from era.modeling.detectors.rcnn_inference import BlendedRCNN, rcnn_with_heads


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
    """

    anchors: list[Boxes] = field(default_factory=list)
    anchor_labels: list[Tensor] = field(default_factory=list)
    anchor_boxes: list[Tensor] = field(default_factory=list)
    anchors_per_image: int = 0
    rpn_output: tuple[list[Tensor], list[Tensor]] = ((), ())
    proposals: list[Instances] = field(default_factory=list)
    num_classes: int = 0
    roi_features: Tensor = None
    _samples: dict[int, ProposalSample] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> list[Instances]:
        """The sampled proposals."""
        return self.proposals

    def sample(self, per_image: int) -> ProposalSample:
        """A part of the proposals that stands for all (0 = all); taken once a step, whoever asks."""
        if per_image not in self._samples:
            self._samples[per_image] = sample_proposals(self.proposals, self.num_classes, per_image)
        return self._samples[per_image]


@DETECTOR_FAMILIES.register()
class RCNN(Detector):
    """``GeneralizedRCNN`` with an FPN, an RPN and ``StandardROIHeads``; masks and keypoints may be there."""

    meta_architecture = "GeneralizedRCNN"
    heads = ("proposal_generator", "roi_heads")
    parts = ("rpn", "roi")

    @classmethod
    def describes(cls, cfg: CfgNode) -> bool:
        """By the meta-architecture: ``GeneralizedRCNN`` or one derived from it."""
        name = cfg.MODEL.META_ARCHITECTURE
        known = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
        return isinstance(known, type) and issubclass(known, GeneralizedRCNN)

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """A ``GeneralizedRCNN``."""
        return isinstance(model, GeneralizedRCNN)

    @classmethod
    def num_classes_key(cls) -> str:
        """``MODEL.ROI_HEADS.NUM_CLASSES``."""
        return "MODEL.ROI_HEADS.NUM_CLASSES"

    @classmethod
    def num_classes_in(cls, cfg: CfgNode) -> int:
        """``MODEL.ROI_HEADS.NUM_CLASSES``."""
        return cfg.MODEL.ROI_HEADS.NUM_CLASSES

    def check_student(self) -> None:
        """See :meth:`Detector.check_student`."""
        model, found = self.model, None
        if not self._has_plain_heads():
            found = f"{self._describe_heads()} as heads"
        elif model.roi_heads.train_on_pred_boxes:
            found = "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES True, which moves the proposals"
        if found:
            raise UserError(
                f"the student has {found}: expected a GeneralizedRCNN with an RPN and StandardROIHeads "
                "trained on the RPN's proposals; change MODEL.DISTILLER.STUDENT_META_ARCHITECTURE, "
                "MODEL.PROPOSAL_GENERATOR or MODEL.ROI_HEADS."
            )

    def _has_plain_heads(self) -> bool:
        roi_heads = self.model.roi_heads
        return (
            isinstance(self.model.proposal_generator, RPN)
            and isinstance(roi_heads, StandardROIHeads)
            and isinstance(roi_heads.box_predictor, FastRCNNOutputLayers)
        )

    def _describe_heads(self) -> str:
        parts = (self.model.proposal_generator, self.model.roi_heads)
        return " and ".join(type(part).__name__ for part in parts)

    @property
    def num_classes(self) -> int:
        """Foreground classes of the ROI heads."""
        return self.model.roi_heads.num_classes

    @property
    def head_levels(self) -> set[str]:
        """Of the RPN and of the box head."""
        model = self.model
        return {*model.proposal_generator.in_features, *model.roi_heads.box_in_features}

    @property
    def mask_on(self) -> bool:
        """Whether there is a mask head."""
        return self.model.roi_heads.mask_on

    @property
    def keypoint_on(self) -> bool:
        """Whether there is a keypoint head."""
        return self.model.roi_heads.keypoint_on

    @contextmanager
    def record(self) -> Iterator[RCNNRecording]:
        """Forward hooks and one wrapped method (the RPN's public ``label_and_sample_anchors``) are put on at
        entry and taken off at exit."""
        rpn, roi_heads = self.model.proposal_generator, self.model.roi_heads
        recording = RCNNRecording(
            anchors_per_image=rpn.batch_size_per_image, num_classes=self.num_classes
        )

        def on_rpn_input(_module, args):
            recording.images, recording.features, recording.targets = args

        def on_anchors(_module, _args, output):
            recording.anchors = output

        def on_rpn_head(_module, _args, output):
            recording.rpn_output = output

        def on_roi_heads(_module, _args, output):
            recording.proposals = output[0]

        def on_pooler(_module, _args, output):
            recording.roi_features = output

        def on_predictor(_module, _args, output):
            recording.predictions = Predictions(*output)

        label_and_sample = rpn.label_and_sample_anchors

        def label_and_keep(anchors, gt_instances):
            labels, boxes = label_and_sample(anchors, gt_instances)
            recording.anchor_labels, recording.anchor_boxes = labels, boxes
            return labels, boxes

        handles = [
            rpn.register_forward_pre_hook(on_rpn_input),
            rpn.anchor_generator.register_forward_hook(on_anchors),
            rpn.rpn_head.register_forward_hook(on_rpn_head),
            roi_heads.register_forward_hook(on_roi_heads),
            roi_heads.box_pooler.register_forward_hook(on_pooler),
            roi_heads.box_predictor.register_forward_hook(on_predictor),
        ]
        rpn.label_and_sample_anchors = label_and_keep
        try:
            yield recording
        finally:
            del rpn.label_and_sample_anchors
            for handle in handles:
                handle.remove()

    def predict(self, features: dict[str, Tensor], samples: list[Instances]) -> Predictions:
        """Class logits (R, K + 1) and box deltas (R, 4K or 4) of the box head on given proposals."""
        heads = self.model.roi_heads
        maps = [features[level] for level in heads.box_in_features]
        pooled = heads.box_pooler(maps, [own.proposal_boxes for own in samples])
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return Predictions(at_least_float32(logits), at_least_float32(deltas))

    def predict_anchors(self, features: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness logits (B, H * W * A) and anchor deltas (B, H * W * A, 4) of the RPN's head, one each a
        level, in the order of the anchors, float32."""
        rpn = self.model.proposal_generator
        return by_anchor(*rpn.rpn_head([features[level] for level in rpn.in_features]))

    def task_losses(self, recording: RCNNRecording) -> dict[str, TaskLoss]:
        """``loss_rpn_cls`` and ``loss_rpn_loc`` over sampled anchors, ``loss_cls`` and ``loss_box_reg`` over sampled
        proposals. Masks, keypoints and federated class losses cannot be weighted by sample."""
        return {**self._rpn_losses(recording), **self._roi_losses(recording)}

    def _rpn_losses(self, recording: RCNNRecording) -> dict[str, TaskLoss]:
        rpn = self.model.proposal_generator
        logits, deltas = (torch.cat(x, dim=1) for x in by_anchor(*recording.rpn_output))
        labels = torch.stack(recording.anchor_labels)
        boxes = torch.cat([anchors.tensor for anchors in recording.anchors]).repeat(len(labels), 1)
        normaliser = float(recording.anchors_per_image * len(labels))
        rows = (labels.flatten() >= 0).nonzero(as_tuple=True)[0]
        objects = (labels.flatten() == 1).nonzero(as_tuple=True)[0]
        truth = labels.flatten()[rows].to(logits.dtype)
        objectness = F.binary_cross_entropy_with_logits(
            logits.flatten()[rows], truth, reduction="none"
        )
        matched = torch.cat(recording.anchor_boxes)[objects]
        location = box_losses(rpn, boxes[objects], matched, deltas.flatten(0, 1)[None, objects])[0]
        scale = rpn.loss_weight
        return {
            "loss_rpn_cls": TaskLoss(scale.get("loss_rpn_cls", 1.0) * objectness, normaliser, rows),
            "loss_rpn_loc": TaskLoss(scale.get("loss_rpn_loc", 1.0) * location, normaliser, objects),
        }  # fmt: skip

    def _roi_losses(self, recording: RCNNRecording) -> dict[str, TaskLoss]:
        predictor = self.model.roi_heads.box_predictor
        logits, deltas = (at_least_float32(x) for x in recording.predictions)
        classes = torch.cat([own.gt_classes for own in recording.proposals])
        rows, normaliser = torch.arange(len(classes), device=classes.device), max(len(classes), 1)
        scale, losses = predictor.loss_weight, {}
        if not predictor.use_fed_loss:
            if predictor.use_sigmoid_ce:
                truth = F.one_hot(classes, self.num_classes + 1)[:, :-1].to(logits.dtype)
                values = F.binary_cross_entropy_with_logits(
                    logits[:, :-1], truth, reduction="none"
                ).sum(1)
            else:
                values = F.cross_entropy(logits, classes, reduction="none")
            values = scale.get("loss_cls", 1.0) * values
            losses["loss_cls"] = TaskLoss(values, normaliser, rows)
        objects = (classes < self.num_classes).nonzero(as_tuple=True)[0]
        boxes, matched = boxes_and_truth(recording.proposals)
        location = box_losses(
            predictor,
            boxes[objects],
            matched[objects],
            deltas_of_class(deltas[None, objects], classes[objects], boxes.shape[1]),
        )[0]
        location = scale.get("loss_box_reg", 1.0) * location
        losses["loss_box_reg"] = TaskLoss(location, normaliser, objects)
        return losses

    def check_judge(self, student: Detector, reason: str) -> None:
        """Plain heads, and the same anchors."""
        if not isinstance(student, RCNN) or not self._has_plain_heads():
            raise UserError(
                f"the teacher has {self._describe_heads()}, the student is a {type(student).__name__}: "
                f"{reason} needs an RPN and StandardROIHeads in both; name another teacher, or switch that off."
            )
        own, other = (m.proposal_generator.anchor_generator for m in (student.model, self.model))
        if own.strides != other.strides or not _equal_anchors(own.cell_anchors, other.cell_anchors):
            raise UserError(
                "the teacher's anchors differ from the student's (MODEL.ANCHOR_GENERATOR, MODEL.RPN."
                f"IN_FEATURES or strides): {reason} needs equal anchors; make the student's config equal, or "
                "switch that off."
            )

    def head_loss(
        self,
        part: str,
        features: dict[str, Tensor],
        recording: RCNNRecording,
        *,
        samples_per_image: int = 0,
    ) -> Tensor:
        """``rpn``: Detectron2's objectness and anchor-delta losses on the student's sampled anchors, per
        anchor that the STUDENT samples. ``roi``: class and box losses on its sampled proposals."""
        if part == "rpn":
            rpn = self.model.proposal_generator
            logits, deltas = self.predict_anchors(features)
            with _statistics_apart():
                losses = rpn.losses(
                    recording.anchors, logits, recording.anchor_labels, deltas, recording.anchor_boxes
                )  # fmt: skip
            return sum(losses.values()) * (rpn.batch_size_per_image / recording.anchors_per_image)
        sample = recording.sample(samples_per_image)
        predictions = self.predict(features, sample.proposals)
        if not sample.strata:  # no proposal at all
            return sum(x.sum() * 0 for x in predictions)
        total = 0.0
        for stratum in sample.strata:
            own = tuple(x[stratum.indices] for x in predictions)
            with _statistics_apart():
                losses = self.model.roi_heads.box_predictor.losses(own, stratum.proposals)
            total = total + stratum.share * sum(losses.values())
        return total

    def coder_settings(self) -> dict[str, tuple]:
        """Box coders of the RPN and of the box head."""
        rpn, predictor = self.model.proposal_generator, self.model.roi_heads.box_predictor
        return {
            "MODEL.RPN.BBOX_REG_WEIGHTS": tuple(rpn.box2box_transform.weights),
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": tuple(predictor.box2box_transform.weights),
        }

    def detect(self, batched_inputs: list[dict], do_postprocess: bool = True) -> list:
        """``GeneralizedRCNN.inference``."""
        return self.model.inference(batched_inputs, do_postprocess=do_postprocess)

    @property
    def thresholds(self) -> dict[str, float | int]:
        """Test settings of the box head."""
        predictor = self.model.roi_heads.box_predictor
        return {
            "score_threshold": predictor.test_score_thresh,
            "nms_threshold": predictor.test_nms_thresh,
            "max_detections": predictor.test_topk_per_image,
        }

    def set_score_threshold(self, value: float) -> None:
        """``MODEL.ROI_HEADS.SCORE_THRESH_TEST``."""
        self.model.roi_heads.box_predictor.test_score_thresh = value

    def blended(
        self, teacher: RCNN, estimate: Callable[[dict], dict], alpha: float
    ) -> Callable[..., list]:
        """RPN outputs are blended before proposals are chosen, ROI outputs before detections are."""
        return BlendedRCNN(self, teacher, estimate, alpha)

    def with_heads_of(self, teacher: RCNN, backbone: Backbone) -> GeneralizedRCNN:
        """See :meth:`Detector.with_heads_of`."""
        if self.mask_on or self.keypoint_on:
            raise UserError(
                "the student has a mask or keypoint head, and a model with the teacher's heads gives boxes "
                "alone: set MODEL.MASK_ON and MODEL.KEYPOINT_ON False with weights that have no such heads."
            )
        return rcnn_with_heads(self.model, teacher.model, backbone)


def by_anchor(logits: list[Tensor], deltas: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """An RPN head's maps, (B, A, H, W) and (B, 4A, H, W), in the order of its anchors, float32:
    (B, H * W * A) and (B, H * W * A, 4)."""
    logits = [at_least_float32(x.permute(0, 2, 3, 1).flatten(1)) for x in logits]
    deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas]
    return logits, [at_least_float32(x) for x in deltas]


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


def _equal_anchors(own, other) -> bool:
    return len(own) == len(other) and all(
        a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
        for a, b in zip(own, other, strict=True)
    )


@contextmanager
def _statistics_apart():
    """Keep the statistics that Detectron2's loss functions log apart from the student's own."""
    with get_event_storage().name_scope("teacher_heads"):
        yield
