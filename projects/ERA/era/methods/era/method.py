"""ERA, Expandable Residual Approximation (arXiv 2508.16050), for a Faster R-CNN FPN detector.

The paper's public code is classification only; attaching it to FPN maps and to the RPN and ROI heads is
this project's adaptation, not a reproduction (README.md, "ERA for detection").
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import get_event_storage
from torch import Tensor

from era.errors import UserError
from era.losses import kd_loss, level_mean
from era.methods.base import METHOD_REGISTRY, Method
from era.methods.era.fast.heads import FastTeacherHeads
from era.methods.era.fast.residual import estimate_distances
from era.methods.era.inference import BlendedDetector
from era.methods.era.mbrnet import FactoredEstimates, FeatureEstimator, MBRNet
from era.methods.era.proposals import chosen_proposals
from era.methods.era.twi import check_equal_heads, check_teacher_heads
from era.modeling.step import DistillationStep
from era.modeling.teacher import Teacher

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations between statistics: the period of Detectron2's writers


@METHOD_REGISTRY.register()
class ERA(Method):
    """Feature, residual, TWI and KD losses on estimates of the teacher's FPN.

    Args:
        estimator: adapter and MBRNet.
        teacher: the frozen teacher; not registered as a submodule.
        heads: the teacher's heads as judges; None if TWI is off.
        scales: ``s_1..s_N``.
        feature_weight, residual_weight, kd_weight: ``w_f``, ``w_r``, ``w_k``; 0 leaves a term out.
        kd_temperature: ``tau``.
        rpn_weight, roi_weight: weights of the TWI losses; 0 leaves a term out.
        alpha: how far inference leans on the teacher's heads, 0 to 1.
        proposals_per_image: on how many of the student's sampled proposals an image ``e_1..e_N`` are
            judged by the ROI head, and how many the KD loss looks at; 0 = all.
        compile_estimator: run the estimator in training through ``torch.compile``.
    """

    @configurable
    def __init__(
        self,
        *,
        estimator: FeatureEstimator,
        teacher: Teacher,
        heads: FastTeacherHeads | None,
        scales: list[float],
        feature_weight: float,
        residual_weight: float,
        kd_weight: float,
        kd_temperature: float,
        rpn_weight: float,
        roi_weight: float,
        alpha: float,
        proposals_per_image: int = 0,
        compile_estimator: bool = False,
    ):
        super().__init__()
        self.estimator = estimator
        self._factored = estimator.factored
        if compile_estimator:
            self._factored = torch.compile(estimator.factored, dynamic=True)
        self.heads = heads
        self.scales = tuple(scales)
        self.feature_weight = feature_weight
        self.residual_weight = residual_weight
        self.kd_weight = kd_weight
        self.kd_temperature = kd_temperature
        self.rpn_weight = rpn_weight
        self.roi_weight = roi_weight
        self.alpha = alpha
        self.proposals_per_image = proposals_per_image
        # in a tuple: not a submodule, so never saved, trained or wrapped
        self._teacher = (teacher,)
        uses_heads = rpn_weight > 0 or roi_weight > 0
        if not uses_heads and residual_weight == 0:
            estimator.mbrnet.requires_grad_(False)
        if not uses_heads and feature_weight == 0:
            estimator.adapter.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: GeneralizedRCNN, teacher: Teacher) -> dict:
        """Read ``MODEL.ERA`` and check that student and teacher fit together.

        Raises:
            UserError: levels, strides, anchors or heads do not match.
        """
        era = cfg.MODEL.ERA
        levels = list(era.LEVELS)
        in_channels, out_channels = check_levels(student, teacher, levels)
        uses_heads = era.TWI.RPN_WEIGHT > 0 or era.TWI.ROI_WEIGHT > 0
        if uses_heads or era.ALPHA > 0:
            check_teacher_heads(teacher.model, student, levels)
        heads = None
        if uses_heads:
            heads = FastTeacherHeads(
                teacher.model.proposal_generator,
                teacher.model.roi_heads,
                era.TWI.PROPOSALS_PER_IMAGE,
                student_pooler=student.roi_heads.box_pooler,
            )
            logger.info("TWI: %s", heads.describe())
        if 0 < era.ALPHA < 1:
            check_equal_heads(teacher.model, student, reason=f"MODEL.ERA.ALPHA {era.ALPHA}")
        mbrnet = MBRNet(
            in_channels=in_channels,
            out_channels=out_channels,
            num_branches=era.NUM_BRANCHES,
            num_blocks=era.NUM_BLOCKS,
            kernel_size=era.KERNEL_SIZE,
            hidden_channels=era.HIDDEN_CHANNELS,
            norm=era.NORM,
            norm_momentum=era.NORM_MOMENTUM,
            accumulated_inputs=era.ACCUMULATED_INPUTS,
            shared_up_projection=era.SHARED_UP_PROJECTION,
        )
        return {
            "estimator": FeatureEstimator(
                levels=levels, in_channels=in_channels, out_channels=out_channels, mbrnet=mbrnet
            ),
            "teacher": teacher,
            "heads": heads,
            "scales": era.SCALES,
            "feature_weight": era.FEATURE_WEIGHT,
            "residual_weight": era.RESIDUAL_WEIGHT,
            "kd_weight": era.KD_WEIGHT,
            "kd_temperature": era.KD_TEMPERATURE,
            "rpn_weight": era.TWI.RPN_WEIGHT,
            "roi_weight": era.TWI.ROI_WEIGHT,
            "alpha": era.ALPHA,
            "proposals_per_image": era.TWI.PROPOSALS_PER_IMAGE,
            "compile_estimator": era.COMPILE,
        }

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher."""
        return self._teacher[0]

    def losses(self, step: DistillationStep) -> dict[str, Tensor]:
        """The ERA losses, weighted, each present only if its weight is above 0:

        - ``loss_era_feature`` = w_f * MSE(e_0, sg F_T);
        - ``loss_era_residual`` = (w_r / N) * sum_i s_i * MSE(d_i, sg(F_T - e_{i-1}));
        - ``loss_era_twi_rpn``, ``loss_era_twi_roi``: the teacher's heads on e_0 (weight 1) and on every
          e_i (weight s_i / N), against the ground truth;
        - ``loss_era_kd`` = w_k * tau^2 * KL(teacher ROI classes || student ROI classes).

        Every 20 iterations ``era/<level>/residual_e<i>``, the mean over elements of ``(F_T - e_i)^2``,
        i = 0..N, goes into the event storage: it must fall with training.
        """
        losses = {}
        uses_heads = self.rpn_weight > 0 or self.roi_weight > 0
        if uses_heads or self.feature_weight > 0 or self.residual_weight > 0:
            estimates = self._factored(step.student.features)
            self._feature_losses(losses, step, estimates)
            if uses_heads:
                self._twi_losses(losses, step, estimates)
        if self.kd_weight > 0:
            losses["loss_era_kd"] = self.kd_weight * self._kd_loss(step)
        return losses

    def _feature_losses(
        self, losses: dict[str, Tensor], step: DistillationStep, estimates: FactoredEstimates
    ) -> None:
        levels = self.estimator.levels
        distances = torch.stack(
            [
                estimate_distances(
                    estimates.zeroth[level],
                    step.teacher_features[level],
                    estimates.factors.get(level),
                    estimates.projection,
                    estimates.num_branches,
                )
                for level in levels
            ]
        )  # (levels, N + 1), MSE(e_i, F_T), each with gradient into its newest part alone
        if self.feature_weight > 0:
            losses["loss_era_feature"] = self.feature_weight * level_mean(distances[:, 0])
        if self.residual_weight > 0 and self.scales:
            by_branch = [level_mean(values) for values in distances[:, 1:].unbind(1)]
            total = sum(s * value for s, value in zip(self.scales, by_branch, strict=True))
            losses["loss_era_residual"] = self.residual_weight / len(self.scales) * total

        storage = get_event_storage()
        if storage.iter % LOG_PERIOD not in (0, LOG_PERIOD - 1):
            return  # reading numbers makes a GPU wait
        names = [
            f"era/{level}/residual_e{i}" for level in levels for i in range(distances.shape[1])
        ]
        for name, value in zip(names, distances.detach().flatten().tolist(), strict=True):
            storage.put_scalar(name, value)

    def _kd_loss(self, step: DistillationStep) -> Tensor:
        """On all sampled proposals, or on a part of them (``TWI.PROPOSALS_PER_IMAGE``)."""
        student_logits = step.student.roi_predictions[0]
        if self.proposals_per_image == 0:
            return kd_loss(student_logits, step.teacher_predictions[0], self.kd_temperature)
        chosen = chosen_proposals(step.student, self.teacher.num_classes, self.proposals_per_image)
        student_logits = student_logits[chosen.rows]
        teacher_logits, _ = step.teacher.predict_rois(step.teacher_features, chosen.proposals)
        if not chosen.strata:  # no proposal at all
            return kd_loss(student_logits, teacher_logits, self.kd_temperature)
        return sum(
            s.share
            * kd_loss(student_logits[s.indices], teacher_logits[s.indices], self.kd_temperature)
            for s in chosen.strata
        )

    def _twi_losses(
        self, losses: dict[str, Tensor], step: DistillationStep, estimates: FactoredEstimates
    ) -> None:
        weights = [1.0] + [scale / len(self.scales) for scale in self.scales]
        if self.rpn_weight > 0:
            loss = self.heads.rpn_loss(estimates, weights, step.student)
            losses["loss_era_twi_rpn"] = self.rpn_weight * loss
        if self.roi_weight > 0:
            loss = self.heads.roi_loss(estimates, weights, step.student)
            losses["loss_era_twi_roi"] = self.roi_weight * loss

    def detector(self, student: GeneralizedRCNN) -> Callable | None:
        """At alpha 0 None (the plain student); above, the blended detector."""
        if self.alpha == 0:
            return None
        return BlendedDetector(student, self.teacher.model, self.estimator, self.alpha)


