"""ERA at the ROI feature: the literal mapping of the classification form onto a two-stage detector.

The official code approaches the teacher's pooled feature and lets the teacher's classifier judge every estimate. Here the
vector that the box head makes of a proposal is that feature, on the student's sampled proposals, and the teacher's box
predictor that classifier. It serves training alone: inference keeps the student's own heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from era.errors import UserError
from era.methods.checks import check_vectors
from era.methods.era.config import ROI_WEIGHTS
from era.methods.era.losses import feature_terms
from era.methods.era.mbrnet import FeatureEstimator, MBRNet
from era.methods.era.twi import judge_weights
from era.modeling.detectors import Detector, Predictions
from era.modeling.step import Step

ROI = "roi"  # the one "level": vectors (R, D) are maps (R, D, 1, 1), on which a 1x1 conv is a linear layer


class BlendedMBRNet(MBRNet):
    """An MBRNet whose branch i > 1 reads ``alpha_i * F_S + sum_{j<i} beta_ij * B_j(x_j)``, by channel; the first
    reads ``F_S``.

    The official ``GAP_net_multi_parallel_alphabeta`` (``beta`` = 0 at the start) and ``..._alphabeta2`` (1): learned
    vectors in the student's width, ``alpha`` = 1 at the start, nothing detached. 0 starts as parallel branches,
    1 as accumulated inputs.

    Args:
        beta: at the start.
        branches: as of :class:`MBRNet`.
    """

    def __init__(self, *, in_channels: int, num_branches: int, beta: float, **branches):
        super().__init__(
            in_channels=in_channels, num_branches=num_branches, accumulated_inputs=False, **branches
        )
        shape = (1, in_channels, 1, 1)
        later = range(1, num_branches)
        self.alphas = nn.ParameterList(torch.ones(shape) for _ in later)
        self.betas = nn.ParameterList(torch.full(shape, beta) for i in later for _ in range(i))

    def forward(self, features: Tensor) -> list[Tensor]:
        """As :meth:`MBRNet.forward`."""
        outputs, residuals, betas = [], [], iter(self.betas)
        for i, branch in enumerate(self.branches):
            branch_input = features if i == 0 else self.alphas[i - 1] * features
            for earlier in outputs:
                branch_input = branch_input + next(betas) * earlier
            outputs.append(branch(branch_input))
            residuals.append(self.up_projected(i, outputs[-1]))
        return residuals


class RoiTerms(nn.Module):
    """ERA's losses on the vectors of the student's sampled proposals.

    Args:
        estimator: P and MBRNet, of the level :data:`ROI`.
        teacher: whose vectors are estimated and whose last layers judge; frozen, not registered.
        scales: ``s_1..s_N``.
        terms: which are wanted, of ``feature``, ``residual``, ``twi`` (against the ground truth) and ``soft`` (against
            the last layers' outputs on the teacher's vectors).
        temperature: ``tau`` of the soft judges' classes.
    """

    def __init__(
        self,
        *,
        estimator: FeatureEstimator,
        teacher: Detector,
        scales: Sequence[float],
        terms: Sequence[str],
        temperature: float = 1.0,
    ):
        super().__init__()
        self.estimator = estimator
        self.scales = tuple(scales)
        self.terms = tuple(terms)
        self.temperature = temperature
        self._teacher = (teacher,)
        estimator.freeze_unless(
            adapter=bool({"feature", "twi", "soft"} & {*terms}),
            mbrnet=bool({"residual", "twi", "soft"} & {*terms}),
        )

    def forward(self, step: Step) -> tuple[dict[str, Tensor], Tensor | None]:
        """Losses by term, without their weights, each over all R sampled proposals:

        - ``feature`` = MSE(e_0, sg f_T); ``residual`` = (1/N) sum_i s_i MSE(d_i, sg(f_T - e_{i-1}));
        - ``twi`` = L(e_0) + (1/N) sum_i s_i L(e_i), L the teacher's class and box losses, only where there is ground
          truth; ``soft`` likewise, without it.

        Fewer than two proposals, of which a norm over them can make nothing, give 0, connected to the graph.

        Returns:
            The losses, and the distances ``MSE(e_i, f_T)``, (1, N + 1), None without proposals.
        """
        teacher, own = self._teacher[0], step.student.vectors
        wanted = [term for term in self.terms if step.labeled or term != "twi"]
        if len(own) < 2:
            nothing = sum(p.sum() * 0 for p in self.parameters()) + own.sum() * 0
            return dict.fromkeys(wanted, nothing), None
        with torch.no_grad():
            target = teacher.vectors(step.teacher_features, step.student.samples)
        estimates = self.estimator({ROI: own[:, :, None, None]})
        cumulative = estimates.cumulative()
        found, measured = feature_terms(
            cumulative, estimates.residuals, {ROI: target[:, :, None, None]}, self.scales
        )
        if {"twi", "soft"} & {*wanted}:
            vectors = [e[ROI].flatten(1) for e in cumulative]
            found |= self._judgements(vectors, target, step, wanted)
        return {name: found[name] for name in wanted}, measured

    def _judgements(
        self, estimates: list[Tensor], target: Tensor, step: Step, wanted: Sequence[str]
    ) -> dict[str, Tensor]:
        """``twi`` and ``soft`` as far as they are wanted, of ``e_0..e_N`` and ``f_T``, (R, D) each."""
        teacher, found = self._teacher[0], {}
        said = teacher.predict_vectors(torch.cat(estimates))  # one pass for all
        each = zip(*(x.chunk(len(estimates)) for x in said), strict=True)
        pairs = list(zip(judge_weights(self.scales), map(Predictions._make, each), strict=True))
        if "twi" in wanted:
            found["twi"] = sum(w * teacher.prediction_loss(own, step.student) for w, own in pairs)
        if "soft" in wanted:
            with torch.no_grad():
                goal = teacher.predict_vectors(target)
            found["soft"] = sum(
                w * teacher.soft_prediction_loss(own, goal, self.temperature) for w, own in pairs
            )
        return found


def from_config(cfg: CfgNode, student: Detector, teacher: Detector) -> RoiTerms | None:
    """Read ``MODEL.ERA.ROI``; None if all of its weights are 0.

    Raises:
        UserError: a model makes no vector of a proposal, or lacks a level.
    """
    era, keys = cfg.MODEL.ERA, cfg.MODEL.ERA.ROI
    terms = [term for term, key in ROI_WEIGHTS.items() if keys[key] > 0]
    if keys.NUM_BRANCHES == 0 and "residual" in terms:
        terms.remove("residual")
    if not terms:
        return None
    for who, detector in (("student", student), ("teacher", teacher)):
        check_vectors(who, detector, "MODEL.ERA.ROI has weights above 0")
    missing = sorted(teacher.head_levels - student.feature_shapes.keys())
    if missing:
        raise UserError(
            f"MODEL.ERA.ROI has weights above 0, and the teacher's heads read {missing}, which the student's backbone "
            f"lacks (it has {sorted(student.feature_shapes)}): name another teacher, or set the weights to 0."
        )
    widths = {"in_channels": student.vector_channels, "out_channels": teacher.vector_channels}
    mbrnet = BlendedMBRNet(
        **widths,
        num_branches=keys.NUM_BRANCHES,
        beta=keys.BETA,
        hidden_channels=keys.HIDDEN_CHANNELS,
        norm=keys.NORM,
        norm_momentum=era.NORM_MOMENTUM,
        zero_start=era.ZERO_START,
    )
    return RoiTerms(
        estimator=FeatureEstimator(levels=[ROI], **widths, mbrnet=mbrnet, always_project=True),
        teacher=teacher,
        scales=keys.SCALES,
        terms=terms,
        temperature=era.KD_TEMPERATURE,
    )
