"""A small ResNet FPN, narrower than Detectron2's own builder allows, for the generated toy data."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from era.errors import UserError
from era.modeling.backbones.pyramid import fcos_fpn, out_features, rcnn_fpn, retinanet_fpn

BLOCKS_BY_DEPTH = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_small_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet of basic blocks at any width, with an FPN p2..p6; only keys of stock Detectron2 are read.

    Detectron2's ``build_resnet_backbone`` asserts 64 res2 channels for R18 and R34 and has no R10.
    ``MODEL.RESNETS.DEPTH`` is 10, 18 or 34; the width follows ``STEM_OUT_CHANNELS`` and
    ``RES2_OUT_CHANNELS`` and doubles with every stage; ``MODEL.FPN.OUT_CHANNELS`` as usual.

    Raises:
        UserError: another depth.
    """
    return rcnn_fpn(cfg, _small_resnet(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_small_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same with p6 and p7 out of res5, as Detectron2's ``build_retinanet_resnet_fpn_backbone``."""
    return retinanet_fpn(cfg, _small_resnet(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_small_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same with p6 and p7 out of p5, as :func:`~era.modeling.backbones.fcos_fpn.build_fcos_resnet_fpn_backbone`."""
    return fcos_fpn(cfg, _small_resnet(cfg, input_shape))


def _small_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    keys = cfg.MODEL.RESNETS
    if keys.DEPTH not in BLOCKS_BY_DEPTH:
        raise UserError(
            f"MODEL.RESNETS.DEPTH is {keys.DEPTH}: {cfg.MODEL.BACKBONE.NAME} knows "
            f"{sorted(BLOCKS_BY_DEPTH)}; choose one of them."
        )
    stem = BasicStem(
        in_channels=input_shape.channels, out_channels=keys.STEM_OUT_CHANNELS, norm=keys.NORM
    )
    stages, in_channels, out_channels = [], keys.STEM_OUT_CHANNELS, keys.RES2_OUT_CHANNELS
    for index, num_blocks in enumerate(BLOCKS_BY_DEPTH[keys.DEPTH]):
        first_stride = 1 if index == 0 else 2
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[first_stride] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=keys.NORM,
            )
        )
        in_channels, out_channels = out_channels, out_channels * 2
    return ResNet(
        stem,
        stages,
        out_features=out_features(cfg),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
