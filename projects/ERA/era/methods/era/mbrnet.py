"""The Multi-Branched Residual Network (MBRNet) on FPN features.

The student's map ``F_S`` is brought to the teacher's ``F_T`` in N + 1 steps: ``e_0 = A(F_S)`` and
``e_i = e_{i-1} + d_i`` with ``d_i = U_i(B_i(x_i))``. The official code does this on pooled vectors with
linear layers (``GAP_net_multi_parallel.py``); here the layers are convolutions, shared by the FPN levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from era.methods.shared import norm_layer

# Standard deviation of the initial weights of a conv before a norm (the official code's N(0, 0.01), whose
# scale the norm undoes) and of a branch's last conv. Hidden convs without norm start at Kaiming's scale:
# two layers of 0.01 in a row pass on so little gradient that the branch never starts to learn.
INIT_STD = 0.01


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm: str,
    momentum: float = 0.01,
    *,
    bias: bool = True,
) -> list[nn.Module]:
    """A conv of stride 1 that keeps height and width, then its norm.

    Args:
        norm: ``none`` or a name of :func:`norm_layer`.
        momentum: of BN and SyncBN.
        bias: whether a conv without norm has one.

    Raises:
        ValueError: an unknown norm.
    """
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=bias and norm == "none",
    )
    if norm == "none" and bias:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    else:
        nn.init.normal_(conv.weight, std=INIT_STD)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return [conv] if norm == "none" else [conv, norm_layer(norm, out_channels, momentum)]


class Branch(nn.Sequential):
    """One residual branch ``B_i``: ``num_blocks`` conv-norm blocks, a ReLU between two of them.

    Maps (B, ``channels``, H, W) to the same shape; the last block has no activation, because a residual
    has both signs. Without norms the last conv has no bias (a hidden unit can serve as one), so that the
    branch ends in a purely linear map, which can be exchanged with pooling.

    Args:
        context_kernel: kernel size of the first conv, the branch's view of its surroundings; 0 = ``kernel_size``.
        zero_start: the last layer starts at 0, so that ``B_i`` gives 0 at first (zero-gain start, Goyal et al. 2017,
            section 5.1). That layer still has a gradient, and with its first step the layers before it get one.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_blocks: int,
        kernel_size: int,
        hidden_channels: int,
        norm: str,
        norm_momentum: float,
        context_kernel: int = 0,
        zero_start: bool = False,
    ):
        widths = [channels] + [hidden_channels] * (num_blocks - 1) + [channels]
        layers: list[nn.Module] = []
        for block in range(num_blocks):
            if block > 0:
                layers.append(nn.ReLU())
            is_last = block == num_blocks - 1
            size = context_kernel or kernel_size if block == 0 else kernel_size
            layers += conv_norm(
                widths[block], widths[block + 1], size, norm, norm_momentum, bias=not is_last
            )
        if zero_start:
            nn.init.zeros_(layers[-1].weight)  # of the last conv, or the gain of the norm after it
        super().__init__(*layers)


