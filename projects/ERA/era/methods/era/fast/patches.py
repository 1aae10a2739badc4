"""3x3 convs at chosen positions of feature maps, and of estimates in factors; torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from era.methods.era.fast.factored import FactoredEstimates

Places = tuple[Tensor, Tensor, Tensor]  # image, y and x, (P,) long each


def gather_patches(feature_map: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """3x3 patches around positions, zero outside the map, as a conv with padding 1 sees them.

    Args:
        feature_map: (B, C, H, W).
        image, y, x: (P,) long each.

    Returns:
        (P, 9, C), rows first.
    """
    height, width = feature_map.shape[-2:]
    offset = torch.arange(-1, 2, device=y.device)
    ys = (y[:, None] + offset).repeat_interleave(3, dim=1)  # (P, 9)
    xs = (x[:, None] + offset).repeat(1, 3)
    inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
    position = ys.clamp(0, height - 1) * width + xs.clamp(0, width - 1)
    patches = _Columns.apply(feature_map.flatten(2), image[:, None].expand_as(position), position)
    return patches * inside[..., None].to(patches.dtype)


def conv_at(
    convs: Sequence[nn.Conv2d],
    estimates: FactoredEstimates,
    levels: Sequence[str],
    positions: Sequence[Places],
) -> list[Tensor]:
    """3x3 convs with padding 1 of every estimate, at chosen positions alone.

    Args:
        convs: one or more that read the same maps; their patches are gathered once.
        positions: by level.

    Returns:
        By conv (N + 1, P, C), the positions of the levels one after the other.
    """
    count = estimates.num_branches
    zeroth, factors = [], []
    for level, where in zip(levels, positions, strict=True):
        zeroth.append(gather_patches(estimates.zeroth[level], *where))
        if count > 0:
            factors.append(gather_patches(estimates.factors[level], *where))
    kernel = torch.cat([conv.weight for conv in convs]).permute(0, 2, 3, 1)  # (out, 3, 3, in)
    bias = torch.cat([conv.bias for conv in convs])
    found = F.linear(torch.cat(zeroth).flatten(1), kernel.flatten(1), bias)[None]
    if count > 0:
        patches = torch.cat(factors).unflatten(2, (count, -1))  # (P, 9, N, h)
        patches = patches.permute(2, 0, 1, 3).flatten(2)  # (N, P, 9 * h)
        if estimates.projection is None:
            increments = F.linear(patches, kernel.flatten(1))
        else:
            own = (kernel @ estimates.projection).unflatten(3, (count, -1))
            increments = torch.bmm(patches, own.permute(3, 1, 2, 4, 0).flatten(1, 3))
        found = torch.cat([found, increments]).cumsum(0)
    return list(found.split([conv.out_channels for conv in convs], dim=2))


def is_plain_conv(conv: object) -> bool:
    """A 3x3 conv with padding 1, stride 1 and a bias, and no norm of its own."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (1, 1)
        and conv.groups == 1
        and conv.bias is not None
        and getattr(conv, "norm", None) is None
    )


class _Columns(torch.autograd.Function):
    """Columns of maps (B, C, H * W): (..., C) from the image and position of each, both (...).

    The gradient has the layout of the maps, so that it adds up quickly with that of other readers.
    """

    @staticmethod
    def forward(ctx, maps, image, position):
        ctx.save_for_backward(image, position)
        ctx.shape = maps.shape
        return maps[image, :, position]

    @staticmethod
    def backward(ctx, upstream):
        image, position = ctx.saved_tensors
        _, channels, size = ctx.shape
        start = image * (channels * size) + position
        index = start[..., None] + size * torch.arange(channels, device=start.device)
        maps = upstream.new_zeros(ctx.shape)
        maps.view(-1).scatter_add_(0, index.flatten(), upstream.flatten())
        return maps, None, None
