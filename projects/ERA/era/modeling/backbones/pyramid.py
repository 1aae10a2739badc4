"""FPNs by config on any bottom-up network, in the three forms that Detectron2's families of detectors read."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from era.registry import BACKBONE_KEYS

BottomUp = Callable[[CfgNode, ShapeSpec], Backbone]


def rcnn_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """p2..p6 with p6 a subsampled p5, as Detectron2's ``build_resnet_fpn_backbone``."""
    return _fpn(cfg, bottom_up, LastLevelMaxPool())


def retinanet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """p3..p7 with p6 and p7 out of res5, as Detectron2's ``build_retinanet_resnet_fpn_backbone``."""
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def fcos_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """p3..p7 with p6 and p7 out of p5, not of res5 (arXiv 2006.09214, section 2.2)."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, channels, in_feature="p5"))


# The part of a builder's name that says which family of detectors its FPN is for.
PYRAMIDS = {"": rcnn_fpn, "retinanet_": retinanet_fpn, "fcos_": fcos_fpn}


def register_pyramids(
    name: str, bottom_up: BottomUp, *, add_config: Callable[[CfgNode], None] | None = None
) -> None:
    """Register ``build_<name>_fpn_backbone``, ``build_retinanet_<name>_fpn_backbone`` and
    ``build_fcos_<name>_fpn_backbone``.

    Args:
        bottom_up: makes the network from a config and the shape of its input.
        add_config: adds the keys of it that stock Detectron2 lacks, in place; None = it has none.
    """
    for family, pyramid in PYRAMIDS.items():
        build = _builder(bottom_up, pyramid)
        build.__name__ = build.__qualname__ = f"build_{family}{name}_fpn_backbone"
        build.__doc__ = f"{bottom_up.__doc__.splitlines()[0]} FPN: {pyramid.__doc__}"
        BACKBONE_REGISTRY.register(build)
        if add_config is not None:
            BACKBONE_KEYS[build.__name__] = add_config


def out_features(cfg: CfgNode) -> list[str]:
    """Names of the maps that a bottom-up network gives: what the FPN reads, and what methods may look at beside it."""
    return sorted({*cfg.MODEL.FPN.IN_FEATURES, *cfg.MODEL.RESNETS.OUT_FEATURES})


def _builder(bottom_up: BottomUp, pyramid: Callable[[CfgNode, Backbone], FPN]):
    return lambda cfg, input_shape: pyramid(cfg, bottom_up(cfg, input_shape))


def _fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=list(cfg.MODEL.FPN.IN_FEATURES),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
