"""Distillation of object detectors in Detectron2; importing it registers everything."""

from era.config import add_era_config, get_era_cfg, load_config, student_config
from era.data.made import register as _register_made_datasets
from era.errors import UserError
from era.methods import Method
from era.modeling.backbones.fcos_fpn import build_fcos_resnet_fpn_backbone
from era.modeling.backbones.small_resnet import build_small_resnet_fpn_backbone
from era.modeling.backbones.timm_bodies import build_timm_backbone
from era.modeling.backbones.torchvision_bodies import (
    build_mobilenetv2_backbone,
    build_torchvision_backbone,
)
from era.modeling.distiller import Distiller
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

__version__ = "0.2.0.dev0"

__all__ = [
    "METHOD_REGISTRY",
    "Distiller",
    "Method",
    "Teacher",
    "UserError",
    "add_era_config",
    "build_fcos_resnet_fpn_backbone",
    "build_mobilenetv2_backbone",
    "build_small_resnet_fpn_backbone",
    "build_timm_backbone",
    "build_torchvision_backbone",
    "get_era_cfg",
    "load_config",
    "student_config",
]

_register_made_datasets()
