"""TRED: Target-awareness REpresentation Disentanglement, inspired by it (Li et al., "Towards Accurate Knowledge Transfer
via Target-awareness Representation Disentanglement", arXiv 2010.08532).

Only the abstract was readable: what the source model knows is split into a part that serves the target task and a part
that does not, kept apart by Max-MMD, and fine-tuning is regularised with the first. The formulas below are from memory,
the form for detectors is this project's, and the source gives none of the weights. Mapped so:

* One 1x1 convolution a level, ``D``, splits the teacher's FPN map in two of its width, ``[F+, F-] = D(F_T)``. It is
  linear and starts at ``F+ = F- = F_T / 2`` with a little noise, so that neither part is favoured.
* "Serves the target task" means: the teacher's frozen heads detect on F+, against the ground truth of the student's
  pictures. Levels that are not split the heads read as the teacher has them.
* MMD compares the box head's vectors of sampled proposals on F+ and on F-; at every position it would be quadratic in them.
* The student approaches F+ by MSE, through a 1x1 convolution that levels share only where widths differ.

It takes two runs: with ``MODEL.TRED.STAGE`` disentangle ``D`` is trained, the samples being those of a student that is not
trained yet (its proposals are near random, the ground-truth boxes among them); with distil the student learns.
``studies/tred.yaml`` is the chain as one command. What the formulas do not forbid is ``F+ = F_T, F- = 0``: where source and
target are the same data this may be close to the mimic of the teacher's map, and the method is for a teacher from
another data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from era.errors import UserError
from era.losses import at_least_float32, mse
from era.methods.base import Method, Needs
from era.methods.checks import (
    check_head_levels,
    check_level_names,
    check_levels,
    check_stage,
    check_vectors,
    check_weights,
)
from era.methods.feature_method import align
from era.methods.shared import load_frozen_part
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

DISENTANGLE, DISTIL = STAGES = ("disentangle", "distil")
PART = "methods.tred.disentangler."  # in the checkpoint of the run that trains it
WEIGHTS = {"mimic": "WEIGHT", "reconstruction": "RECONSTRUCTION_WEIGHT", "mmd": "MMD_WEIGHT"}
BANDWIDTHS = (0.5, 1.0, 2.0)  # of the kernels, in medians of the squared distances
START_NOISE = (
    0.01  # standard deviation of the disentangler's first weights about one half of the identity
)
LEAST_BANDWIDTH = 1e-6


def squared_mmd(first: Tensor, second: Tensor, bandwidths: Sequence[float] = BANDWIDTHS) -> Tensor:
    """Maximum mean discrepancy, ``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`` over all pairs (Gretton et al. 2012,
    the biased estimate).

    ``k(a, b)`` is the mean over bandwidths h of ``exp(-|a - b|^2 / (h m))``, m the median of the squared distances
    between different rows of both sets, taken as a constant (the median heuristic). So it is from 0 to 2 and does not
    grow with the scale of the rows: pushing the sets apart has an end. Where most rows are alike m is the mean instead.

    Args:
        first: x, (R, D). second: y, (Q, D).

    Returns:
        Scalar, float32 or wider; 0, connected to both, where a set is empty.
    """
    rows = torch.cat([at_least_float32(first), at_least_float32(second)])
    count = len(first)
    if count == 0 or len(second) == 0:
        return rows.sum() * 0
    with torch.autocast(rows.device.type, enabled=False):
        centred = rows - rows.detach().mean(0)  # distances stay, and lose fewer digits
        lengths = centred.square().sum(1)
        distances = lengths[:, None] + lengths - 2 * centred @ centred.T
        distances = distances.clamp(min=0)
        upper = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
        different = distances.detach()[upper[0], upper[1]]
        median = different.median()
        scale = torch.where(median > 0, median, different.mean()).clamp(min=LEAST_BANDWIDTH)
        kernels = sum((-distances / (h * scale)).exp() for h in bandwidths) / len(bandwidths)
        within = kernels[:count, :count].mean() + kernels[count:, count:].mean()
        return within - 2 * kernels[:count, count:].mean()


class Disentangler(nn.Module):
    """``[F+, F-] = D_l(F_T^l)``, one 1x1 convolution a level.

    Args:
        levels: FPN levels.
        channels: C_T of each of them.
    """

    def __init__(self, levels: Sequence[str], channels: int):
        super().__init__()
        self.splits = nn.ModuleDict(
            {level: nn.Conv2d(channels, 2 * channels, 1) for level in levels}
        )
        half = 0.5 * torch.eye(channels).repeat(2, 1)[:, :, None, None]
        for conv in self.splits.values():
            nn.init.normal_(conv.weight, std=START_NOISE)
            nn.init.zeros_(conv.bias)
            with torch.no_grad():
                conv.weight += half

    def forward(self, features: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """F+ and F-, by level, of the teacher's maps (B, C_T, H, W), of their shapes."""
        parts = {level: conv(features[level]).chunk(2, 1) for level, conv in self.splits.items()}
        return {k: v[0] for k, v in parts.items()}, {k: v[1] for k, v in parts.items()}


