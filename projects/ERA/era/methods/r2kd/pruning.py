"""The second teacher: the first one without its smallest weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def prune_smallest(model: nn.Module, amount: float) -> None:
    """Set the weights of smallest size of every convolution and fully connected layer to 0, in place, once.

    As the official ``unstructured_pruning``: layer by layer, no biases, nothing of norms, no transposed convolutions.

    Args:
        amount: part of each layer's weights, 0 to 1.
    """
    for layer in _layers(model):
        sizes = (
            layer.weight.detach().contiguous()
        )  # torch cannot choose among weights in channels-last order
        prune.l1_unstructured(layer, "weight", amount=amount, importance_scores=sizes)
        prune.remove(layer, "weight")  # the zeros stay in an ordinary weight


def keep_zeros(model: nn.Module) -> None:
    """Weights of these layers that are 0 stay 0 in training: they get no gradient, and so neither momentum nor decay."""
    for layer in _layers(model):
        weight = layer.weight

        def without_zeros(gradient: Tensor, weight: Tensor = weight) -> Tensor:
            return gradient.masked_fill(weight.detach() == 0, 0)

        weight.register_hook(without_zeros)


@torch.no_grad()
def zeros(model: nn.Module) -> float:
    """Which part of the weights of these layers is 0."""
    weights = [layer.weight for layer in _layers(model)]
    return sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
