"""Methods and families of detectors by name. They enter themselves; config asks here, so that it imports neither, and modeling
imports no method."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from era.errors import UserError

METHOD_REGISTRY = Registry("DISTILLATION_METHOD")
METHOD_REGISTRY.__doc__ = """
Distillation methods by the name that ``MODEL.DISTILLER.METHODS`` lists. An entry is a subclass of
:class:`era.methods.base.Method`.
"""

DETECTOR_FAMILIES = Registry("DETECTOR_FAMILY")
DETECTOR_FAMILIES.__doc__ = "Subclasses of :class:`era.modeling.detectors.Detector` by their names."

# Backbones with keys that stock Detectron2 lacks: by the name of their builder, what adds those keys to a config in place.
BACKBONE_KEYS: dict[str, Callable[[CfgNode], None]] = {}


# The meta-architecture of a model that a LazyConfig describes (MODEL.LAZY).
LAZY = "LazyModel"


def architecture_of(cfg: CfgNode) -> str:
    """The meta-architecture of a plain detector's config; of a LazyConfig's that of the model which it builds."""
    name = cfg.MODEL.META_ARCHITECTURE
    return cfg.MODEL.LAZY.META_ARCHITECTURE if name == LAZY else name


def is_distiller(cfg: CfgNode) -> bool:
    """Whether a config describes a distiller, not a plain detector."""
    return cfg.MODEL.META_ARCHITECTURE == "Distiller"


def methods_of(cfg: CfgNode) -> dict[str, type]:
    """The methods of a run: :class:`era.methods.base.Method` subclasses by lower-case name, in the order of
    ``MODEL.DISTILLER.METHODS``.

    The lower-case name is that of the method's module in the distiller and in its losses,
    ``loss_<name>_<term>``. Empty for a plain detector.

    Raises:
        UserError: an unknown or repeated name.
    """
    found: dict[str, type] = {}
    for name in cfg.MODEL.DISTILLER.METHODS if is_distiller(cfg) else ():
        known = sorted(known for known, _ in METHOD_REGISTRY)
        if name not in known:
            upper = {own.upper(): own for own in known}
            near = difflib.get_close_matches(str(name).upper(), upper, n=1, cutoff=0.5)
            hint = f" (is {upper[near[0]]} meant?)" if near else ""
            raise UserError(
                f"MODEL.DISTILLER.METHODS names {name!r}{hint}: "
                f"expected names out of {', '.join(known)}."
            )
        if name.lower() in found:
            raise UserError(f"MODEL.DISTILLER.METHODS names {name!r} twice: name it once.")
        found[name.lower()] = METHOD_REGISTRY.get(name)
    return found


def label_free_methods(cfg: CfgNode) -> tuple[str, ...]:
    """Lower-case names of the run's methods that have losses without ground truth, see ``Needs.labels``."""
    return tuple(name for name, method in methods_of(cfg).items() if not method.needs(cfg).labels)


def set_alpha(cfg: CfgNode, alpha: float) -> None:
    """Set how far inference leans on the teacher, in every method of the run that has such a key.

    Args:
        cfg: a distiller's config, not frozen; changed in place.
        alpha: 0 = the plain student, 1 = the teacher's heads.

    Raises:
        UserError: no method of the run has one.
    """
    keys = [method.alpha_key for method in methods_of(cfg).values() if method.alpha_key]
    if not keys:
        raise UserError(
            f"alpha {alpha:g} needs a run of a method whose inference can use the teacher's heads; this "
            f"one has MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} and MODEL.DISTILLER.METHODS "
            f"{list(cfg.MODEL.DISTILLER.METHODS)}: use alpha 0."
        )
    for key in keys:
        cfg.merge_from_list([key, float(alpha)])


def forget_parts(cfg: CfgNode) -> None:
    """Name no checkpoint of a part that a method of the run trains first: beside a random teacher it is random too.

    Args:
        cfg: not frozen; changed in place.
    """
    for method in methods_of(cfg).values():
        if method.part_key:
            cfg.merge_from_list([method.part_key, ""])