@METHOD_REGISTRY.register()
class TRED(Method):
    """In the run that distils ``loss_tred_mimic = alpha sum_l MSE(A(F_S^l), sg F+^l)``; in the run before, of D alone::

        loss_tred_task           = the teacher's own losses, its frozen heads on F+ against the ground truth
        loss_tred_reconstruction = w_r sum_l MSE(F+^l + F-^l, F_T^l)
        loss_tred_mmd            = -lambda MMD^2(F+, F-)        of the box head's vectors, from -2 lambda to 0

    Args:
        stage: ``disentangle`` or ``distil``.
        levels: FPN levels.
        weights: ``mimic`` (alpha), ``reconstruction`` (w_r), ``mmd`` (lambda).
        samples_per_image: proposals an image whose vectors MMD compares.
        disentangler: D, frozen in the run that distils; None where no loss uses it.
        adapter: A, of the run that distils; None in the other.
    """

    idea = "split the teacher's maps by what serves the target task, then mimic that part"
    paper = "inspired by TRED, arXiv 2010.08532 (from its abstract; the form is this project's)"
    loss_labels: ClassVar = {
        "loss_tred_mimic": "TRED: MSE to the part that serves the task",
        "loss_tred_task": "TRED: the teacher's heads on F+",
        "loss_tred_reconstruction": "TRED: MSE of F+ + F−",
        "loss_tred_mmd": "TRED: −MMD of F+ and F−",
    }
    part_key = "MODEL.TRED.DISENTANGLER_WEIGHTS"

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.TRED``; the source's weights are not known, these are this project's."""
        cfg.MODEL.TRED = CfgNode()
        # disentangle: train D and nothing else, the first run of a chain. distil: the student.
        cfg.MODEL.TRED.STAGE = DISTIL
        # model_final.pth of the first run; only read to distil with a WEIGHT above 0.
        cfg.MODEL.TRED.DISENTANGLER_WEIGHTS = ""
        # FPN levels that are split and mimicked, the same in both runs; losses are summed. p6 is a part of p5.
        cfg.MODEL.TRED.LEVELS = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.TRED.WEIGHT = 1.0  # alpha, of the mimic, as FitNet beside DIST; 0 switches it off
        cfg.MODEL.TRED.RECONSTRUCTION_WEIGHT = 1.0  # w_r, of |F+ + F- - F_T|^2; 0 leaves it out
        cfg.MODEL.TRED.MMD_WEIGHT = 0.1  # lambda, of -MMD^2, which is 0 to 2; 0 leaves it out
        # Sampled proposals an image whose vectors MMD compares, foreground preferred; its cost is quadratic.
        cfg.MODEL.TRED.MMD_SAMPLES_PER_IMAGE = 32

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """A stage that there is, weights of at least 0, at least one level and one sample."""
        keys = cfg.MODEL.TRED
        check_stage("MODEL.TRED.STAGE", keys.STAGE, STAGES)
        check_weights({f"MODEL.TRED.{key}": keys[key] for key in WEIGHTS.values()})
        check_level_names(keys.LEVELS, "MODEL.TRED.LEVELS")
        if keys.MMD_SAMPLES_PER_IMAGE < 1:
            raise UserError(
                f"MODEL.TRED.MMD_SAMPLES_PER_IMAGE is {keys.MMD_SAMPLES_PER_IMAGE}: expected at least 1; set "
                "MODEL.TRED.MMD_WEIGHT 0 to leave MMD out."
            )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher; labels to disentangle, and a trained disentangler to distil."""
        keys = cfg.MODEL.TRED
        if keys.STAGE == DISENTANGLE or keys.WEIGHT == 0:
            return Needs(heads=keys.STAGE == DISENTANGLE)
        return Needs(labels=False, heads=False, more=("a trained disentangler",))

    @classmethod
    def prepares(cls, cfg: CfgNode) -> bool:
        """With ``MODEL.TRED.STAGE`` disentangle."""
        return cfg.MODEL.TRED.STAGE == DISENTANGLE

    @configurable
    def __init__(
        self,
        *,
        stage: str,
        levels: list[str],
        weights: dict[str, float],
        samples_per_image: int,
        disentangler: Disentangler | None,
        adapter: nn.Module | None = None,
    ):
        super().__init__()
        self.stage = stage
        self.levels = list(levels)
        self.weights = dict(weights)
        self.samples_per_image = samples_per_image
        self.disentangler = disentangler
        self.adapter = adapter

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.TRED``, and to distil the disentangler that an earlier run trained.

        Raises:
            UserError: a level is missing or its stride differs, the teacher's heads cannot judge, or the disentangler is
                absent, of another shape or of another teacher.
        """
        keys, judge = cfg.MODEL.TRED, teacher.detector
        levels = list(keys.LEVELS)
        own, other = check_levels(student, judge, levels, "MODEL.TRED.LEVELS")
        found = {
            "stage": keys.STAGE,
            "levels": levels,
            "weights": {name: keys[key] for name, key in WEIGHTS.items()},
            "samples_per_image": keys.MMD_SAMPLES_PER_IMAGE,
        }
        if keys.STAGE == DISENTANGLE:
            reason = "MODEL.TRED.STAGE disentangle"
            judge.check_judge(student, reason)
            check_head_levels(student, judge, reason)
            if keys.MMD_WEIGHT > 0:
                check_vectors("teacher", judge, "MODEL.TRED.MMD_WEIGHT is above 0")
            return {**found, "disentangler": Disentangler(levels, other)}
        if keys.WEIGHT == 0:
            return {**found, "disentangler": None}
        disentangler = Disentangler(levels, other)
        load_frozen_part(
            disentangler, keys.DISENTANGLER_WEIGHTS, PART, what=cls.part_key, teacher=teacher
        )
        return {**found, "disentangler": disentangler, "adapter": align(own, other)}

    def losses(self, step: Step) -> dict[str, Tensor]:
        """See the class; a term of weight 0 is left out."""
        if self.stage == DISENTANGLE:
            return self._disentangling(step)
        if self.weights["mimic"] == 0:
            return {}
        with torch.no_grad():
            relevant, _ = self.disentangler(step.teacher_features)
        own = step.student.features
        total = sum(mse(self.adapter(own[level]), relevant[level]) for level in self.levels)
        return {"loss_tred_mimic": self.weights["mimic"] * total}

    def _disentangling(self, step: Step) -> dict[str, Tensor]:
        judge, maps = step.teacher.detector, step.teacher_features
        relevant, rest = self.disentangler(maps)
        seen, unseen = {**maps, **relevant}, {**maps, **rest}
        found = {"loss_tred_task": sum(judge.head_loss(p, seen, step.student) for p in judge.parts)}
        if (weight := self.weights["reconstruction"]) > 0:
            errors = (mse(relevant[x] + rest[x], maps[x]) for x in self.levels)
            found["loss_tred_reconstruction"] = weight * sum(errors)
        if (weight := self.weights["mmd"]) > 0:
            samples = step.student.sample(self.samples_per_image).proposals
            pair = (judge.vectors(own, samples) for own in (seen, unseen))
            found["loss_tred_mmd"] = -weight * squared_mmd(*pair)
        return found
