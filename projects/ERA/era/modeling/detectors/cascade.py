"""Cascade R-CNN: ``GeneralizedRCNN`` with an RPN and box heads in stages, each on the boxes that the one before gives.

Cai and Vasconcelos, arXiv 1712.00726, as Detectron2's ``CascadeROIHeads`` has it. Its further head, of masks, is that of
Mask R-CNN: it is trained on the sampled proposals and sees the last stage's boxes at inference.

The samples of a step are the proposals that the first stage sees; later stages see boxes of their own. So what is compared
sample by sample (class distributions, vectors, pooled features, the head's first layer) is the first stage's, and what judges
maps (:meth:`CascadeRCNN.head_loss`, :meth:`CascadeRCNN.soft_head_loss`) are all stages; :meth:`CascadeRCNN.first_stage` is
the same detector with the first stage as its only judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.registry import locate
from torch import Tensor, nn

from era.errors import UserError
from era.modeling.detectors.families import DETECTOR_FAMILIES
from era.modeling.detectors.rcnn import RCNN
from era.modeling.detectors.rcnn_heads import BoxStage
from era.modeling.detectors.rcnn_inference import proposals_from
from era.modeling.detectors.rcnn_losses import (
    RCNNRecording,
    roi_task_losses,
    rpn_task_losses,
    sample_loss,
)
from era.modeling.detectors.rcnn_parts import HeadPart
from era.modeling.detectors.rcnn_record import recorded
from era.modeling.detectors.rcnn_soft import StageTargets
from era.modeling.detectors.recording import ALL_POSITIONS, Predictions, TaskLoss


@dataclass
class CascadeRecording(RCNNRecording):
    """A training step of a Cascade R-CNN.

    Attributes:
        by_stage: of each stage what it said, with gradient, and of which proposals, one an image with ``gt_classes`` and
            ``gt_boxes``; the first stage's are ``predictions`` and ``proposals``.
    """

    by_stage: list[tuple[Predictions, list[Instances]]] = field(default_factory=list)


class FirstStage(RCNN):
    """A Cascade R-CNN's RPN and first box head, seen as a Faster R-CNN; it serves to judge and to inherit from."""

    @property
    def family(self) -> type[RCNN]:
        """That of one box head."""
        return RCNN

    @property
    def box_stages(self) -> list[BoxStage]:
        """The first stage alone."""
        heads = self.model.roi_heads
        return [BoxStage(heads.box_head[0], heads.box_predictor[0])]

    def inheritable(self, *, fpn: bool) -> dict[str, Tensor]:
        """By the names that a Faster R-CNN has for them."""
        found = {}
        for key, value in super().inheritable(fpn=fpn).items():
            of_stage = re.fullmatch(r"(roi_heads\.box_(?:head|predictor)\.)(\d+)\.(.+)", key)
            if of_stage is None:
                found[key] = value
            elif of_stage[2] == "0":
                found[of_stage[1] + of_stage[3]] = value
        return found


