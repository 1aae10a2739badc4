"""The networks that other libraries build, beside the bottom-up networks of Detectron2 that have the same layers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torchvision
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from era.convert.source import TORCHVISION, Preprocessing
from era.errors import UserError
from era.modeling.backbones.stages import StageBackbone
from era.modeling.backbones.timm_bodies import import_timm, timm_network
from era.modeling.backbones.torchvision_bodies import MOBILENETV2, blocks_of, network_of

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # fmt: skip
# From torchvision's name of a ResNet's layer to Detectron2's.
RESNET_NAMES = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


class Library(ABC):
    """A library's network beside a bottom-up network of the same layers.

    Attributes:
        name: of the network, for people.
        network: as the library builds it, with its classifier, from random weights, in eval mode.
    """

    name: str
    network: nn.Module

    @abstractmethod
    def target_name(self, name: str) -> str:
        """What the bottom-up network calls a tensor of the library's; of one that it does not have any text."""

    @abstractmethod
    def maps(self, image: Tensor) -> list[Tensor]:
        """All that the library's own forward makes on the way, (B, C, H, W), in order."""

    def stage_maps(self, image: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The last map of each of these shapes, by name.

        Raises:
            UserError: there is none of that shape.
        """
        maps = {tuple(m.shape): m for m in self.maps(image)}
        for name, shape in shapes.items():
            if shape not in maps:
                raise UserError(
                    f"{self.name} makes no map of shape {shape}, as {name} is: the converted backbone is another network; "
                    "give the config of this one."
                )
        return {name: maps[shape] for name, shape in shapes.items()}


class TorchvisionResNet(Library):
    """A ResNet or ResNeXt as torchvision has it, for Detectron2's own: timm's and mmdetection's have the same names."""

    def __init__(self, cfg: CfgNode, *, stride_in_1x1: bool):
        keys = cfg.MODEL.RESNETS
        basic = keys.DEPTH in (18, 34)
        # torchvision counts the width of a group at 64 channels, whatever the depth
        self.network = torchvision.models.ResNet(
            BasicBlock if basic else Bottleneck,
            BLOCKS[keys.DEPTH],
            groups=keys.NUM_GROUPS,
            width_per_group=64 if basic else keys.WIDTH_PER_GROUP,
        ).eval()
        self.name = f"a ResNet-{keys.DEPTH} of torchvision's layers"
        if stride_in_1x1:
            for block in self.network.modules():
                if isinstance(block, Bottleneck) and block.conv2.stride == (2, 2):
                    block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)

    def target_name(self, name: str) -> str:
        """By :data:`RESNET_NAMES`."""
        for pattern, replacement in RESNET_NAMES:
            name = re.sub(pattern, replacement, name)
        return name

    def maps(self, image: Tensor) -> list[Tensor]:
        """Outputs of all blocks."""
        return outputs_of(self.network, image)


class TorchvisionNetwork(Library):
    """A network of torchvision, for a :class:`~era.modeling.backbones.stages.StageBackbone` made of it."""

    def __init__(self, name: str):
        self.network = network_of(name, key="MODEL.TORCHVISION.NAME").eval()
        self.name = f"torchvision's {name}"

    def target_name(self, name: str) -> str:
        """The same."""
        return f"body.{name}"

    def maps(self, image: Tensor) -> list[Tensor]:
        """Outputs of all blocks."""
        return outputs_of(self.network, image)


class TimmNetwork(Library):
    """A network of timm, for a :class:`~era.modeling.backbones.stages.StageBackbone` made of it."""

    def __init__(self, name: str, body: nn.Module):
        self.network = timm_network(name, key="MODEL.TIMM.NAME").eval()
        self.name = f"timm's {name}"
        # timm joins names of layers with _ where it takes its maps; both forms become one
        self._names = {_joined(key): f"body.{key}" for key in body.state_dict()}

    def target_name(self, name: str) -> str:
        """As timm calls it where it takes its maps."""
        return self._names.get(_joined(name), name)

    def maps(self, image: Tensor) -> list[Tensor]:
        """What timm's own ``forward_intermediates`` gives.

        Raises:
            UserError: the network has no such method.
        """
        if not hasattr(self.network, "forward_intermediates"):
            raise UserError(
                f"{self.name} cannot be checked, for it does not say what it makes on the way: choose another network."
            )
        return self.network.forward_intermediates(image, intermediates_only=True)


def is_of_timm(cfg: CfgNode) -> bool:
    """Whether a config's backbone is a network of timm."""
    return "_timm_" in cfg.MODEL.BACKBONE.NAME


def is_of_torchvision(cfg: CfgNode) -> bool:
    """Whether a config's backbone is a network of torchvision by name."""
    return "_torchvision_" in cfg.MODEL.BACKBONE.NAME


def torchvision_preprocessing(name: str) -> Preprocessing:
    """Mean and deviation of a network's first pretrained weights as torchvision knows them: ImageNet's for nearly all.

    Args:
        name: of the network; also one that does not exist.
    """
    try:
        known = next(iter(torchvision.models.get_model_weights(name))).transforms()
    except (ValueError, StopIteration):
        return TORCHVISION
    return _rgb(known.mean, known.std)


def timm_preprocessing(name: str) -> Preprocessing:
    """Mean and deviation of a network's pretrained weights as timm knows them; all of timm's are RGB. torchvision's for one
    that it does not know.

    Args:
        name: of the network; also one that does not exist.

    Raises:
        UserError: timm is not installed.
    """
    known = import_timm().get_pretrained_cfg(name)
    if known is None:
        return TORCHVISION
    return _rgb(known.mean, known.std)


def _rgb(mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    mean, std = (tuple(round(255 * v, 3) for v in values) for values in (mean, std))
    return Preprocessing("RGB", mean, std)


def library_of(cfg: CfgNode, bottom_up: nn.Module, *, stride_in_1x1: bool) -> Library:
    """The library's network that a config's bottom-up network has the layers of.

    Args:
        stride_in_1x1: of the checkpoint's bottlenecks.

    Raises:
        UserError: no library's network is known to have them.
    """
    keys, name = cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.NAME
    if isinstance(bottom_up, StageBackbone):
        if is_of_timm(cfg):
            return TimmNetwork(cfg.MODEL.TIMM.NAME, bottom_up.body)
        is_own = "_mobilenetv2_" in name
        return TorchvisionNetwork(MOBILENETV2 if is_own else cfg.MODEL.TORCHVISION.NAME)
    plain = not any(keys.DEFORM_ON_PER_STAGE) and keys.RES5_DILATION == 1
    if isinstance(bottom_up, ResNet) and "_small_" not in name and plain:
        return TorchvisionResNet(cfg, stride_in_1x1=stride_in_1x1)
    raise UserError(
        f"MODEL.BACKBONE.NAME is {name!r}: expected a ResNet of Detectron2's own builder without deformable or dilated convs, "
        "or a backbone of torchvision or timm; weights of other libraries fit those."
    )


def outputs_of(network: nn.Module, image: Tensor) -> list[Tensor]:
    """The maps that the blocks of a network of torchvision give in its own forward."""
    maps: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _args, out: maps.append(out.clone()))
        for block in blocks_of(network)
    ]
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    return [m for m in maps if isinstance(m, Tensor) and m.dim() == 4]


def _joined(name: str) -> str:
    return name.replace(".", "_")
