"""Students by name: the teacher's detector on another backbone. A further short name is a line of :data:`STUDENTS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone

from era.config import get_era_cfg, student_config
from era.errors import UserError
from era.modeling.backbones.timm_bodies import check_timm_name
from era.modeling.backbones.torchvision_bodies import MOBILENETV2, check_torchvision_name


@dataclass(frozen=True)
class Form:
    """What of a family of detectors is said by other keys than in another.

    Attributes:
        infix: in the names of backbones, for the levels above res5.
        levels: config key below ``MODEL`` of the FPN levels that the heads read.
        rate: learning rate of the public recipes at 16 pictures a step.
        has_anchors: whether ``MODEL.ANCHOR_GENERATOR`` is read.
    """

    infix: str
    levels: str
    rate: float
    has_anchors: bool = True


FORMS = {  # by meta-architecture
    "GeneralizedRCNN": Form("", "RPN", 0.02),
    "RetinaNet": Form("retinanet_", "RETINANET", 0.01),
    "FCOS": Form("fcos_", "FCOS", 0.01, has_anchors=False),
}


@dataclass(frozen=True)
class Student:
    """A backbone.

    Attributes:
        about: for ``--help``.
        builder: its registered name, ``{}`` standing for :attr:`Form.infix`.
        keys: below ``MODEL``, the rest of its ResNet being Detectron2's.
        weights: address of public weights of ImageNet, in Detectron2's names or torchvision's; "" = none are known, and it
            starts from random ones.
    """

    about: str
    builder: str
    keys: dict[str, Any] = field(default_factory=dict)
    weights: str = ""


def imagenet(name: str) -> str:
    """Address of the first weights that torchvision lists for one of its networks; "" if it lists none."""
    weights = torchvision.models.get_model_weights(name)
    return next((entry.url for entry in weights), "")


RESNET = "build_{}resnet_fpn_backbone"
SMALL = "build_small_{}resnet_fpn_backbone"
MSRA = "detectron2://ImageNetPretrained/MSRA/R-{}.pkl"
BASIC = {"RESNETS.DEPTH": 18, "RESNETS.RES2_OUT_CHANNELS": 64}
TINY = {"RESNETS.DEPTH": 10, "RESNETS.STEM_OUT_CHANNELS": 16, "RESNETS.RES2_OUT_CHANNELS": 16}
STUDENTS = {
    "toy": Student("ResNet-10 of 16 channels, for pictures of 128 pixels, from random weights", SMALL, TINY),
    "mv2": Student("MobileNetV2, from torchvision's ImageNet weights", "build_{}mobilenetv2_fpn_backbone", {}, imagenet(MOBILENETV2)),
    "r18": Student("ResNet-18, from torchvision's ImageNet weights", RESNET, BASIC, imagenet("resnet18")),
    "r34": Student("ResNet-34, from torchvision's ImageNet weights", RESNET, BASIC | {"RESNETS.DEPTH": 34}, imagenet("resnet34")),
    "r50": Student("ResNet-50, from Detectron2's ImageNet weights", RESNET, {"RESNETS.DEPTH": 50}, MSRA.format(50)),
    "r101": Student("ResNet-101, from Detectron2's ImageNet weights", RESNET, {"RESNETS.DEPTH": 101}, MSRA.format(101)),
}  # fmt: skip
# Whose networks are students too, as LIBRARY:NAME: what --help says of them.
LIBRARIES = {
    "torchvision": "a network of torchvision, such as torchvision:mobilenet_v3_large, from its ImageNet weights",
    "timm": "a network of timm, such as timm:mobilenetv3_small_050, from random weights or --student-weights",
}


def form_of(cfg: CfgNode, *, what: str) -> Form:
    """What a stock config's family is said by.

    Args:
        what: names the config in a message.

    Raises:
        UserError: no FPN detector of a family that students can be made for.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in FORMS or not cfg.MODEL.FPN.IN_FEATURES or cfg.MODEL.KEYPOINT_ON:
        found = "a detector of keypoints" if cfg.MODEL.KEYPOINT_ON else name
        found += "" if cfg.MODEL.FPN.IN_FEATURES else " without an FPN"
        raise UserError(
            f"{what} is {found}: expected a detector of boxes or masks with an FPN, of {', '.join(FORMS)}; name another."
        )
    return FORMS[name]