def check_levels(student: GeneralizedRCNN, teacher: Teacher, levels: list[str]) -> tuple[int, int]:
    """Both models have every level, at equal strides and with one channel count each.

    Returns:
        Channels of the student's and of the teacher's maps.

    Raises:
        UserError: names the level and what differs.
    """
    shapes = {
        "student": student.backbone.output_shape(),
        "teacher": teacher.model.backbone.output_shape(),
    }
    for who, shape in shapes.items():
        missing = [level for level in levels if level not in shape]
        if missing:
            raise UserError(
                f"MODEL.ERA.LEVELS is {levels}, but the {who}'s backbone has no {missing} (it has "
                f"{sorted(shape)}): list levels that both models have."
            )
        channels = {shape[level].channels for level in levels}
        if len(channels) > 1:
            raise UserError(
                f"MODEL.ERA.LEVELS is {levels}, at which the {who} has {sorted(channels)} channels: "
                "branches shared by levels need one number; list levels of an FPN."
            )
    for level in levels:
        strides = {who: shape[level].stride for who, shape in shapes.items()}
        if len(set(strides.values())) > 1:
            raise UserError(
                f"MODEL.ERA.LEVELS names {level}, which has stride {strides['student']} in the student "
                f"and {strides['teacher']} in the teacher: the FPN levels of both must match; choose a "
                "teacher with the same strides or leave the level out."
            )
    return shapes["student"][levels[0]].channels, shapes["teacher"][levels[0]].channels
