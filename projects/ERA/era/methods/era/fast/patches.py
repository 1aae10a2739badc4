"""3x3 patches at chosen positions of feature maps; torch alone."""

from __future__ import annotations

import torch
from torch import Tensor


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
