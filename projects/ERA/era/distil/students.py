"""Students by short names: the teacher's detector on another backbone. A further one is a line of :data:`STUDENTS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY

from era.errors import UserError


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
        keys: below ``MODEL.RESNETS``, the rest being Detectron2's.
        weights: of ImageNet; "" = there are none in Detectron2's zoo, and it starts from random ones.
    """

    about: str
    builder: str
    keys: dict[str, Any] = field(default_factory=dict)
    weights: str = ""


RESNET = "build_{}resnet_fpn_backbone"
SMALL = "build_small_{}resnet_fpn_backbone"
MSRA = "detectron2://ImageNetPretrained/MSRA/R-{}.pkl"
STUDENTS = {
    "toy": Student("ResNet-10 of 16 channels, for pictures of 128 pixels", SMALL, {"DEPTH": 10, "STEM_OUT_CHANNELS": 16, "RES2_OUT_CHANNELS": 16}),
    "r18": Student("ResNet-18, from random weights", RESNET, {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}),
    "r34": Student("ResNet-34, from random weights", RESNET, {"DEPTH": 34, "RES2_OUT_CHANNELS": 64}),
    "r50": Student("ResNet-50, from ImageNet", RESNET, {"DEPTH": 50}, MSRA.format(50)),
    "r101": Student("ResNet-101, from ImageNet", RESNET, {"DEPTH": 101}, MSRA.format(101)),
}  # fmt: skip
# Deviation of ImageNet's pixels, BGR, as torchvision's models divide by; Detectron2's own weights want none.
RANDOM_STD = [57.375, 57.120, 58.395]


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
    """A student by its short name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in STUDENTS:
        raise UserError(f"--student is {name!r}: expected one of {', '.join(STUDENTS)}; name one.")
    return STUDENTS[name]


def put_backbone(cfg: CfgNode, name: str, *, weights: str | None = None) -> None:
    """Put a student's backbone in the place of a config's own, in place; all else stays, so that the heads, levels and
    anchors of student and teacher agree.

    Args:
        cfg: of the teacher.
        name: short name of the student.
        weights: a checkpoint to start from, instead of the student's own; with weights the first stages and all
            statistics stay as they are, as Detectron2 has it, without them everything is trained.

    Raises:
        UserError: this student has no backbone for the teacher's family.
    """
    student, stock = find_student(name), get_cfg()
    builder = student.builder.format(FORMS[cfg.MODEL.META_ARCHITECTURE].infix)
    if builder not in BACKBONE_REGISTRY:
        raise UserError(
            f"--student {name} cannot be a {cfg.MODEL.META_ARCHITECTURE} (there is no {builder}): choose another student, "
            "or a teacher of another family."
        )
    weights = student.weights if weights is None else weights
    resnets = stock.MODEL.RESNETS
    resnets.OUT_FEATURES = list(cfg.MODEL.RESNETS.OUT_FEATURES)
    resnets.NORM = "FrozenBN" if weights else "BN"
    for key, value in student.keys.items():
        resnets[key] = value
    cfg.MODEL.RESNETS = resnets
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.BACKBONE.FREEZE_AT = stock.MODEL.BACKBONE.FREEZE_AT if weights else 0
    cfg.MODEL.WEIGHTS = weights
    cfg.MODEL.PIXEL_MEAN = list(stock.MODEL.PIXEL_MEAN)
    cfg.MODEL.PIXEL_STD = list(stock.MODEL.PIXEL_STD) if weights else RANDOM_STD
    cfg.INPUT.FORMAT = stock.INPUT.FORMAT