@DETECTOR_FAMILIES.register()
class CascadeRCNN(RCNN):
    """``GeneralizedRCNN`` with an FPN, an RPN and ``CascadeROIHeads``; masks and keypoints may be there."""

    @classmethod
    def describes(cls, cfg: CfgNode) -> bool:
        """By the ROI heads: ``CascadeROIHeads`` or ones derived from them."""
        name = cfg.MODEL.ROI_HEADS.NAME
        known = ROI_HEADS_REGISTRY.get(name) if name in ROI_HEADS_REGISTRY else None
        is_cascade = isinstance(known, type) and issubclass(known, CascadeROIHeads)
        return is_cascade and super().describes(cfg)

    @classmethod
    def title(cls, cfg: CfgNode) -> str:
        """Cascade R-CNN, with the heads beside those of boxes."""
        return f"Cascade {super().title(cfg).removeprefix('Faster ')}"

    @classmethod
    def lazy_keys(cls, target: object, node: Mapping) -> list | None:
        """As of an R-CNN, and the ROI heads."""
        found = super().lazy_keys(target, node)
        if found is None:
            return None
        heads = node["roi_heads"]["_target_"]
        heads = locate(heads) if isinstance(heads, str) else heads
        is_cascade = isinstance(heads, type) and issubclass(heads, CascadeROIHeads)
        return [*found, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"] if is_cascade else None

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """A ``GeneralizedRCNN`` with ``CascadeROIHeads``."""
        return super().holds(model) and isinstance(model.roi_heads, CascadeROIHeads)

    @classmethod
    def check_config(cls, cfg: CfgNode, *, what: str = "") -> None:
        """Deltas for all classes alike, and as many thresholds as coders, the first of them the sampler's; Detectron2 asserts
        it without a word."""
        keys, reason = (
            cfg.MODEL.ROI_BOX_CASCADE_HEAD,
            f"and MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME}",
        )
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise UserError(
                f"{what}MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, {reason}: expected boxes of all classes alike, for "
                "one stage's are the next one's; set it True."
            )
        if len(keys.IOUS) != len(keys.BBOX_REG_WEIGHTS):
            raise UserError(
                f"{what}MODEL.ROI_BOX_CASCADE_HEAD.IOUS is {tuple(keys.IOUS)}, and BBOX_REG_WEIGHTS beside it has "
                f"{len(keys.BBOX_REG_WEIGHTS)} entries, {reason}: expected one of each a stage; make them equally many."
            )
        sampler = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS
        if list(keys.IOUS[:1]) != list(sampler[:1]):
            raise UserError(
                f"{what}MODEL.ROI_BOX_CASCADE_HEAD.IOUS is {tuple(keys.IOUS)} and MODEL.ROI_HEADS.IOU_THRESHOLDS "
                f"{list(sampler)}, {reason}: expected the same first value, by which the first stage's proposals are "
                "sampled; make them equal."
            )

    @property
    def box_stages(self) -> list[BoxStage]:
        """All stages."""
        heads = self.model.roi_heads
        pairs = zip(heads.box_head, heads.box_predictor, strict=True)
        return [BoxStage(*pair) for pair in pairs]

    def first_stage(self) -> FirstStage:
        """See the class."""
        return FirstStage(self.model)

    @contextmanager
    def record(self) -> Iterator[CascadeRecording]:
        """As of an R-CNN, and each predictor's public ``losses`` wrapped."""
        predictors = [stage.predictor for stage in self.box_stages]
        with recorded(self, CascadeRecording) as recording:

            def watched(losses):
                def keep(predictions, proposals):
                    recording.by_stage.append((Predictions(*predictions), proposals))
                    return losses(predictions, proposals)

                return keep

            for predictor in predictors:
                predictor.losses = watched(predictor.losses)
            try:
                yield recording
            finally:
                for predictor in predictors:
                    del predictor.losses

    def box_features(self, features: dict[str, Tensor], samples: list[Instances]) -> Tensor:
        """As of an R-CNN; in training with the gradient divided by the number of stages, as Detectron2's."""
        pooled = super().box_features(features, samples)
        if self.model.training and pooled.requires_grad:
            scale = 1.0 / len(self.box_stages)
            pooled = pooled.view_as(pooled)  # a tensor of its own: the hook is its alone
            pooled.register_hook(lambda gradient: gradient * scale)
        return pooled

    def task_losses(self, recording: CascadeRecording) -> dict[str, TaskLoss]:
        """As of an R-CNN, and ``loss_cls_stage<k>`` and ``loss_box_reg_stage<k>`` of each stage k, from 0 on, whose rows are
        those of the stage's own proposals."""
        found = rpn_task_losses(self.model, recording)
        for k, (stage, said) in enumerate(zip(self.box_stages, recording.by_stage, strict=True)):
            own = roi_task_losses(stage.predictor, *said)
            found |= {f"{name}_stage{k}": loss for name, loss in own.items()}
        return found

    def head_loss(
        self,
        part: str,
        features: dict[str, Tensor],
        recording: RCNNRecording,
        *,
        samples_per_image: int = 0,
    ) -> Tensor:
        """``rpn``: as of an R-CNN. ``roi``: the mean over the stages of their class and box losses, each on the boxes that
        it would see on these maps.

        That is a K-th of the sum that Detectron2 trains a cascade of K stages with, and its gradient into the maps is
        the same, since Detectron2 divides that by K. The first stage sees the student's sampled proposals with the
        student's labels; the boxes of a later one are matched as this detector's config says
        (``MODEL.ROI_BOX_CASCADE_HEAD.IOUS``). ``samples_per_image`` is of proposals, and their boxes go with them.
        """
        if part != "roi":
            return super().head_loss(part, features, recording)
        sample = recording.sample(samples_per_image)
        proposals, total = sample.proposals, 0.0
        for k, (_, predictor) in enumerate(self.box_stages):
            labelled = None
            if k > 0:
                matcher = self.model.roi_heads.proposal_matchers[k]
                labelled = label(proposals, recording.targets, matcher, self.num_classes)
            predictions = self.predict_stage(k, features, proposals)
            total = total + sample_loss(
                predictor, predictions, sample, labelled, knows=self.judged_by
            )
            proposals = proposals_from(predictor.predict_boxes(predictions, proposals), proposals)
        return total / len(self.box_stages)

    @torch.no_grad()
    def soft_targets(
        self,
        part: str,
        features: dict[str, Tensor],
        recording: RCNNRecording,
        *,
        positions: str = ALL_POSITIONS,
    ) -> Predictions:
        """``rpn``: as of an R-CNN. ``roi``: of K stages on R sampled proposals (K * R) rows, stage after stage, each stage's
        in the order of the proposals that its boxes came from."""
        if part != "roi":
            return super().soft_targets(part, features, recording, positions=positions)
        proposals, said = recording.samples, []
        for k, (_, predictor) in enumerate(self.box_stages):
            said.append(self.predict_stage(k, features, proposals))
            proposals = proposals_from(predictor.predict_boxes(said[-1], proposals), proposals)
        return Predictions(*map(torch.cat, zip(*said, strict=True)))

    def soft_stages(self, targets: Predictions, recording: RCNNRecording) -> list[StageTargets]:
        """Each stage on the boxes that it saw on the maps of the targets, whatever maps are judged: rows then tell of the
        same boxes, and the loss of these maps themselves is 0."""
        proposals, found = recording.samples, []
        rows = sum(map(len, proposals))
        for k, (_, predictor) in enumerate(self.box_stages):
            own = Predictions(*(x[k * rows : (k + 1) * rows] for x in targets))
            found.append(StageTargets(proposals, own))
            proposals = proposals_from(predictor.predict_boxes(own, proposals), proposals)
        return found

    @property
    def head_parts(self) -> dict[str, HeadPart]:
        """``rpn``, and as ``roi`` the first stage."""
        found = super().head_parts
        if "roi" in found:
            found["roi"].class_loss = "loss_cls_stage0"
        return found

    def coder_settings(self) -> dict[str, tuple]:
        """Box coders of the RPN and of each stage."""
        coders = [stage.predictor.box2box_transform.weights for stage in self.box_stages]
        return {
            "MODEL.RPN.BBOX_REG_WEIGHTS": super().coder_settings()["MODEL.RPN.BBOX_REG_WEIGHTS"],
            "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": tuple(map(tuple, coders)),
        }


def label(
    proposals: list[Instances], targets: list[Instances], matcher: Matcher, num_classes: int
) -> list[Instances]:
    """Proposals with the class and box of the object that each one matches, ``num_classes`` and any box where it is none.

    Args:
        proposals: one an image, with ``proposal_boxes``.
        targets: ground truth of the images, ``gt_boxes`` and ``gt_classes``.
        matcher: of a stage.
    """
    found = []
    for own, truth in zip(proposals, targets, strict=True):
        matched, is_object = matcher(pairwise_iou(truth.gt_boxes, own.proposal_boxes))
        classes, boxes = torch.full_like(matched, num_classes), own.proposal_boxes
        if len(truth) > 0:
            classes = torch.where(is_object == 1, truth.gt_classes[matched], classes)
            boxes = truth.gt_boxes[matched]
        fields = {"proposal_boxes": own.proposal_boxes, "gt_classes": classes, "gt_boxes": boxes}
        found.append(Instances(own.image_size, **fields))
    return found
