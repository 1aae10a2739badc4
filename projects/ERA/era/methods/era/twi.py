"""Teacher Weight Integration (TWI): the teacher's frozen RPN head and ROI box head judge the estimates.

ERA lets the teacher's classifier judge every estimate of the teacher's pooled feature. Here the estimate
is an FPN, so the judges are the detection heads, and the losses are Faster R-CNN's own against the
ground truth. Gradients pass through the heads into the estimate; the heads' weights never change.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from era.errors import UserError
from era.losses import at_least_float32
from era.methods.era.proposals import ChosenProposals, chosen_proposals
from era.modeling.detectors.rcnn import Recording


class TeacherHeads:
    """The teacher's heads on estimated features: the plain, readable reference.

    Not a module: it owns nothing, it uses the frozen teacher's own modules.

    Args:
        rpn: the teacher's proposal generator.
        roi_heads: the teacher's ROI heads.
        proposals_per_image: on how many of the student's sampled proposals ``e_1..e_N`` are judged by the
            ROI losses; 0 = all. ``e_0`` is judged on all of them.
    """

    def __init__(self, rpn: RPN, roi_heads: StandardROIHeads, proposals_per_image: int = 0):
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.proposals_per_image = proposals_per_image

    def rpn_loss(
        self, estimates: list[dict[str, Tensor]], weights: list[float], step: Recording
    ) -> Tensor:
        """Objectness and anchor-delta losses of the teacher's RPN head, summed over estimates.

        Args:
            estimates: ``e_0..e_N``, each level name to (B, C_T, H, W).
            weights: one an estimate.
            step: the student's step, for its anchors, their sampled labels and matched boxes.

        Returns:
            Scalar: Detectron2's ``loss_rpn_cls + loss_rpn_loc`` with the teacher's loss settings, per
            anchor that the STUDENT samples (the teacher's own sample size plays no part).
        """
        total = 0.0
        for weight, estimate in zip(weights, estimates, strict=True):
            logits, deltas = rpn_predictions(self.rpn, estimate)
            with _own_scope():
                losses = self.rpn.losses(
                    step.anchors, logits, step.anchor_labels, deltas, step.anchor_boxes
                )
            total = total + weight * sum(losses.values())
        return total * (self.rpn.batch_size_per_image / step.anchors_per_image)

    def roi_loss(
        self, estimates: list[dict[str, Tensor]], weights: list[float], step: Recording
    ) -> Tensor:
        """Class and box losses of the teacher's ROI box head, summed over estimates.

        Args:
            estimates, weights: as :meth:`rpn_loss`.
            step: the student's step, for its sampled proposals and their ground truth.

        Returns:
            Scalar: Detectron2's ``loss_cls + loss_box_reg`` with the teacher's loss settings; of ``e_0`` on
            all proposals, of the other estimates on ``proposals_per_image``, see
            :mod:`era.methods.era.proposals`.
        """
        total = 0.0
        for i, (weight, estimate) in enumerate(zip(weights, estimates, strict=True)):
            chosen = self.chosen(step) if i > 0 else self.all(step)
            boxes = [p.proposal_boxes for p in chosen.proposals]
            predictions = roi_predictions(self.roi_heads, estimate, boxes)
            if not chosen.strata:  # no proposal at all
                total = total + sum(x.sum() * 0 for x in predictions)
            for stratum in chosen.strata:
                own = tuple(x[stratum.indices] for x in predictions)
                with _own_scope():
                    losses = self.roi_heads.box_predictor.losses(own, stratum.proposals)
                total = total + weight * stratum.share * sum(losses.values())
        return total

    def all(self, step: Recording) -> ChosenProposals:
        """The proposals on which ``e_0`` is judged: all that the student sampled."""
        return chosen_proposals(step, self.roi_heads.num_classes, 0)

    def chosen(self, step: Recording) -> ChosenProposals:
        """The proposals on which ``e_1..e_N`` are judged."""
        return chosen_proposals(step, self.roi_heads.num_classes, self.proposals_per_image)


def rpn_predictions(rpn: RPN, features: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Run an RPN's head alone.

    Returns:
        Objectness logits (B, H * W * A) and anchor deltas (B, H * W * A, 4), one each a level, in the
        order of the RPN's anchors, float32.
    """
    logits, deltas = rpn.rpn_head([features[level] for level in rpn.in_features])
    logits = [at_least_float32(x.permute(0, 2, 3, 1).flatten(1)) for x in logits]
    deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas]
    deltas = [at_least_float32(x) for x in deltas]
    return logits, deltas


