"""Networks of other libraries as bottom-up networks of Detectron2: their maps at strides 4, 8, 16 and 32 are res2..res5."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from era.errors import UserError
from era.modeling.backbones.pyramid import out_features

STAGES = {2: "stem", 4: "res2", 8: "res3", 16: "res4", 32: "res5"}  # name of the map by its stride
NORMS = ("BN", "FrozenBN", "SyncBN")
PROBE_SIZE = 64  # pixels of the zeros that a network is tried with


class StageBackbone(Backbone):
    """A network whose maps have the names that Detectron2's ResNet gives to its own.

    Args:
        body: image (B, C, H, W) to a list of maps (B, C_k, H / s_k, W / s_k) for H and W divisible by all strides s_k.
        shapes: channels and stride of each map, in the order of the list, by the names of :data:`STAGES`.
        out_features: names of the maps that are given.

    Attributes:
        body: as above. What none of ``out_features`` is computed from is frozen.
    """

    def __init__(self, body: nn.Module, shapes: dict[str, ShapeSpec], out_features: Sequence[str]):
        super().__init__()
        self.body = body
        self._shapes = dict(shapes)
        self._out_features = list(out_features)
        self._needs_gradient(parameters_of(self, self._out_features))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Maps by name."""
        maps = dict(zip(self._shapes, self.body(image), strict=True))
        return {name: maps[name] for name in self._out_features}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map that is given."""
        return {name: self._shapes[name] for name in self._out_features}

    def freeze(self, stages: int, freeze_norm: Callable[[nn.Module], nn.Module]) -> None:
        """Freeze the first stages as Detectron2's ResNet does: 0 none, 1 all that the map of stride 2 is computed from (the
        stem), 2 that of stride 4 (res2) as well, and so on to 5.

        Args:
            freeze_norm: a batch norm to one whose statistics and weights are fixed.

        Raises:
            UserError: the network has no map of that stride.
        """
        if not stages:
            return
        name = STAGES.get(2**stages, "")
        if name not in self._shapes:
            possible = [0, *(k for k in range(1, 6) if STAGES[2**k] in self._shapes)]
            raise UserError(
                f"MODEL.BACKBONE.FREEZE_AT is {stages}: the network has no map of stride {2**stages} up to which it could "
                f"be frozen; expected one of {possible}, set it so."
            )
        frozen = {id(p) for p in parameters_of(self, [name])}
        self._needs_gradient([p for p in self.parameters() if id(p) not in frozen])
        replace_norms(self, lambda norm: freeze_norm(norm) if id(norm.weight) in frozen else norm)

    def _needs_gradient(self, parameters: Sequence[nn.Parameter]) -> None:
        kept = {id(p) for p in parameters if p.requires_grad}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in kept)


def stage_backbone(
    cfg: CfgNode,
    body: nn.Module,
    channels_and_strides: Sequence[tuple[int, int]],
    *,
    name: str,
    freeze_norm: Callable[[nn.Module], nn.Module],
    sync_norm: Callable[[nn.Module], nn.Module],
) -> StageBackbone:
    """A bottom-up network by config: ``MODEL.RESNETS.NORM`` is BN (as the network has it), FrozenBN or SyncBN, its layers
    of other kinds stay; ``MODEL.RESNETS.OUT_FEATURES``, ``MODEL.FPN.IN_FEATURES`` and ``MODEL.BACKBONE.FREEZE_AT`` as for
    Detectron2's ResNet.

    Args:
        body: as of :class:`StageBackbone`.
        channels_and_strides: of each of its maps.
        name: how a message names the network.
        freeze_norm, sync_norm: a network, or one layer, with frozen or synchronised batch norms in the place of its own.

    Raises:
        UserError: a map that is asked for is not there, or a value that is not known.
    """
    shapes = {
        STAGES[stride]: ShapeSpec(channels=channels, stride=stride)
        for channels, stride in channels_and_strides
        if stride in STAGES
    }
    check_maps(body, [(shape.channels, shape.stride) for shape in shapes.values()], name=name)
    wanted = out_features(cfg)
    if missing := [feature for feature in wanted if feature not in shapes]:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES and MODEL.RESNETS.OUT_FEATURES ask for {missing[0]}, and {name} has "
            f"{', '.join(f'{key} (stride {shape.stride})' for key, shape in shapes.items()) or 'no map at strides 4 to 32'}: "
            "name those, or take another backbone."
        )
    norm = cfg.MODEL.RESNETS.NORM
    if norm not in NORMS:
        raise UserError(
            f"MODEL.RESNETS.NORM is {norm!r}: {name} can have one of {', '.join(NORMS)}; set it so."
        )
    if norm == "FrozenBN":
        body = freeze_norm(body)
    elif norm == "SyncBN":
        body = sync_norm(body)
    backbone = StageBackbone(body, shapes, wanted)
    backbone.freeze(cfg.MODEL.BACKBONE.FREEZE_AT, freeze_norm)
    return backbone


def check_maps(
    body: nn.Module, channels_and_strides: Sequence[tuple[int, int]], *, name: str
) -> None:
    """The maps of a network are what is said of them, tried on a picture of zeros.

    Raises:
        UserError: they are not, or the network cannot take such a picture.
    """
    try:
        maps = [tuple(m.shape) for m in probe(body)]
    except Exception as e:  # a network of anything can fail in any way
        raise unusable(name, e) from e
    expected = [(1, c, PROBE_SIZE // s, PROBE_SIZE // s) for c, s in channels_and_strides]
    if maps != expected:
        raise unusable(name, f"its maps are {maps} and not {expected}")


def unusable(name: str, reason: object) -> UserError:
    """The sentence about a network that cannot be a backbone.

    Args:
        reason: what a picture of :data:`PROBE_SIZE` pixels showed, in words or as an error.
    """
    return UserError(
        f"{name} cannot be a backbone ({' '.join(str(reason).split())[:160]}, on a picture of {PROBE_SIZE} pixels): "
        "choose a network that takes pictures of any size and has maps at strides 4 to 32."
    )


def probe(network: nn.Module) -> list[Tensor]:
    """What a network makes of a picture of zeros, in eval mode; with gradient unless that is switched off."""
    was_training = network.training
    device = next(network.parameters()).device
    try:
        return network.eval()(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device))
    finally:
        network.train(was_training)


def parameters_of(backbone: StageBackbone, names: Sequence[str]) -> list[nn.Parameter]:
    """The parameters that the maps of these names are computed from, those that are frozen left out."""
    with torch.enable_grad():
        maps = dict(zip(backbone._shapes, probe(backbone.body), strict=True))
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        if not parameters:
            return []
        total = sum(maps[name].sum() for name in names)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def replace_norms(module: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> None:
    """Put another layer in the place of every batch norm below a module."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, replacement(child))
        else:
            replace_norms(child, replacement)
