"""ReviewKD: each of the teacher's feature maps, from the student's of that level and of all coarser ones.

Chen et al., "Distilling Knowledge via Knowledge Review", arXiv 2104.09044; form, start and weight as in the detection
code of dvlab-research/ReviewKD and mdistiller (``detection/model/reviewkd.py``).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from era.errors import UserError
from era.losses import at_least_float32, mse
from era.methods.feature_method import FeatureMethod
from era.methods.shared import NORMS, norm_layer
from era.modeling.detectors import Detector
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

GRIDS = (4, 2, 1)  # sides of the average-pooled grids of the HCL


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of one level: the MSE of the maps (weight 1) and of them average-pooled to 4x4 (1/2),
    2x2 and 1x1 (each half of the one before), over the sum of the weights used.

    A grid whose side is not below the map's height is left out, and takes no weight.

    Args:
        student: (B, C, H, W), with gradient.
        teacher: same shape, a constant.

    Returns:
        Scalar >= 0, float32 or wider.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher).detach()
    loss, weight, total = mse(student, teacher), 1.0, 1.0
    for side in GRIDS:
        if side < student.shape[-2]:
            weight /= 2
            total += weight
            pooled = (F.adaptive_avg_pool2d(maps, side) for maps in (student, teacher))
            loss = loss + weight * mse(*pooled)
    return loss / total


class ABF(nn.Module):
    """Attention-based fusion of a level with what came from the coarser one.

    ``x = norm(conv1x1(F_S))``; with ``y``, the coarser level's ``x`` enlarged to this size (nearest), and gates
    ``(g_1, g_2) = sigmoid(conv1x1([x; y]))`` at each position: ``x <- g_1 x + g_2 y``. The estimate of the teacher's
    map is ``norm(conv3x3(x))``.

    Args:
        in_channels: of the student's map.
        mid_channels: of x.
        out_channels: of the teacher's map.
        fuses: whether there is a coarser level.
        norm: a name of :func:`~era.methods.shared.norm_layer`.
    """

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, *, fuses: bool, norm: str
    ):
        super().__init__()
        enter = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        leave = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        for conv in (enter, leave):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        self.enter = nn.Sequential(enter, norm_layer(norm, mid_channels))
        self.gates = nn.Conv2d(2 * mid_channels, 2, 1) if fuses else None
        self.leave = nn.Sequential(leave, norm_layer(norm, out_channels))

    def forward(self, own: Tensor, coarser: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The estimate (B, C_out, H, W), and x (B, C_mid, H, W) for the next finer level."""
        x = self.enter(own)
        if self.gates is not None:
            y = F.interpolate(coarser, x.shape[-2:], mode="nearest")
            gates = self.gates(torch.cat([x, y], dim=1)).sigmoid()
            x = gates[:, :1] * x + gates[:, 1:] * y
        return self.leave(x), x


@METHOD_REGISTRY.register()
class ReviewKD(FeatureMethod):
    """``loss_reviewkd_feature = w sum_l hcl_loss(E_l, F_T^l)``, ``E_l`` the estimates of an :class:`ABF` at each level,
    from the coarsest on.

    As published the ABFs have BatchNorm, which normalises by each process's own part of a batch, once more by itself for
    a part without labels. So with ``NORM`` BN two processes of one image each do NOT take the step that one process of
    two takes; their weights stay equal to each other, because gradients are averaged. With GN the two are the same
    step, and with SyncBN too, which PyTorch has for several GPUs alone. Running statistics are kept and never used: no
    ABF is there at inference.

    Args:
        levels: FPN levels, from fine to coarse.
        weight: w.
        channels: of the student's and of the teacher's maps.
        mid_channels: width of the ABFs.
        norm: of the ABFs.
    """

    idea = "estimate each of the teacher's FPN maps from the student's of all coarser levels"
    paper = "ReviewKD, arXiv 2104.09044"
    loss_labels: ClassVar = {"loss_reviewkd_feature": "ReviewKD: HCL of the fused FPN maps"}

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.REVIEWKD``."""
        cfg.MODEL.REVIEWKD = CfgNode()
        # FPN levels that are compared, in any order; their losses are summed. The source has p6 too.
        cfg.MODEL.REVIEWKD.LEVELS = ["p2", "p3", "p4", "p5", "p6"]
        # w; the source's for R50 from R101 (R18 from R101: 1.2, MV2 from R50: 2.0); 0 switches the loss off
        cfg.MODEL.REVIEWKD.WEIGHT = 1.0
        cfg.MODEL.REVIEWKD.MID_CHANNELS = (
            256  # width in which levels are fused; the source's, the FPN's own
        )
        # After both convs of a fusion: BN (the source's: statistics of a process's own images), SyncBN (of all
        # processes', on GPUs) or GN (of none).
        cfg.MODEL.REVIEWKD.NORM = "BN"

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """And a width and a norm."""
        super().check_config(cfg)
        keys = cfg.MODEL.REVIEWKD
        if keys.MID_CHANNELS < 1:
            raise UserError(
                f"MODEL.REVIEWKD.MID_CHANNELS is {keys.MID_CHANNELS}: expected at least 1 channel."
            )
        if keys.NORM not in NORMS:
            raise UserError(
                f"MODEL.REVIEWKD.NORM is {keys.NORM!r}: expected one of {', '.join(NORMS)}."
            )

    @configurable
    def __init__(
        self,
        *,
        levels: list[str],
        weight: float,
        channels: tuple[int, int],
        mid_channels: int,
        norm: str,
    ):
        super().__init__(levels=levels, weight=weight)
        self.norm = norm
        own, other = channels
        self.fusions = nn.ModuleDict(
            {
                level: ABF(own, mid_channels, other, fuses=level != levels[-1], norm=norm)
                for level in levels
            }
        )
        self.requires_grad_(weight > 0)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.REVIEWKD``."""
        common, keys = super().from_config(cfg, student, teacher), cfg.MODEL.REVIEWKD
        shapes = student.feature_shapes
        common["levels"].sort(key=lambda level: shapes[level].stride)
        return {**common, "mid_channels": keys.MID_CHANNELS, "norm": keys.NORM}

    def feature_loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """See the class.

        Raises:
            UserError: statistics over a single position.
        """
        total, coarser = 0.0, None
        for level in reversed(self.levels):
            self._check_positions(level, student[level])
            estimate, coarser = self.fusions[level](student[level], coarser)
            total = total + hcl_loss(estimate, teacher[level])
        return total

    def _check_positions(self, level: str, maps: Tensor) -> None:
        images, _, height, width = maps.shape
        processes = comm.get_world_size() if self.norm == "SyncBN" else 1
        if self.norm != "GN" and images * height * width * processes == 1:
            raise UserError(
                f"MODEL.REVIEWKD.NORM is {self.norm}, and {level} of a batch has a single position, which has no "
                "variance: set it to GN, leave the level out of MODEL.REVIEWKD.LEVELS, or train on more or larger images."
            )
