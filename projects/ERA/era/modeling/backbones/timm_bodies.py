"""Networks of timm (PyTorch Image Models) as backbones; the package is optional."""

from __future__ import annotations

import difflib
from types import ModuleType

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from era.errors import UserError
from era.modeling.backbones.pyramid import register_pyramids
from era.modeling.backbones.stages import STAGES, StageBackbone, stage_backbone, unusable

EXPECTED = "a network of timm, such as mobilenetv3_small_100, efficientnet_lite0, convnext_atto or repvgg_a0"


def add_config(cfg: CfgNode) -> None:
    """Add ``MODEL.TIMM``, in place."""
    cfg.MODEL.TIMM = CfgNode()
    # Name of a network of timm, such as convnext_atto, for build_timm_fpn_backbone and its forms for RetinaNet and FCOS.
    # Norm, frozen stages and maps by the keys of Detectron2's ResNet; MODEL.RESNETS.NORM is for batch norms alone.
    cfg.MODEL.TIMM.NAME = ""


def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> StageBackbone:
    """The timm network of ``MODEL.TIMM.NAME``, from random weights, its maps named res2..res5.

    The maps are timm's own (``features_only``), the last at each stride, and weights have the names that timm gives them
    there.

    Raises:
        UserError: timm is not installed or has no such network, or the network has no maps at strides 4 to 32.
    """
    name = cfg.MODEL.TIMM.NAME
    timm = import_timm()
    what = f"timm's {name}"
    try:
        network = timm_network(name, key="MODEL.TIMM.NAME", features_only=True)
        last = {info["reduction"]: index for index, info in enumerate(network.feature_info.info)}
        indices = [last[stride] for stride in sorted(STAGES) if stride in last]
        body = timm_network(name, key="MODEL.TIMM.NAME", features_only=True, out_indices=indices)
        info = body.feature_info
        shapes = list(zip(info.channels(), info.reduction(), strict=True))
    except UserError:
        raise
    except Exception as e:  # a network without such maps can fail in any way
        raise unusable(what, e) from e
    return stage_backbone(
        cfg,
        body,
        shapes,
        name=what,
        freeze_norm=timm.layers.freeze_batch_norm_2d,
        sync_norm=timm.layers.convert_sync_batchnorm,
    )


register_pyramids("timm", build_timm_backbone, add_config=add_config)


def import_timm() -> ModuleType:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import timm
    except ImportError as e:
        raise UserError(
            f"MODEL.TIMM.NAME needs the package timm, which cannot be imported ({e}): install it (pip install timm, or this "
            "package's extra timm), or take another backbone."
        ) from e
    return timm


def timm_network(name: str, *, key: str, **options):
    """A network of timm by name, from random weights; nothing is downloaded.

    Args:
        key: the config key of the name, for the message.
        options: of ``timm.create_model``.

    Raises:
        UserError: timm has none of that name.
    """
    check_timm_name(name, key=key)
    return import_timm().create_model(name, pretrained=False, **options)


def check_timm_name(name: str, *, key: str) -> None:
    """timm has a network of this name.

    Args:
        key: what the name was given by, for the message.

    Raises:
        UserError: it has none, or is not installed.
    """
    # An address such as hf-hub:... would be fetched: only names of the list pass.
    known = import_timm().list_models()
    if name.split(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f" (is {' or '.join(near)} meant?)" if near else ""
        raise UserError(f"{key} is {name!r}{hint}: expected {EXPECTED}; correct the name.")
