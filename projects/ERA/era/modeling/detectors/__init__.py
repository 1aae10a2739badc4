"""Families of detectors, one file each; importing this package registers them."""

from __future__ import annotations

import importlib
import pkgutil

from detectron2.config import CfgNode
from torch import nn

from era.errors import UserError
from era.modeling.detectors.base import Detector
from era.modeling.detectors.families import DETECTOR_FAMILIES
from era.modeling.detectors.recording import Predictions, Recording, TaskLoss
from era.registry import LAZY

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def known_family(cfg: CfgNode) -> type[Detector] | None:
    """The family that a stock config describes, None if no family knows it."""
    return _most_special(family for _, family in DETECTOR_FAMILIES if family.describes(cfg))


def family_of(cfg: CfgNode) -> type[Detector]:
    """The family that a stock config describes.

    Raises:
        UserError: no family knows it.
    """
    family = known_family(cfg)
    if family is None:
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}: expected a detector of a known family "
            f"({_names()}); choose one, in a distiller by MODEL.DISTILLER.STUDENT_META_ARCHITECTURE."
        )
    return family


def check_family(cfg: CfgNode, *, what: str = "") -> None:
    """:meth:`Detector.check_config` of the family that a stock config describes, if one knows it; keys of the model say
    nothing where a LazyConfig does."""
    family = known_family(cfg)
    if family is not None and cfg.MODEL.META_ARCHITECTURE != LAZY:
        family.check_config(cfg, what=what)


def detector_of(model: nn.Module) -> Detector:
    """A stock model as a detector of its family.

    Raises:
        UserError: no family knows it.
    """
    family = _most_special(family for _, family in DETECTOR_FAMILIES if family.holds(model))
    if family is None:
        raise UserError(
            f"the model is a {type(model).__name__}: expected a detector of a known family ({_names()}); "
            "choose one, in a distiller by MODEL.DISTILLER.STUDENT_META_ARCHITECTURE."
        )
    return family(model)


def _most_special(families) -> type[Detector] | None:
    """A family may refine another one, as a cascade refines a plain R-CNN: the refined one is meant."""
    return max(families, key=lambda family: len(family.__mro__), default=None)


def _names() -> str:
    return ", ".join(sorted({family.meta_architecture for _, family in DETECTOR_FAMILIES}))


__all__ = [
    "DETECTOR_FAMILIES",
    "Detector",
    "Predictions",
    "Recording",
    "TaskLoss",
    "check_family",
    "detector_of",
    "family_of",
    "known_family",
]