def head_levels(cfg: CfgNode) -> list[str]:
    """Names of the FPN levels that the heads of a stock config read, such as p2 to p6."""
    return list(cfg.MODEL[FORMS[cfg.MODEL.META_ARCHITECTURE].levels].IN_FEATURES)


def find_student(name: str) -> Student:
    """A student by its short name, or as ``torchvision:NAME`` or ``timm:NAME``.

    Raises:
        UserError: there is none of that name.
    """
    if name in STUDENTS:
        return STUDENTS[name]
    library, _, network = name.partition(":")
    if library == "torchvision" and network:
        check_torchvision_name(network, key=f"--student {library}:")
        return Student(LIBRARIES[library], "build_{}torchvision_fpn_backbone", {"TORCHVISION.NAME": network}, imagenet(network))  # fmt: skip
    if library == "timm" and network:
        check_timm_name(network, key=f"--student {library}:")
        return Student(LIBRARIES[library], "build_{}timm_fpn_backbone", {"TIMM.NAME": network})
    raise UserError(
        f"--student is {name!r}: expected one of {', '.join(STUDENTS)}, or {', '.join(f'{known}:NAME' for known in LIBRARIES)} of a "
        "network there; name one."
    )


def student_of(teacher: CfgNode, name: str) -> CfgNode:
    """The stock model of a teacher with a student's backbone, all else at its default; built once, to see that there is one.

    Raises:
        UserError: as :func:`put_backbone`, or a network of a library that can be no backbone.
    """
    cfg = stock(teacher)
    put_backbone(cfg, name)
    cfg.MODEL.DEVICE = "cpu"
    if ":" in name:
        try:
            build_backbone(cfg)
        except UserError as e:
            raise UserError(f"--student {name}: {e}") from e
    return cfg


def stock(teacher: CfgNode) -> CfgNode:
    """A teacher's model and channel order, all else at its default."""
    cfg = get_era_cfg()
    cfg.merge_from_other_cfg(CfgNode({"MODEL": student_config(teacher).MODEL}))
    cfg.INPUT.FORMAT = teacher.INPUT.FORMAT
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    return cfg


def put_backbone(cfg: CfgNode, name: str) -> None:
    """Put a student's backbone in the place of a config's own, in place; all else stays, so that the heads, levels and
    anchors of student and teacher agree. It is one with pretrained weights, which are not named.

    Args:
        cfg: of the teacher.
        name: of the student.

    Raises:
        UserError: this student has no backbone for the teacher's family.
    """
    student, default = find_student(name), get_era_cfg()
    builder = student.builder.format(FORMS[cfg.MODEL.META_ARCHITECTURE].infix)
    if builder not in BACKBONE_REGISTRY:
        raise UserError(
            f"--student {name} cannot be a {cfg.MODEL.META_ARCHITECTURE} (there is no {builder}): choose another student, "
            "or a teacher of another family."
        )
    out_features = list(cfg.MODEL.RESNETS.OUT_FEATURES)
    for part in ("RESNETS", "TORCHVISION", "TIMM"):
        cfg.MODEL[part] = default.MODEL[part]
    cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.RESNETS.NORM = out_features, "FrozenBN"
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.BACKBONE.FREEZE_AT = default.MODEL.BACKBONE.FREEZE_AT
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = default.MODEL.PIXEL_MEAN, default.MODEL.PIXEL_STD
    cfg.INPUT.FORMAT = default.INPUT.FORMAT
    cfg.merge_from_list([part for key, v in student.keys.items() for part in (f"MODEL.{key}", v)])
