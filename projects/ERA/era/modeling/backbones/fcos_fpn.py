"""The FPN of FCOS by a YAML config; Detectron2 has it in its lazy configs alone."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone

from era.modeling.backbones.pyramid import fcos_fpn


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet with an FPN p3..p7 whose p6 and p7 are made of p5; keys as of Detectron2's
    ``build_retinanet_resnet_fpn_backbone``."""
    return fcos_fpn(cfg, build_resnet_backbone(cfg, input_shape))
