"""The hidden maps of branches that begin with a 1x1 conv, a ReLU and end with a 1x1 conv; torch alone.

Branch i computes ``h_i = relu(W_i x_i + b_i)``. With accumulated inputs ``x_i = F_S + sum_{j<i} V_j h_j``
the wide ``x_i`` is never made, because ``W_i x_i = W_i F_S + sum_{j<i} (W_i V_j) h_j`` with small matrices
``M_ij = W_i V_j``. All branches live in one buffer, forward and backward, and what plain autograd would
copy, stack and keep between them is not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def hidden_maps(
    features: Tensor, weight: Tensor, bias: Tensor, mixing: Tensor | None, count: int
) -> Tensor:
    """``h_1..h_N`` side by side.

    Args:
        features: ``F_S``, (B, C, H, W).
        weight: ``W_1..W_N`` below each other, (N * h, C).
        bias: ``b_1..b_N``, (N * h,).
        mixing: ``M``, (N * h, N * h); only blocks below the diagonal are read. None for parallel branches.
        count: N.

    Returns:
        (B, N * h, H, W), in autocast's type where that is on.
    """
    device = features.device.type
    inputs = [features.flatten(2), weight, bias, mixing]
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inputs = [x if x is None else x.to(dtype) for x in inputs]
    return _HiddenMaps.apply(*inputs, count).unflatten(2, features.shape[2:])


class _HiddenMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, mixing, count):
        ctx.count = count
        batch, width = features.shape[0], weight.shape[0] // count
        with torch.autocast(features.device.type, enabled=False):
            hidden = torch.baddbmm(bias[:, None], weight.expand(batch, -1, -1), features)
            for i in range(count):
                own = hidden[:, i * width : (i + 1) * width]
                if mixing is not None and i > 0:
                    rows = mixing[i * width : (i + 1) * width, : i * width]
                    own.baddbmm_(rows.expand(batch, -1, -1), hidden[:, : i * width])
                F.relu_(own)
        ctx.save_for_backward(features, weight, mixing, hidden)
        return hidden

    @staticmethod
    def backward(ctx, upstream):
        features, weight, mixing, hidden = ctx.saved_tensors
        count, batch = ctx.count, features.shape[0]
        width = weight.shape[0] // count
        with torch.autocast(features.device.type, enabled=False):
            gradient = torch.empty_like(hidden)  # of what goes into the ReLUs
            to_mixing = None if mixing is None else torch.zeros_like(mixing)
            for i in reversed(range(count)):
                start, end = i * width, (i + 1) * width
                own, arrived = gradient[:, start:end], upstream[:, start:end]
                if mixing is not None and i < count - 1:  # later branches read h_i
                    columns = mixing[end:, start:end].T.expand(batch, -1, -1)
                    arrived = torch.baddbmm(arrived, columns, gradient[:, end:])
                torch.mul(arrived, hidden[:, start:end] > 0, out=own)
                if mixing is not None and i > 0:
                    products = torch.bmm(own, hidden[:, :start].transpose(1, 2))
                    to_mixing[start:end, :start] = products.sum(0)
            to_features = to_weight = to_bias = None
            if ctx.needs_input_grad[0]:
                to_features = torch.bmm(weight.T.expand(batch, -1, -1), gradient)
            if ctx.needs_input_grad[1]:
                to_weight = torch.bmm(gradient, features.transpose(1, 2)).sum(0)
            if ctx.needs_input_grad[2]:
                to_bias = gradient.sum((0, 2))
        return to_features, to_weight, to_bias, to_mixing, None
