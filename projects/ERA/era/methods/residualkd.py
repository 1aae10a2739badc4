"""ResidualKD: a slim assistant learns what the student's feature maps lack of the teacher's.

Inspired by Gao et al., "Residual Knowledge Distillation", arXiv 2002.09168 (2020), the ancestor of methods that approach a
teacher in residual steps. Only its abstract could be read, the losses are from memory, and no official code was found: a
student S mimics the teacher's maps, an assistant A learns the residual error, and both come from splitting one model without
raising the total cost. That paper classifies images; what follows is this project's mapping to a detector with an FPN:

- the maps are those of the FPN, because teacher and student of other widths and depths have levels of equal stride there;
- A works on the pictures beside S, as a part split off from one network would: a ResNet of basic blocks with an FPN of its
  own. The student is not narrowed for it, so that it stays the plain student; A's width is the budget that it adds;
- S + A is one sum, at inference. It goes to the teacher's heads, which the maps were made for, and with ALPHA 0 nowhere:
  the trained student alone then detects, and A is thrown away.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import ClassVar

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from torch import Tensor, nn

from era.config import student_config
from era.errors import UserError
from era.losses import at_least_float32, level_mean, mse
from era.methods.base import Method, Needs
from era.methods.checks import (
    check_every_class,
    check_heads_on,
    check_levels,
    check_weights,
)
from era.modeling.backbones.estimating import EstimatingBackbone
from era.modeling.backbones.small_resnet import BLOCKS_BY_DEPTH, build_small_resnet_fpn_backbone
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

logger = logging.getLogger(__name__)

NORMS = ("BN", "SyncBN")
STAGES = ("res2", "res3", "res4", "res5")


def mimic_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``L_S = mean_l MSE(S_l, F_T^l)``, the gradient to S alone.

    The source's squared norm as a mean over elements, then over levels, so that neither the size of a picture nor the number
    of levels changes what a weight means (this project's choice).

    Args:
        student: ``S_l``, the student's maps in the teacher's width, (B, C_T, H, W) a level.
        teacher: ``F_T^l``, of the same shapes, constants.

    Returns:
        Scalar >= 0, float32 or wider.
    """
    return level_mean([mse(s, t.detach()) for s, t in zip(student, teacher, strict=True)])


def residual_loss(
    student: Sequence[Tensor], assistant: Sequence[Tensor], teacher: Sequence[Tensor]
) -> Tensor:
    """``L_A = mean_l MSE(A_l, sg(F_T^l - S_l))``, the gradient to A alone; means as in :func:`mimic_loss`.

    Args:
        student, teacher: ``S_l`` and ``F_T^l``, (B, C_T, H, W) a level, constants.
        assistant: ``A_l``, of the same shapes.

    Returns:
        Scalar >= 0, float32 or wider.
    """
    return level_mean(
        [
            mse(a, (at_least_float32(t) - at_least_float32(s)).detach())
            for s, a, t in zip(student, assistant, teacher, strict=True)
        ]
    )


class Assistant(nn.Module):
    """A: a slim ResNet with an FPN of its own on the student's pictures, then a 1x1 conv shared by the levels.

    Args:
        fpn: the network.
        levels: those of its maps that are wanted; what only others need is frozen.
        out_channels: C_T.
    """

    def __init__(self, fpn: FPN, levels: Sequence[str], out_channels: int):
        super().__init__()
        self.fpn = fpn
        self.levels = tuple(levels)
        self.projection = nn.Conv2d(fpn.output_shape()[levels[0]].channels, out_channels, 1)
        weight_init.c2_xavier_fill(self.projection)
        numbers = [stage.removeprefix("res") for stage in fpn.in_features]
        read = set(levels)
        if read - {f"p{n}" for n in numbers}:  # p6 is a part of p5
            read.add(fpn.top_block.in_feature)
        for n in numbers:
            getattr(fpn, f"fpn_output{n}").requires_grad_(f"p{n}" in read)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``A_l`` by level, each (B, C_T, H, W), of preprocessed images (B, 3, height, width)."""
        maps = self.fpn(images)
        return {level: self.projection(maps[level]) for level in self.levels}


class AssistedBackbone(EstimatingBackbone):
    """S + A: the student's backbone and FPN, brought to the teacher's width, and the assistant beside it.

    Args:
        student: see :class:`~era.modeling.backbones.estimating.EstimatingBackbone`.
        method: has the adapter and the assistant; copied.
    """

    def __init__(self, student: Backbone, method: ResidualKD):
        channels = method.assistant.projection.out_channels
        super().__init__(student, method.levels, channels)
        self.adapter = copy.deepcopy(method.adapter)
        self.assistant = copy.deepcopy(method.assistant)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``S_l + A_l`` by level, each (B, C_T, H, W), of images (B, 3, height, width)."""
        return summed(self.student(images), images, self.adapter, self.assistant)


