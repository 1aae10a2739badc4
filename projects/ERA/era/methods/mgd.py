"""MGD: the whole of the teacher's feature maps, out of a part of the student's.

Yang et al., "Masked Generative Distillation", arXiv 2205.01529; form and weights as in its official code
(``det/mmdet/distillation/losses/mgd.py``) and its Faster R-CNN recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from era.errors import UserError
from era.losses import squared_error
from era.methods.feature_method import FeatureMethod, align
from era.modeling.detectors import Detector
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

SEED = 20220501  # of the masks, beside the iteration and the image's number in it


def mgd_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """``1/B sum (G - T)^2``: a sum over channels and positions, a mean over images.

    Args:
        generated: the generator's maps ``G``, (B, C, H, W), with gradient.
        teacher: same shape, a constant.

    Returns:
        Scalar >= 0, float32 or wider.
    """
    return squared_error(generated, teacher.detach())


def masks(
    iteration: int, image: int, sizes: Sequence[tuple[int, int]], ratio: float
) -> list[Tensor]:
    """What an image keeps of its maps at an iteration: for each size (H, W) a mask (H, W) of 1, and of 0 with
    probability ``ratio`` (lambda), float32, drawn from the three numbers alone."""
    draw = np.random.default_rng([SEED, iteration, image])
    return [torch.from_numpy((draw.random(size) >= ratio).astype(np.float32)) for size in sizes]


@METHOD_REGISTRY.register()
class MGD(FeatureMethod):
    """``loss_mgd_feature = alpha sum_l mgd_loss(G_l(M * A_l(F_S^l)), F_T^l)``.

    ``M`` drops a position, in all channels, with probability lambda; ``G_l`` is a 3x3 conv, ReLU, and a 3x3 conv.
    Masks follow from the iteration and the image's number in it, counted over processes and accumulated batches: so
    runs repeat, resumed runs go on alike, and two processes draw what one draws for as many images each. The source
    draws them from torch's global random state.

    Args:
        levels: FPN levels.
        weight: alpha.
        mask_ratio: lambda.
        channels: of the student's and of the teacher's maps; where they differ, ``A_l`` is a 1x1 conv at each level,
            else the identity.
    """

    idea = "generate the teacher's FPN maps from the student's with positions masked out"
    paper = "MGD, arXiv 2205.01529"
    loss_labels: ClassVar = {"loss_mgd_feature": "MGD: maps generated from masked ones"}

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.MGD``."""
        cfg.MODEL.MGD = CfgNode()
        # FPN levels that are compared; their losses are summed. p6 is a part of p5.
        cfg.MODEL.MGD.LEVELS = ["p2", "p3", "p4", "p5"]
        # alpha, the source's for two-stage detectors (one-stage: 2e-5); 0 switches the loss off. It stands before a SUM
        # over channels and positions, of the order of 1e7 elements on COCO: smaller maps ask for more.
        cfg.MODEL.MGD.WEIGHT = 5e-7
        cfg.MODEL.MGD.MASK_RATIO = 0.45  # lambda, 0 up to below 1; one-stage detectors: 0.65

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """And a share of positions that leaves some."""
        super().check_config(cfg)
        name, keys = cls.keys(cfg)
        if not 0.0 <= keys.MASK_RATIO < 1.0:
            raise UserError(
                f"{name}.MASK_RATIO is {keys.MASK_RATIO}: expected a share of positions from 0 up to below 1."
            )

    @configurable
    def __init__(
        self, *, levels: list[str], weight: float, mask_ratio: float, channels: tuple[int, int]
    ):
        super().__init__(levels=levels, weight=weight)
        self.mask_ratio = mask_ratio
        own, other = channels
        self.adapters = nn.ModuleDict({level: align(own, other) for level in levels})
        self.generators = nn.ModuleDict({level: _generator(other) for level in levels})
        self.requires_grad_(weight > 0)
        self._drawn = (-1, 0)  # iteration, and how many images of it already have their masks

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.MGD``, or the keys of that name of a subclass."""
        common = super().from_config(cfg, student, teacher)
        return {**common, "mask_ratio": cls.keys(cfg)[1].MASK_RATIO}

    def feature_loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """See the class; summed over levels."""
        kept = self._next_masks([student[level] for level in self.levels])
        total = 0.0
        for level, mask in zip(self.levels, kept, strict=True):
            generated = self.generators[level](mask * self.adapters[level](student[level]))
            total = total + mgd_loss(generated, teacher[level])
        return total

    def _next_masks(self, maps: list[Tensor]) -> list[Tensor]:
        """For each of the maps (B, C, H, W) of this step the masks of its images, (B, 1, H, W)."""
        iteration, count = get_event_storage().iter, len(maps[0])
        drawn = self._drawn[1] if self._drawn[0] == iteration else 0
        self._drawn = (iteration, drawn + count)
        first = drawn * comm.get_world_size() + comm.get_rank() * count
        sizes = [tuple(m.shape[-2:]) for m in maps]
        images = [masks(iteration, first + i, sizes, self.mask_ratio) for i in range(count)]
        return [
            torch.stack(level)[:, None].to(m)
            for level, m in zip(zip(*images, strict=True), maps, strict=True)
        ]


def _generator(channels: int) -> nn.Sequential:
    """``G``: a 3x3 conv, ReLU, and a 3x3 conv, of one width."""
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second)
