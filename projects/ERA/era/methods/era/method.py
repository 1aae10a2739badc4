"""ERA, Expandable Residual Approximation (arXiv 2508.16050), for a detector with an FPN.

The paper's public code is classification only; attaching it to FPN maps and to detection heads is this
project's adaptation, not a reproduction (docs/era.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from era.errors import UserError
from era.losses import kd_loss
from era.methods.base import Method, Needs
from era.methods.checks import (
    check_class_logits,
    check_every_class,
    check_heads_on,
    check_levels,
)
from era.methods.era import benchmark, config
from era.methods.era import roi as roi_feature
from era.methods.era.charts import CHARTS, LOSS_LABELS
from era.methods.era.fast import ALL_ON, FastTerms, Levers
from era.methods.era.inference import ExpandedBackbone
from era.methods.era.losses import feature_terms
from era.methods.era.mbrnet import FeatureEstimator, MBRNet
from era.methods.era.standardise import TeacherDeviation, emphasis
from era.methods.era.twi import SoftJudges, ends, judge_weights, judgements
from era.methods.shared import parts_of_student
from era.modeling.detectors import Detector
from era.modeling.detectors.recording import ALL_POSITIONS
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations between statistics: the period of Detectron2's writers


@METHOD_REGISTRY.register()
class ERA(Method):
    """Feature, residual, TWI, soft TWI and KD losses on estimates of the teacher's FPN.

    Args:
        estimator: adapter and MBRNet.
        teacher: the frozen teacher; not registered as a submodule.
        student: the student.
        scales: ``s_1..s_N``.
        weights: of the terms ``feature`` (w_f), ``residual`` (w_r), ``kd`` (w_k), ``twi_<part>`` and
            ``soft_<part>`` of the teacher's heads, ``roi_<term>`` at the ROI feature; 0 leaves a term out.
        kd_temperature: ``tau``, of KD and of the soft judges.
        alpha: how far inference leans on the teacher's heads, 0 to 1.
        samples_per_image: on how many of the student's sampled proposals an image ``e_1..e_N`` are judged
            by the ROI head, and how many the KD loss looks at; 0 = all.
        fast: compute the same numbers cheaply.
        compile_estimator: run the estimator in training through ``torch.compile``.
        levers: what of the fast path is switched on.
        deviation: gives ``sigma_T``, by which feature and residual losses divide; None for 1.
        weights_positions: weight positions in feature and residual losses by the teacher's
            :meth:`~era.modeling.detectors.Detector.foreground`.
        judges_ends: judge ``e_0`` and ``e_N`` alone instead of every estimate.
        first_stage_judges: of a cascade of the teacher's box heads the first alone judges.
        roi: ERA at the ROI feature, beside the maps; None for none.
        soft_positions: where the soft judgements of dense heads look, ``all`` or ``sampled``.
    """

    idea = "approach the teacher's features in residual steps, each judged by the teacher's frozen heads"
    paper = "Expandable Residual Approximation, arXiv 2508.16050 (detection form: this project's)"
    loss_labels: ClassVar = LOSS_LABELS
    charts: ClassVar = CHARTS
    neutral: ClassVar = config.NEUTRAL
    alpha_key = "MODEL.ERA.ALPHA"
    add_config = staticmethod(config.add_config)
    check_config = staticmethod(config.check_config)

    @configurable
    def __init__(
        self,
        *,
        estimator: FeatureEstimator,
        teacher: Teacher,
        student: Detector,
        scales: list[float],
        weights: dict[str, float],
        kd_temperature: float = 1.0,
        alpha: float = 0.0,
        samples_per_image: int = 0,
        fast: bool = True,
        compile_estimator: bool = False,
        levers: Levers = ALL_ON,
        deviation: TeacherDeviation | None = None,
        weights_positions: bool = False,
        judges_ends: bool = False,
        first_stage_judges: bool = False,
        soft_positions: str = ALL_POSITIONS,
        roi: roi_feature.RoiTerms | None = None,
    ):
        super().__init__()
        self.estimator = estimator
        self.scales = tuple(scales)
        self.weights = dict(weights)
        self.kd_temperature = kd_temperature
        self.alpha = alpha
        self.samples_per_image = samples_per_image
        self.deviation = deviation
        self.weights_positions = weights_positions
        self.judges_ends = judges_ends
        self.roi = roi
        # in tuples: no submodules, so never saved, trained or wrapped
        self._teacher = (teacher,)
        judge = teacher.detector
        self._judge = (judge.first_stage() if first_stage_judges else judge,)
        self.judged_parts, softly = (
            tuple(p for p in judge.parts if self.weights.get(f"{kind}_{p}", 0) > 0)
            for kind in ("twi", "soft")
        )
        self.soft = SoftJudges(softly, soft_positions, kd_temperature)
        self._judges = bool(self.judged_parts or softly)
        self.fast_terms = None
        if fast:
            self.fast_terms = FastTerms(
                estimator,
                self._judge[0],
                student,
                self.judged_parts,
                samples_per_image,
                compiled=compile_estimator,
                levers=levers,
                soft=self.soft,
                judges_ends=judges_ends,
            )
        compiled = torch.compile(estimator, dynamic=True) if compile_estimator else estimator
        self._estimate = (compiled,)
        estimator.freeze_unless(
            adapter=self._judges or self.weights["feature"] > 0,
            mbrnet=self._judges or self.weights["residual"] > 0,
        )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher; at inference too if ``MODEL.ERA.ALPHA`` is above 0. Labels if TWI alone is on."""
        era, parts = cfg.MODEL.ERA, parts_of_student(cfg)
        free = (era.FEATURE_WEIGHT, era.RESIDUAL_WEIGHT, era.KD_WEIGHT,
                *(era.TWI[key] for part, (_, key) in config.TWI_WEIGHTS.items() if part in parts),
                era.ROI.FEATURE_WEIGHT, era.ROI.RESIDUAL_WEIGHT, era.ROI.SOFT_WEIGHT)  # fmt: skip
        return Needs(
            teacher_at_inference=era.ALPHA > 0,
            labels=not any(w > 0 for w in free),
            heads=config.asks_heads(era, parts),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.ERA`` and check that student and teacher fit together.

        Raises:
            UserError: levels, strides, anchors or heads do not match.
        """
        era, judge = cfg.MODEL.ERA, teacher.detector
        levels = list(era.LEVELS)
        in_channels, out_channels = check_levels(student, judge, levels, "MODEL.ERA.LEVELS")
        parts = {part: keys for part, keys in config.TWI_WEIGHTS.items() if part in judge.parts}
        weights = {
            "feature": era.FEATURE_WEIGHT,
            "residual": era.RESIDUAL_WEIGHT,
            "kd": era.KD_WEIGHT,
            **{f"twi_{part}": era.TWI[hard] for part, (hard, _) in parts.items()},
            **{f"soft_{part}": era.TWI[soft] for part, (_, soft) in parts.items()},
            **{f"roi_{term}": era.ROI[key] for term, key in config.ROI_WEIGHTS.items()},
        }
        for part, (_, key) in parts.items():
            if era.TWI[key] > 0 and part not in judge.soft_parts:
                raise UserError(
                    f"MODEL.ERA.TWI.{key} is {era.TWI[key]}, and the teacher is a {type(judge).__name__}, whose heads have no "
                    f"soft judge {part!r} (only {list(judge.soft_parts)}): set it to 0, or name another teacher."
                )
        unseen = sorted(set(levels) - judge.foreground_levels)
        if era.POSITION_WEIGHT == config.BY_JUDGE and unseen:
            raise UserError(
                f"MODEL.ERA.POSITION_WEIGHT is {era.POSITION_WEIGHT!r} and MODEL.ERA.LEVELS {levels}, but the teacher, a "
                f"{type(judge).__name__}, does not say what is foreground at {unseen}: set it to 'none', or leave "
                "these levels out."
            )
        used = [f"MODEL.ERA.TWI.{k}" for keys in parts.values() for k in keys if era.TWI[k] > 0]
        used += ["MODEL.ERA.ALPHA"] if era.ALPHA > 0 else []
        if used:
            reason = f"ERA with {' and '.join(used)} above 0"
            check_heads_on(student, judge, levels, "MODEL.ERA.LEVELS", reason)
        if era.ALPHA > 0:
            check_every_class(teacher, f"MODEL.ERA.ALPHA {era.ALPHA}")
        if era.KD_WEIGHT > 0:
            check_class_logits(student, judge, "ERA with MODEL.ERA.KD_WEIGHT above 0")
        if 0 < era.ALPHA < 1:
            student.check_equal_heads(judge, reason=f"MODEL.ERA.ALPHA {era.ALPHA}")
        mbrnet = MBRNet(
            in_channels=in_channels,
            out_channels=out_channels,
            num_branches=era.NUM_BRANCHES,
            num_blocks=era.NUM_BLOCKS,
            kernel_size=era.KERNEL_SIZE,
            hidden_channels=era.HIDDEN_CHANNELS,
            norm=era.NORM,
            norm_momentum=era.NORM_MOMENTUM,
            context_kernel=era.CONTEXT_KERNEL,
            zero_start=era.ZERO_START,
            accumulated_inputs=era.ACCUMULATED_INPUTS,
            shared_up_projection=era.SHARED_UP_PROJECTION,
        )
        return {
            "estimator": FeatureEstimator(
                levels=levels,
                in_channels=in_channels,
                out_channels=out_channels,
                mbrnet=mbrnet,
                always_project=era.PROJECTION == config.ALWAYS,
            ),
            "teacher": teacher,
            "student": student,
            "scales": era.SCALES,
            "weights": weights,
            "kd_temperature": era.KD_TEMPERATURE,
            "alpha": era.ALPHA,
            "samples_per_image": era.TWI.PROPOSALS_PER_IMAGE,
            "fast": era.FAST,
            "compile_estimator": era.COMPILE,
            "deviation": TeacherDeviation(levels, out_channels)
            if era.STANDARDIZE == config.BY_TEACHER
            else None,
            "weights_positions": era.POSITION_WEIGHT == config.BY_JUDGE,
            "judges_ends": era.TWI.ESTIMATES == config.ENDS,
            "first_stage_judges": era.TWI.STAGES == config.FIRST_STAGE,
            "soft_positions": era.TWI.SOFT_POSITIONS,
            "roi": roi_feature.from_config(cfg, student, judge),
        }

    @classmethod
    def benchmark_rows(cls, cfg: CfgNode) -> dict[str, Callable[..., Method]]:
        """See :func:`era.methods.era.benchmark.rows`."""
        return benchmark.rows(cls, cfg)

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher."""
        return self._teacher[0]

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The ERA losses, weighted, each present only if its weight is above 0, and TWI's only with labels:

        - ``loss_era_feature`` = w_f * MSE(e_0, sg F_T);
        - ``loss_era_residual`` = (w_r / N) * sum_i s_i * MSE(d_i, sg(F_T - e_{i-1}));
        - ``loss_era_twi_rpn``, ``loss_era_twi_roi``: the teacher's heads on e_0 (weight 1) and on every
          e_i (weight s_i / N), against the ground truth;
        - ``loss_era_twi_dense`` in the place of both where the teacher is a dense detector;
        - ``loss_era_soft_rpn``, ``loss_era_soft_roi`` or ``_dense``: the same against their own outputs on F_T; with
          ``MODEL.ERA.TWI.ESTIMATES`` "ends" both judge e_0 (weight 1) and e_N (weight sum_i s_i / N) alone;
        - ``loss_era_roi_<term>``: the same at the ROI feature, see :class:`~era.methods.era.roi.RoiTerms`;
        - ``loss_era_kd`` = w_k * tau^2 * KL(teacher ROI classes || student ROI classes).

        Every 20 iterations ``era/<level>/residual_e<i>``, the mean over elements of ``(F_T - e_i)^2``,
        i = 0..N, goes into the event storage: it must fall with training. So does ``era/<level>/removed``,
        ``1 - |F_T - e_N|^2 / |F_T - e_0|^2``, if there are branches.

        With ``MODEL.ERA.STANDARDIZE`` "teacher" F_T, e_i and d_i are divided by sigma_T in the first two terms and in
        what is logged, see :class:`TeacherDeviation`; with ``MODEL.ERA.POSITION_WEIGHT`` "teacher" their means over
        positions are weighted, see :func:`emphasis`.
        """
        terms = {}
        if self._judges or self.weights["feature"] > 0 or self.weights["residual"] > 0:
            deviation = None if self.deviation is None else self.deviation(step.teacher_features)
            compute = self._terms if self.fast_terms is None else self.fast_terms
            terms, measured = compute(step, self.scales, deviation, self._by_position(step))
            self._log(self.estimator.levels, measured)
        if self.roi is not None:
            found, measured = self.roi(step)
            terms |= {f"roi_{name}": term for name, term in found.items()}
            if measured is not None:
                self._log([roi_feature.ROI], measured)
        if self.weights["kd"] > 0:
            terms["kd"] = self._kd_term(step)
        return {
            f"loss_era_{name}": self.weights[name] * term
            for name, term in terms.items()
            if self.weights[name] > 0
        }

    def _by_position(self, step: Step) -> dict[str, Tensor] | None:
        """What the teacher makes of each position, as :func:`emphasis`; None if positions count alike."""
        if not self.weights_positions:
            return None
        target = {level: step.teacher_features[level] for level in self.estimator.levels}
        return emphasis(self.teacher.detector.foreground(target))

    def _terms(
        self,
        step: Step,
        scales: Sequence[float],
        deviation: dict[str, Tensor] | None,
        by_position: dict[str, Tensor] | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The feature, residual and both TWI losses as they are defined, without their weights, and the distances
        of all estimates, (levels, N + 1); the reference of :class:`FastTerms`."""
        target = step.teacher_features
        estimates = self._estimate[0](step.student.features)  # e_0 and d_1..d_N
        cumulative = estimates.cumulative()  # e_0..e_N
        terms, measured = feature_terms(
            cumulative, estimates.residuals, target, scales, deviation, by_position
        )
        judged, judged_weights = cumulative, judge_weights(scales)
        if self.judges_ends and scales:
            judged, judged_weights = [cumulative[0], cumulative[-1]], ends(judged_weights)
        for part in self._judge[0].parts:
            found = judgements(
                self._judge[0],
                part,
                judged,
                judged_weights,
                target,
                step.student,
                samples_per_image=self.samples_per_image,
                hard=step.labeled and part in self.judged_parts,
                soft=self.soft if part in self.soft.parts else None,
            )
            terms |= {f"{kind}_{part}": loss for kind, loss in found.items()}
        return terms, measured

    def _kd_term(self, step: Step) -> Tensor:
        """``tau^2 KL(teacher || student)`` of ROI classes, on the sample of proposals that the heads judge."""
        if self.samples_per_image == 0:
            return kd_loss(*step.class_logits, self.kd_temperature)
        sample, judge = step.student.sample(self.samples_per_image), step.teacher.detector
        pair = (
            step.student.predictions.class_logits[sample.rows],
            step.teacher.predict(step.teacher_features, sample.proposals).class_logits,
        )
        if not sample.strata:  # no proposal at all
            return kd_loss(*pair, self.kd_temperature)
        classes, total, shares = step.student.classes[sample.rows], 0.0, 0.0
        for s in sample.strata:
            own, other = (judge.shared_logits(x[s.indices], classes[s.indices]) for x in pair)
            share = s.share * len(own) / len(s.indices)
            total = total + share * kd_loss(own, other, self.kd_temperature)
            shares += share
        return total / shares if judge.known_classes is not None and shares > 0 else total

    def _log(self, levels: Sequence[str], measured: Tensor) -> None:
        storage = get_event_storage()
        if storage.iter % LOG_PERIOD not in (0, LOG_PERIOD - 1):
            return  # reading numbers makes a GPU wait
        for level, by_estimate in zip(levels, measured.tolist(), strict=True):
            for i, value in enumerate(by_estimate):
                storage.put_scalar(f"era/{level}/residual_e{i}", value)
            if len(by_estimate) > 1 and by_estimate[0] > 0:
                removed = 1 - by_estimate[-1] / by_estimate[0]
                storage.put_scalar(f"era/{level}/removed", removed)

    def detector(self, student: Detector) -> Callable | None:
        """At alpha 0 None (the plain student); above, student and teacher's heads on ``e_N`` blended."""
        if self.alpha == 0:
            return None
        return student.blended(
            self.teacher.detector, lambda features, _: self.estimator.final(features), self.alpha
        )

    def deployable(self, student: Detector) -> nn.Module | None:
        """At alpha 1 the student's backbone with adapter and MBRNet under copies of the teacher's heads."""
        if self.alpha != 1:
            return None
        judge = self.teacher.detector
        channels = judge.feature_shapes[self.estimator.levels[0]].channels
        backbone = ExpandedBackbone(student.model.backbone, self.estimator, channels)
        return student.with_heads_of(judge, backbone)