def summed(
    features: dict[str, Tensor], images: Tensor, adapter: nn.Module, assistant: Assistant
) -> dict[str, Tensor]:
    """``S_l + A_l`` by level.

    Args:
        features: the student's maps, level name to (B, C_S, H, W).
        images: the preprocessed batch that they were computed from, (B, 3, height, width).
    """
    residuals = assistant(images)
    return {level: adapter(features[level]) + own for level, own in residuals.items()}


def slim(channels: int, width: float) -> int:
    """That fraction of a number of channels, at least 1."""
    return max(1, round(width * channels))


def build_assistant(cfg: CfgNode, student: Detector, out_channels: int) -> Assistant:
    """A of ``MODEL.RESIDUALKD`` for a student's config.

    Raises:
        UserError: a listed level is none that such a network has, or has another stride than the student's.
    """
    keys, own = cfg.MODEL.RESIDUALKD, student_config(cfg)
    levels, model = list(keys.LEVELS), own.MODEL
    stages = list(model.FPN.IN_FEATURES)
    if not set(stages) <= set(STAGES):
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {stages}: ResidualKD's assistant is a ResNet and has {list(STAGES)}; distil into a "
            "student whose FPN stands on these."
        )
    lowest = min([*levels, "p5"])
    model.FPN.IN_FEATURES = [s for s in stages if s.replace("res", "p") >= lowest]
    model.RESNETS.OUT_FEATURES = list(model.FPN.IN_FEATURES)
    model.RESNETS.DEPTH, model.RESNETS.NORM = keys.DEPTH, keys.NORM
    model.FPN.NORM, model.BACKBONE.FREEZE_AT = "", 0
    for part, key in (("RESNETS", "STEM_OUT_CHANNELS"), ("RESNETS", "RES2_OUT_CHANNELS"), ("FPN", "OUT_CHANNELS")):  # fmt: skip
        model[part][key] = slim(model[part][key], keys.WIDTH)
    fpn = build_small_resnet_fpn_backbone(own, ShapeSpec(channels=len(model.PIXEL_MEAN)))
    found, expected = fpn.output_shape(), student.feature_shapes
    for level in levels:
        stride = found[level].stride if level in found else "absent"
        if stride != expected[level].stride:
            raise UserError(
                f"MODEL.RESIDUALKD.LEVELS names {level}, of stride {expected[level].stride} in the student and {stride} in "
                f"the assistant (which has {sorted(found)}): leave the level out."
            )
    return Assistant(fpn, levels, out_channels)