class MBRNet(nn.Module):
    """N branches and their up-projections: ``d_i = U_i(B_i(x_i))`` from one level's ``F_S``.

    ``x_i = F_S`` (parallel) or ``x_i = F_S + sum_{j<i} B_j(x_j)`` (accumulated inputs, the official
    ``GAP_net_accuX``, in the student's width, not detached).

    Args:
        in_channels: channels of ``F_S``.
        out_channels: channels of ``F_T``; where they equal ``in_channels`` there is no ``U``.
        num_branches: N; 0 is allowed and gives no residual.
        num_blocks, kernel_size, norm, norm_momentum, context_kernel, zero_start: of each branch, see
            :class:`Branch`.
        hidden_channels: width inside a branch; 0 = ``in_channels``.
        accumulated_inputs: the switch above.
        shared_up_projection: one ``U`` for all branches instead of one each.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        num_branches: int = 4,
        num_blocks: int = 2,
        kernel_size: int = 1,
        hidden_channels: int = 0,
        norm: str = "BN",
        norm_momentum: float = 0.01,
        context_kernel: int = 0,
        zero_start: bool = False,
        accumulated_inputs: bool = True,
        shared_up_projection: bool = False,
    ):
        super().__init__()
        self.accumulated_inputs = accumulated_inputs
        self.branches = nn.ModuleList(
            Branch(
                in_channels,
                num_blocks=num_blocks,
                kernel_size=kernel_size,
                hidden_channels=hidden_channels or in_channels,
                norm=norm,
                norm_momentum=norm_momentum,
                context_kernel=context_kernel,
                zero_start=zero_start,
            )
            for _ in range(num_branches)
        )
        num_projections = 0
        if in_channels != out_channels and num_branches > 0:
            num_projections = 1 if shared_up_projection else num_branches
        self.up_projections = nn.ModuleList(
            nn.Conv2d(
                in_channels, out_channels, 1, bias=False
            )  # torch's own init, as the official U
            for _ in range(num_projections)
        )

    def forward(self, features: Tensor) -> list[Tensor]:
        """The residual estimates of one level.

        Args:
            features: ``F_S``, shape (B, in_channels, H, W).

        Returns:
            ``[d_1, ..., d_N]``, each (B, out_channels, H, W).
        """
        residuals = []
        branch_input = features
        for i, branch in enumerate(self.branches):
            output = branch(branch_input)
            if self.accumulated_inputs:
                branch_input = branch_input + output
            residuals.append(self.up_projected(i, output))
        return residuals

    def up_projected(self, i: int, output: Tensor) -> Tensor:
        """``U_i`` of what branch ``i`` (from 0) gives."""
        if len(self.up_projections) == 0:
            return output
        return self.up_projections[i % len(self.up_projections)](output)


@dataclass
class Estimates:
    """The student's estimates of the teacher's FPN maps, per level.

    Attributes:
        zeroth: ``e_0``, level name to (B, C_T, H, W).
        residuals: ``[d_1, ..., d_N]``, each a dict like ``zeroth``.
    """

    zeroth: dict[str, Tensor]
    residuals: list[dict[str, Tensor]]

    def cumulative(self) -> list[dict[str, Tensor]]:
        """``[e_0, e_1, ..., e_N]``, each a dict level name to (B, C_T, H, W)."""
        estimates = [self.zeroth]
        for residual in self.residuals:
            estimates.append({level: e + residual[level] for level, e in estimates[-1].items()})
        return estimates


def projection_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """ERA's ``P``, a 1x1 conv: the identity at first where the channels agree, else as torch starts it."""
    conv = nn.Conv2d(in_channels, out_channels, 1)
    if in_channels == out_channels:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    return conv


class FeatureEstimator(nn.Module):
    """Adapter ``A`` and MBRNet: from the student's FPN maps to estimates of the teacher's.

    Args:
        levels: names of the FPN levels that are estimated; others are ignored.
        in_channels, out_channels: channels of the student's and the teacher's maps. The adapter is the
            identity where they agree, else a 1x1 conv in torch's own initialisation (the official
            code's choice for its projection P).
        mbrnet: maps one level's ``F_S`` to its residuals.
        always_project: a 1x1 conv where they agree too, which starts as the identity (:func:`projection_conv`).
    """

    def __init__(
        self,
        *,
        levels: list[str],
        in_channels: int,
        out_channels: int,
        mbrnet: MBRNet,
        always_project: bool = False,
    ):
        super().__init__()
        self.levels = list(levels)
        learned = always_project or in_channels != out_channels
        self.adapter = projection_conv(in_channels, out_channels) if learned else nn.Identity()
        self.mbrnet = mbrnet

    def freeze_unless(self, *, adapter: bool, mbrnet: bool) -> None:
        """Freeze what no loss reads: DDP would wait for its gradient, weight decay would move it.

        Args:
            adapter, mbrnet: whether one does.
        """
        self.adapter.requires_grad_(adapter)
        self.mbrnet.requires_grad_(mbrnet)

    def forward(self, features: Mapping[str, Tensor]) -> Estimates:
        """Estimates at every level of ``self.levels``.

        Args:
            features: the student's FPN maps, level name to (B, in_channels, H, W).
        """
        zeroth = {level: self.adapter(features[level]) for level in self.levels}
        by_level = {level: self.mbrnet(features[level]) for level in self.levels}
        residuals = [
            {level: by_level[level][i] for level in self.levels}
            for i in range(len(self.mbrnet.branches))
        ]
        return Estimates(zeroth, residuals)

    def final(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``e_N`` at every level, for inference with the teacher's heads."""
        estimates = {}
        for level in self.levels:
            estimates[level] = self.adapter(features[level])
            for residual in self.mbrnet(features[level]):
                estimates[level] = estimates[level] + residual
        return estimates