def roi_predictions(
    roi_heads: StandardROIHeads, features: dict[str, Tensor], boxes: list[Boxes]
) -> tuple[Tensor, Tensor]:
    """Run the box branch of ROI heads alone: class logits (R, K + 1), deltas (R, 4K or 4), float32."""
    pooled = roi_heads.box_pooler([features[level] for level in roi_heads.box_in_features], boxes)
    logits, deltas = roi_heads.box_predictor(roi_heads.box_head(pooled))
    return at_least_float32(logits), at_least_float32(deltas)


def check_teacher_heads(teacher: nn.Module, student: nn.Module, levels: list[str]) -> None:
    """TWI is possible: known head classes, the same anchors, every level estimated.

    Args:
        teacher, student: GeneralizedRCNN models.
        levels: ``MODEL.ERA.LEVELS``.

    Raises:
        UserError: says what differs.
    """
    if (
        not isinstance(teacher.proposal_generator, RPN)
        or not isinstance(teacher.roi_heads, StandardROIHeads)
        or not isinstance(teacher.roi_heads.box_predictor, FastRCNNOutputLayers)
    ):
        raise UserError(
            f"the teacher has {type(teacher.proposal_generator).__name__} and "
            f"{type(teacher.roi_heads).__name__}: TWI, INIT_STUDENT and alpha above 0 need an RPN and "
            "StandardROIHeads; name another teacher or set MODEL.ERA.TWI.RPN_WEIGHT and ROI_WEIGHT to 0."
        )
    needed = [*teacher.proposal_generator.in_features, *teacher.roi_heads.box_in_features]
    missing = sorted(set(needed) - set(levels))
    if missing:
        raise UserError(
            f"MODEL.ERA.LEVELS is {levels}: the teacher's heads also read {missing}, so TWI and alpha "
            "above 0 need them; add them."
        )
    own, other = (m.proposal_generator.anchor_generator for m in (student, teacher))
    if own.strides != other.strides or not _equal_anchors(own.cell_anchors, other.cell_anchors):
        raise UserError(
            "the teacher's anchors differ from the student's (MODEL.ANCHOR_GENERATOR, MODEL.RPN."
            "IN_FEATURES or strides): TWI and alpha above 0 need equal anchors; make the student's config "
            "equal, or set MODEL.ERA.TWI.RPN_WEIGHT to 0."
        )


def check_equal_heads(teacher: nn.Module, student: nn.Module, *, reason: str) -> None:
    """The RPN and ROI heads of both models have the same weights by name and shape and the same box
    coders.

    Args:
        reason: the config setting that needs it, for the message.

    Raises:
        UserError: names the first weight or setting that differs.
    """
    for part in ("proposal_generator", "roi_heads"):
        shapes = [
            {key: tuple(value.shape) for key, value in getattr(m, part).state_dict().items()}
            for m in (student, teacher)
        ]
        for key in sorted(set(shapes[0]) | set(shapes[1])):
            own, other = shapes[0].get(key), shapes[1].get(key)
            if own != other:
                raise UserError(
                    f"{reason} needs student and teacher heads of equal shape: {part}.{key} is "
                    f"{own or 'absent'} in the student and {other or 'absent'} in the teacher; make the "
                    "student's MODEL.RPN, MODEL.ROI_HEADS, MODEL.ROI_BOX_HEAD and MODEL.FPN.OUT_CHANNELS "
                    "equal to the teacher's."
                )
    for key, get in {
        "MODEL.RPN.BBOX_REG_WEIGHTS": lambda m: m.proposal_generator.box2box_transform.weights,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": lambda m: (
            m.roi_heads.box_predictor.box2box_transform.weights
        ),
    }.items():
        own, other = (tuple(get(m)) for m in (student, teacher))
        if own != other:
            raise UserError(
                f"{reason} needs equal box coders: {key} is {own} in the student and {other} in the "
                "teacher; make them equal."
            )


def _equal_anchors(own, other) -> bool:
    return len(own) == len(other) and all(
        a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
        for a, b in zip(own, other, strict=True)
    )


@contextmanager
def _own_scope():
    """Keep the statistics that Detectron2's loss functions log apart from the student's own."""
    with get_event_storage().name_scope("era/twi"):
        yield