@METHOD_REGISTRY.register()
class ResidualKD(Method):
    """``loss_residualkd_feature = w_S L_S`` and ``loss_residualkd_residual = w_A L_A``, with :func:`mimic_loss` and
    :func:`residual_loss`.

    Args:
        levels: FPN levels.
        weights: ``feature`` w_S and ``residual`` w_A.
        channels: C_S and C_T; where they differ, S is brought to C_T by a 1x1 conv shared by the levels, else it is the map
            itself. The conv follows L_S alone.
        assistant: A.
        alpha: how far inference leans on the teacher's heads on S + A, 0 to 1.
        teacher: has these heads.
    """

    idea = "mimic the teacher's FPN maps; a slim assistant beside the student learns what is left of the difference"
    paper = "inspired by Residual Knowledge Distillation, arXiv 2002.09168 (from its abstract)"
    loss_labels: ClassVar = {
        "loss_residualkd_feature": "ResidualKD: MSE of the student's maps",
        "loss_residualkd_residual": "ResidualKD: MSE of the assistant's residuals",
    }
    own_part_losses: ClassVar = ("loss_residualkd_residual",)  # of the assistant
    alpha_key = "MODEL.RESIDUALKD.ALPHA"

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.RESIDUALKD``."""
        cfg.MODEL.RESIDUALKD = CfgNode()
        keys = cfg.MODEL.RESIDUALKD
        # FPN levels that S mimics and A corrects. ALPHA above 0 needs every level that the teacher's heads read.
        keys.LEVELS = ["p2", "p3", "p4", "p5", "p6"]
        keys.FEATURE_WEIGHT = 1.0  # w_S: MSE(S, F_T); the source's weights are not known
        keys.RESIDUAL_WEIGHT = 1.0  # w_A: MSE(A, F_T - S); at 0 there is no assistant
        # The assistant's budget: its channels in stem, stages and FPN as a fraction of the student's, above 0, at most 1. The
        # cost goes about with the square.
        keys.WIDTH = 0.25
        keys.DEPTH = 10  # of the assistant's ResNet of basic blocks: 10, 18 or 34
        # Of its ResNet, which starts from random weights: BN, over the images of one process, or SyncBN.
        keys.NORM = "BN"
        # Inference: 0 = the plain student, 1 = the teacher's heads on S + A, between = their predictions blended as
        # (1 - alpha) * student + alpha * teacher's heads.
        keys.ALPHA = 0.0

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Weights, the assistant's size, alpha."""
        keys, prefix = cfg.MODEL.RESIDUALKD, "MODEL.RESIDUALKD"
        check_weights(
            {f"{prefix}.{key}": keys[key] for key in ("FEATURE_WEIGHT", "RESIDUAL_WEIGHT")}
        )
        if not keys.LEVELS:
            raise UserError(f"{prefix}.LEVELS is empty: expected FPN levels such as ['p2', 'p3'].")
        if not 0.0 < keys.WIDTH <= 1.0:
            raise UserError(
                f"{prefix}.WIDTH is {keys.WIDTH}: expected a fraction of the student's channels above 0 and at most 1."
            )
        for key, known in (("DEPTH", tuple(BLOCKS_BY_DEPTH)), ("NORM", NORMS)):
            if keys[key] not in known:
                raise UserError(
                    f"{prefix}.{key} is {keys[key]!r}: expected one of {', '.join(map(str, known))}."
                )
        if not 0.0 <= keys.ALPHA <= 1.0:
            raise UserError(
                f"{prefix}.ALPHA is {keys.ALPHA}: expected a number from 0 (plain student) to 1 (teacher's heads on "
                "student and assistant); set it within that range."
            )
        if keys.ALPHA > 0 and keys.RESIDUAL_WEIGHT == 0:
            raise UserError(
                f"{prefix}.ALPHA is {keys.ALPHA} and {prefix}.RESIDUAL_WEIGHT 0, which trains no assistant: expected a "
                "weight above 0; raise it, or detect with alpha 0."
            )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher, at inference too if ALPHA is above 0; no labels."""
        keys = cfg.MODEL.RESIDUALKD
        return Needs(
            teacher_at_inference=keys.ALPHA > 0,
            heads=keys.ALPHA > 0,
            labels=keys.FEATURE_WEIGHT == 0 and keys.RESIDUAL_WEIGHT == 0,
            more=("a slim second network",) if keys.RESIDUAL_WEIGHT > 0 else (),
        )

    @configurable
    def __init__(
        self,
        *,
        levels: list[str],
        weights: dict[str, float],
        channels: tuple[int, int],
        assistant: Assistant | None,
        alpha: float,
        teacher: Teacher,
    ):
        super().__init__()
        self.levels = tuple(levels)
        self.weights = dict(weights)
        self.alpha = alpha
        own, other = channels
        self.adapter = nn.Identity() if own == other else nn.Conv2d(own, other, 1)
        self.adapter.requires_grad_(weights["feature"] > 0)
        self.assistant = assistant
        self._teacher = (teacher,)  # in a tuple: no submodule, so never saved, trained or wrapped

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.RESIDUALKD`` and build the assistant.

        Raises:
            UserError: a level is missing, its stride differs, or with ALPHA above 0 the teacher's heads do not fit.
        """
        keys, judge = cfg.MODEL.RESIDUALKD, teacher.detector
        levels = list(keys.LEVELS)
        channels = check_levels(student, judge, levels, "MODEL.RESIDUALKD.LEVELS")
        if keys.ALPHA > 0:
            reason = f"MODEL.RESIDUALKD.ALPHA {keys.ALPHA}"
            check_heads_on(student, judge, levels, "MODEL.RESIDUALKD.LEVELS", reason)
            check_every_class(teacher, reason)
            if keys.ALPHA < 1:
                student.check_equal_heads(judge, reason=reason)
        assistant = None
        if keys.RESIDUAL_WEIGHT > 0:
            assistant = build_assistant(cfg, student, channels[1])
            sizes = (sum(p.numel() for p in m.parameters()) for m in (assistant, student.model))
            logger.info("The assistant has %d weights, the student %d.", *sizes)
        return {
            "levels": levels,
            "weights": {"feature": keys.FEATURE_WEIGHT, "residual": keys.RESIDUAL_WEIGHT},
            "channels": channels,
            "assistant": assistant,
            "alpha": keys.ALPHA,
            "teacher": teacher,
        }

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Both losses, each present only if its weight is above 0."""
        if not any(self.weights.values()):
            return {}
        own = [self.adapter(step.student.features[level]) for level in self.levels]
        other = [step.teacher_features[level] for level in self.levels]
        terms = {}
        if self.weights["feature"] > 0:
            terms["feature"] = mimic_loss(own, other)
        if self.assistant is not None:
            residuals = list(self.assistant(step.student.images.tensor).values())
            terms["residual"] = residual_loss(own, residuals, other)
        return {
            f"loss_residualkd_{name}": self.weights[name] * term for name, term in terms.items()
        }

    def detector(self, student: Detector) -> Callable | None:
        """At alpha 0 None (the plain student); above, student and teacher's heads on S + A blended."""
        if self.alpha == 0:
            return None

        def estimate(features: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
            return summed(features, images, self.adapter, self.assistant)

        return student.blended(self._teacher[0].detector, estimate, self.alpha)

    def deployable(self, student: Detector) -> nn.Module | None:
        """At alpha 1 the backbone S + A under copies of the teacher's heads."""
        if self.alpha != 1:
            return None
        backbone = AssistedBackbone(student.model.backbone, self)
        return student.with_heads_of(self._teacher[0].detector, backbone)
