"""Classification networks of torchvision as backbones; MobileNetV2 among them under a name of its own."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from torch import Tensor, nn

from era.errors import UserError
from era.modeling.backbones.pyramid import register_pyramids
from era.modeling.backbones.stages import (
    PROBE_SIZE,
    STAGES,
    StageBackbone,
    probe,
    stage_backbone,
    unusable,
)

MOBILENETV2 = "mobilenet_v2"


def add_config(cfg: CfgNode) -> None:
    """Add ``MODEL.TORCHVISION``, in place."""
    cfg.MODEL.TORCHVISION = CfgNode()
    # Name of a classification network of torchvision, such as mobilenet_v3_large, for build_torchvision_fpn_backbone and
    # its forms for RetinaNet and FCOS. Norm, frozen stages and maps by the keys of Detectron2's ResNet.
    cfg.MODEL.TORCHVISION.NAME = ""


def build_torchvision_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> StageBackbone:
    """The torchvision network of ``MODEL.TORCHVISION.NAME``, from random weights, its maps named res2..res5.

    The map at a stride is what the last block with that stride gives; a last 1x1 conv, which widens for the classifier,
    is left out. Weights have torchvision's names.

    Raises:
        UserError: a name that torchvision does not have, or a network that is no chain of blocks with such maps.
    """
    return _backbone(cfg, input_shape, cfg.MODEL.TORCHVISION.NAME, "MODEL.TORCHVISION.NAME")


def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> StageBackbone:
    """MobileNetV2 (arXiv 1801.04381) as torchvision has it: res2..res5 with 24, 32, 96 and 320 channels; only keys of stock
    Detectron2 are read.

    Raises:
        UserError: as :func:`build_torchvision_backbone`.
    """
    return _backbone(cfg, input_shape, MOBILENETV2, "MODEL.BACKBONE.NAME")


register_pyramids("torchvision", build_torchvision_backbone, add_config=add_config)
register_pyramids("mobilenetv2", build_mobilenetv2_backbone)


class Chain(nn.Module):
    """The blocks of a network, one after the other, up to the last that is looked at; names of weights stay.

    Args:
        network: a classification network that applies :func:`blocks_of` in order, see :func:`strides_of`.
        taps: indices of the blocks whose outputs are given.
    """

    def __init__(self, network: nn.Module, taps: Sequence[int]):
        super().__init__()
        self.taps = tuple(taps)
        left = max(taps) + 1
        for name, child in network.named_children():
            if not left:
                break
            if isinstance(child, nn.Sequential):
                child = nn.Sequential(OrderedDict(list(child.named_children())[:left]))
                left -= len(child)
            else:
                left -= 1
            self.add_module(name, child)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Outputs of the tapped blocks."""
        maps = []
        for index, block in enumerate(blocks_of(self)):
            image = block(image)
            if index in self.taps:
                maps.append(image)
        return maps


def network_of(name: str, *, key: str) -> nn.Module:
    """A classification network of torchvision by name, from random weights.

    Raises:
        UserError: torchvision has none of that name.
    """
    check_torchvision_name(name, key=key)
    return torchvision.models.get_model(name, weights=None)


def check_torchvision_name(name: str, *, key: str) -> None:
    """torchvision has a classification network of this name.

    Args:
        key: what the name was given by, for the message.

    Raises:
        UserError: it has none.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UserError(
            f"{key} is {name!r}: expected a classification network of torchvision"
            f"{', such as ' * bool(near)}{', '.join(near)}; correct the name."
        )


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The children of a network, and in the place of an ``nn.Sequential`` what is in it."""
    blocks: list[nn.Module] = []
    for child in network.children():
        blocks += child if isinstance(child, nn.Sequential) else [child]
    return blocks


def strides_of(network: nn.Module) -> list[tuple[int, int]]:
    """Channels and stride of the output of each of the first blocks, as long as a block takes just what the one before
    gives and makes maps of it.

    Found by watching the network's own forward, so that nothing between two blocks is overlooked.
    """
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
        for block in blocks_of(network)
    ]
    try:
        with torch.no_grad():
            probe(network)
    finally:
        for handle in handles:
            handle.remove()
    found, previous = [], None
    for block, (module, given, made) in zip(blocks_of(network), seen, strict=False):
        is_next = module is block and (previous is None or given is previous)
        if not is_next or not isinstance(made, Tensor) or made.dim() != 4:
            break
        height, width = made.shape[-2:]
        if height != width or not 0 < width <= PROBE_SIZE or PROBE_SIZE % width:
            break
        found.append((made.shape[1], PROBE_SIZE // width))
        previous = made
    return found


def taps_of(network: nn.Module, strides: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Index of the last block by the stride of its output, for the strides of :data:`STAGES`.

    Args:
        strides: :func:`strides_of` the network.
    """
    blocks = blocks_of(network)
    indices = {stride: index for index, (_, stride) in enumerate(strides) if stride in STAGES}
    last = indices.get(32)
    if last and _only_widens(blocks[last]) and strides[last - 1][1] == 32:
        indices[32] = last - 1
    return indices


def freeze_norm(module: nn.Module) -> nn.Module:
    """Detectron2's frozen batch norm for every batch norm of a module, or for a batch norm itself."""
    return FrozenBatchNorm2d.convert_frozen_batchnorm(module)


def _only_widens(block: nn.Module) -> bool:
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    return len(convs) == 1 and convs[0].kernel_size == (1, 1)


def _backbone(cfg: CfgNode, input_shape: ShapeSpec, name: str, key: str) -> StageBackbone:
    network = network_of(name, key=key)
    what = f"torchvision's {name}"
    try:
        strides = strides_of(network)
    except Exception as e:  # a network of anything can fail in any way
        raise unusable(what, e) from e
    taps = taps_of(network, strides)
    if not taps:
        raise unusable(what, "its blocks are no chain that makes maps")
    body = Chain(network, sorted(taps.values()))
    shapes = [strides[index] for index in body.taps]
    return stage_backbone(
        cfg,
        body,
        shapes,
        name=what,
        freeze_norm=freeze_norm,
        sync_norm=nn.SyncBatchNorm.convert_sync_batchnorm,
    )
