"""Faster and Mask R-CNN: ``GeneralizedRCNN`` with an RPN and one box head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from era.errors import UserError
from era.losses import at_least_float32
from era.modeling.detectors.base import Detector
from era.modeling.detectors.families import DETECTOR_FAMILIES
from era.modeling.detectors.rcnn_batches import RCNNBatches
from era.modeling.detectors.rcnn_heads import BoxStage, RCNNFurtherHeads
from era.modeling.detectors.rcnn_inference import BlendedRCNN, rcnn_with_heads
from era.modeling.detectors.rcnn_losses import (
    RCNNRecording,
    by_anchor,
    roi_task_losses,
    rpn_loss,
    rpn_task_losses,
    sample_loss,
)
from era.modeling.detectors.rcnn_parts import HeadPart, parts_of
from era.modeling.detectors.rcnn_reading import RCNNReading
from era.modeling.detectors.rcnn_record import recorded
from era.modeling.detectors.rcnn_soft import (
    StageTargets,
    predict_anchors_at,
    soft_anchor_losses,
    soft_proposal_losses,
    soft_roi_loss,
)
from era.modeling.detectors.recording import ALL_POSITIONS, Predictions, TaskLoss
from era.registry import architecture_of


@DETECTOR_FAMILIES.register()
class RCNN(RCNNFurtherHeads, RCNNReading, RCNNBatches, Detector):
    """``GeneralizedRCNN`` with an FPN, an RPN and ``StandardROIHeads``; masks and keypoints may be there."""

    meta_architecture = "GeneralizedRCNN"
    heads = ("proposal_generator", "roi_heads")
    parts = ("rpn", "roi")
    soft_parts = ("rpn", "roi")

    @classmethod
    def describes(cls, cfg: CfgNode) -> bool:
        """By the meta-architecture: ``GeneralizedRCNN`` or one derived from it."""
        name = architecture_of(cfg)
        known = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
        return isinstance(known, type) and issubclass(known, GeneralizedRCNN)

    @classmethod
    def title(cls, cfg: CfgNode) -> str:
        """Faster R-CNN, or the heads beside that of boxes in its place."""
        heads = [name for name in ("Mask", "Keypoint") if cfg.MODEL[f"{name.upper()}_ON"]]
        return f"{' '.join(heads) or 'Faster'} R-CNN"

    @classmethod
    def lazy_keys(cls, target: object, node: Mapping) -> list | None:
        """Of a ``GeneralizedRCNN`` or one derived from it."""
        if not (isinstance(target, type) and issubclass(target, GeneralizedRCNN)):
            return None
        heads = node["roi_heads"]
        on = [(name, bool(heads.get(f"{name}_in_features"))) for name in ("mask", "keypoint")]
        keys = [(f"MODEL.{name.upper()}_ON", value) for name, value in on]
        keys.append((cls.num_classes_key(), heads["num_classes"]))
        return [part for pair in keys for part in pair]

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
        if not self.has_plain_heads():
            found = f"{self._describe_heads()} as heads"
        elif model.roi_heads.train_on_pred_boxes:
            found = "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES True, which moves the proposals"
        if found:
            raise UserError(
                f"the student has {found}: expected a GeneralizedRCNN with an RPN and StandardROIHeads (or CascadeROIHeads) "
                "trained on the RPN's proposals; change MODEL.DISTILLER.STUDENT_META_ARCHITECTURE, "
                "MODEL.PROPOSAL_GENERATOR or MODEL.ROI_HEADS."
            )

    def has_plain_heads(self) -> bool:
        """Whether RPN and ROI heads are those that can be watched and can judge."""
        return (
            isinstance(self.model.proposal_generator, RPN)
            and isinstance(self.model.roi_heads, StandardROIHeads)
            and all(isinstance(s.predictor, FastRCNNOutputLayers) for s in self.box_stages)
        )

    def _describe_heads(self) -> str:
        parts = (self.model.proposal_generator, self.model.roi_heads)
        return " and ".join(type(part).__name__ for part in parts)

    @property
    def box_stages(self) -> list[BoxStage]:
        """The box heads with their predictors, in the order in which they see a box: one."""
        heads = self.model.roi_heads
        return [BoxStage(heads.box_head, heads.box_predictor)]

    @property
    def box_head(self) -> nn.Module:
        """The box head that sees the sampled proposals."""
        return self.box_stages[0].head

    @property
    def box_predictor(self) -> FastRCNNOutputLayers:
        """Its predictor."""
        return self.box_stages[0].predictor

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

    def record(self) -> AbstractContextManager[RCNNRecording]:
        """See :func:`era.modeling.detectors.rcnn_record.recorded`."""
        return recorded(self)

    @contextmanager
    def boxes_alone(self) -> Iterator[None]:
        """``mask_on`` and ``keypoint_on`` of the ROI heads are off."""
        heads = self.model.roi_heads
        before = heads.mask_on, heads.keypoint_on
        heads.mask_on = heads.keypoint_on = False
        try:
            yield
        finally:
            heads.mask_on, heads.keypoint_on = before

    def predict(self, features: dict[str, Tensor], samples: list[Instances]) -> Predictions:
        """Class logits (R, K + 1) and box deltas (R, 4K or 4) of the box head on given proposals."""
        return self.predict_vectors(self.vectors(features, samples))

    @property
    def vector_channels(self) -> int | None:
        """Of the box head, if it ends in fully connected layers (``MODEL.ROI_BOX_HEAD.FC_DIM``)."""
        if not self.has_plain_heads():
            return None
        shape = self.box_head.output_shape
        return shape.channels if shape.height is None else None

    def vectors(self, features: dict[str, Tensor], samples: list[Instances]) -> Tensor:
        """What the box head makes of each proposal."""
        return self.box_head(self.box_features(features, samples))

    def predict_vectors(self, vectors: Tensor) -> Predictions:
        """Of the box predictor."""
        return Predictions(*map(at_least_float32, self.box_predictor(vectors)))

    def box_features(self, features: dict[str, Tensor], samples: list[Instances]) -> Tensor:
        """What the box pooler makes of each proposal, (R, C, P, P)."""
        heads = self.model.roi_heads
        maps = [features[level] for level in heads.box_in_features]
        return heads.box_pooler(maps, [own.proposal_boxes for own in samples])

    def predict_stage(
        self, stage: int, features: dict[str, Tensor], samples: list[Instances]
    ) -> Predictions:
        """As :meth:`predict`, of one of ``box_stages``."""
        head, predictor = self.box_stages[stage]
        output = predictor(head(self.box_features(features, samples)))
        return Predictions(*map(at_least_float32, output))

    def predict_anchors(self, features: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness logits (B, H * W * A) and anchor deltas (B, H * W * A, 4) of the RPN's head, one each a
        level, in the order of the anchors, float32."""
        rpn = self.model.proposal_generator
        return by_anchor(*rpn.rpn_head([features[level] for level in rpn.in_features]))

    def task_losses(self, recording: RCNNRecording) -> dict[str, TaskLoss]:
        """``loss_rpn_cls`` and ``loss_rpn_loc`` over sampled anchors, ``loss_cls`` and ``loss_box_reg`` over sampled
        proposals. Masks, keypoints and federated class losses cannot be weighted by sample."""
        of_proposals = roi_task_losses(
            self.box_predictor, recording.predictions, recording.proposals
        )
        return rpn_task_losses(self.model, recording) | of_proposals

    def _check_plain_heads(self, student: Detector, reason: str) -> None:
        if not isinstance(student, RCNN) or not self.has_plain_heads():
            raise UserError(
                f"the teacher has {self._describe_heads()}, the student is a {type(student).__name__}: "
                f"{reason} needs an RPN and StandardROIHeads (or CascadeROIHeads) in both; name another teacher, or switch that "
                "off."
            )

    def check_class_distributions(self, student: Detector, reason: str) -> None:
        """Plain heads, and ``MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE`` False; federated losses need it True."""
        self._check_plain_heads(student, reason)
        for who, detector in (("student", student), ("teacher", self)):
            if detector.box_predictor.use_sigmoid_ce:
                raise UserError(
                    f"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is True in the {who}: {reason} needs a softmax over classes and "
                    "background in both models; choose models trained with one (USE_SIGMOID_CE and USE_FED_LOSS "
                    "False), or switch that off."
                )

    def check_judge(self, student: Detector, reason: str) -> None:
        """Plain heads, and the same anchors."""
        self._check_plain_heads(student, reason)
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
            return rpn_loss(self.model, self.predict_anchors(features), recording)
        sample = recording.sample(samples_per_image)
        predictions = self.predict(features, sample.proposals)
        return sample_loss(self.box_predictor, predictions, sample, knows=self.judged_by)

    def prediction_loss(self, predictions: Predictions, recording: RCNNRecording) -> Tensor:
        """Class and box losses."""
        return sample_loss(
            self.box_predictor, predictions, recording.sample(0), knows=self.judged_by
        )

    def soft_prediction_loss(
        self, predictions: Predictions, targets: Predictions, temperature: float
    ) -> Tensor:
        """The mean of :func:`soft_proposal_losses`; 0, connected to the graph, of no proposal."""
        if len(predictions.class_logits) == 0:
            return sum(x.sum() * 0 for x in predictions)
        own = (x[None] for x in predictions)
        return soft_proposal_losses(self.box_predictor, *own, targets, temperature).mean()

    @torch.no_grad()
    def soft_targets(
        self,
        part: str,
        features: dict[str, Tensor],
        recording: RCNNRecording,
        *,
        positions: str = ALL_POSITIONS,
    ) -> Predictions:
        """``rpn``: objectness (A,) and deltas (A, 4) of the anchors. ``roi``: :meth:`predict` on all of the
        student's sampled proposals."""
        if part == "rpn":
            return predict_anchors_at(self, features, recording, positions)
        return self.predict(features, recording.samples)

    def soft_stages(self, targets: Predictions, recording: RCNNRecording) -> list[StageTargets]:
        """What each of ``box_stages`` is to say, and of which proposals, out of :meth:`soft_targets` of ``roi``."""
        return [StageTargets(recording.proposals, targets)]

    def soft_head_loss(
        self,
        part: str,
        features: dict[str, Tensor],
        targets: Predictions,
        recording: RCNNRecording,
        *,
        samples_per_image: int = 0,
        positions: str = ALL_POSITIONS,
        temperature: float = 1.0,
    ) -> Tensor:
        """``rpn``: :func:`soft_anchor_losses`. ``roi``: the mean of :func:`soft_proposal_losses`."""
        if part == "rpn":
            logits, deltas = predict_anchors_at(self, features, recording, positions)
            return soft_anchor_losses(logits[None], deltas[None], targets)[0]
        return soft_roi_loss(self, features, targets, recording, samples_per_image, temperature)

    @property
    def head_parts(self) -> dict[str, HeadPart]:
        """``rpn`` and ``roi``, see :func:`parts_of`."""
        return parts_of(self) if self.has_plain_heads() else {}

    @property
    def foreground_levels(self) -> set[str]:
        """Of the RPN."""
        rpn = self.model.proposal_generator
        return set(rpn.in_features) if isinstance(rpn, RPN) else set()

    @torch.no_grad()
    def foreground(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The RPN's highest objectness probability over the anchors of a position."""
        logits, _ = self.model.proposal_generator.rpn_head(list(features.values()))
        highest = [at_least_float32(x).sigmoid().amax(1, keepdim=True) for x in logits]
        return dict(zip(features, highest, strict=True))

    def coder_settings(self) -> dict[str, tuple]:
        """Box coders of the RPN and of the box head."""
        rpn, coder = self.model.proposal_generator, self.box_predictor.box2box_transform
        return {
            "MODEL.RPN.BBOX_REG_WEIGHTS": tuple(rpn.box2box_transform.weights),
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": tuple(coder.weights),
        }

    def detect(self, batched_inputs: list[dict], do_postprocess: bool = True) -> list:
        """``GeneralizedRCNN.inference``."""
        return self.model.inference(batched_inputs, do_postprocess=do_postprocess)

    def detect_on(self, features: dict[str, Tensor], images: ImageList) -> list[Instances]:
        """RPN, then ROI heads, as ``GeneralizedRCNN.inference`` after its backbone."""
        proposals, _ = self.model.proposal_generator(images, features, None)
        return self.model.roi_heads(images, features, proposals, None)[0]

    @property
    def thresholds(self) -> dict[str, float | int]:
        """Test settings of the box head that detects."""
        predictor = self.box_stages[-1].predictor
        return {
            "score_threshold": predictor.test_score_thresh,
            "nms_threshold": predictor.test_nms_thresh,
            "max_detections": predictor.test_topk_per_image,
        }

    def set_score_threshold(self, value: float) -> None:
        """``MODEL.ROI_HEADS.SCORE_THRESH_TEST``."""
        for stage in self.box_stages:
            stage.predictor.test_score_thresh = value

    def blended(
        self, teacher: RCNN, estimate: Callable[[dict, Tensor], dict], alpha: float
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
        return rcnn_with_heads(self, teacher, backbone)


def _equal_anchors(own, other) -> bool:
    return len(own) == len(other) and all(
        a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
        for a, b in zip(own, other, strict=True)
    )
