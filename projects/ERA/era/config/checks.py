"""Values of a config that can be judged without building a model."""

from __future__ import annotations

import functools
import operator
import os

from detectron2 import modeling
from detectron2.config import CfgNode

from era.addresses import is_remote
from era.config.keys import (
    AMP_DTYPES,
    CACHE_DTYPES,
    CHANNELS_LAST,
    CLASS_MAPS,
    FEATURE_ONLY,
    INHERIT_NOTHING,
    INHERITANCE,
    ON_BAD_IMAGE,
)
from era.errors import UserError
from era.registry import METHOD_REGISTRY, is_distiller, label_free_methods, methods_of

# Which registry of Detectron2 knows the name at a key.
PARTS = {
    "MODEL.META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "MODEL.DISTILLER.STUDENT_META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": modeling.ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": modeling.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": modeling.RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": modeling.ROI_HEADS_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": modeling.ROI_MASK_HEAD_REGISTRY,
}


def validate_config(cfg: CfgNode) -> None:
    """Check the values that can be judged without building a model.

    Raises:
        UserError: names the key, what was found, what was expected and what to do.
    """
    if (
        cfg.SOLVER.ACCUMULATION_STEPS < 1
        or cfg.SOLVER.IMS_PER_BATCH % cfg.SOLVER.ACCUMULATION_STEPS
    ):
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS is {cfg.SOLVER.ACCUMULATION_STEPS}: expected a divisor of "
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}); change one of the two."
        )
    if cfg.SOLVER.CHECKPOINTS_KEPT < 0 or cfg.SOLVER.CHECKPOINTS_KEPT == 1:
        raise UserError(
            f"SOLVER.CHECKPOINTS_KEPT is {cfg.SOLVER.CHECKPOINTS_KEPT}: expected at least 2, or 0 for all; set it so."
        )
    if not cfg.SOLVER.MAX_LOSS > 0:  # NaN neither
        raise UserError(
            f"SOLVER.MAX_LOSS is {cfg.SOLVER.MAX_LOSS}: expected a number above 0 that no healthy loss reaches, .inf for "
            "no bound; set it so."
        )
    check_parts(cfg)
    if cfg.SOLVER.AMP.DTYPE not in AMP_DTYPES:
        raise UserError(
            f"SOLVER.AMP.DTYPE is {cfg.SOLVER.AMP.DTYPE!r}: expected one of {', '.join(AMP_DTYPES)}."
        )
    if cfg.INPUT.ON_BAD_IMAGE not in ON_BAD_IMAGE:
        raise UserError(
            f"INPUT.ON_BAD_IMAGE is {cfg.INPUT.ON_BAD_IMAGE!r}: expected one of {', '.join(ON_BAD_IMAGE)}."
        )
    if cfg.INPUT.MAX_IMAGE_PIXELS < 1:
        raise UserError(
            f"INPUT.MAX_IMAGE_PIXELS is {cfg.INPUT.MAX_IMAGE_PIXELS}: expected a number of pixels above 0."
        )
    if len(cfg.DATASETS.UNLABELED) > 0:
        _check_unlabeled(cfg)
    if not is_distiller(cfg):
        return
    keys = cfg.MODEL.DISTILLER
    if keys.INIT_STUDENT not in INHERITANCE:
        raise UserError(
            f"MODEL.DISTILLER.INIT_STUDENT is {keys.INIT_STUDENT!r}: expected one of "
            f"{', '.join(INHERITANCE)}."
        )
    if keys.CLASS_MAP not in CLASS_MAPS:
        raise UserError(
            f"MODEL.DISTILLER.CLASS_MAP is {keys.CLASS_MAP!r}: expected one of {', '.join(CLASS_MAPS)}; set it so."
        )
    if keys.CLASS_MAP == FEATURE_ONLY:
        _check_features_alone(cfg)
    if not 0.0 <= keys.PSEUDO_SCORE <= 1.0:
        raise UserError(
            f"MODEL.DISTILLER.PSEUDO_SCORE is {keys.PSEUDO_SCORE}: expected a score from 0 to 1; set it so."
        )
    if not keys.MAX_TASK_RATIO > 0:
        raise UserError(
            f"MODEL.DISTILLER.MAX_TASK_RATIO is {keys.MAX_TASK_RATIO}: expected how many times the student's own losses a "
            "method's may be, above 0, .inf for any; set it so."
        )
    if len(keys.METHODS) == 0 and keys.INIT_STUDENT == INHERIT_NOTHING:
        raise UserError(
            "MODEL.DISTILLER.METHODS is empty and MODEL.DISTILLER.INIT_STUDENT is none, so nothing would be "
            f"distilled: name methods out of {', '.join(sorted(name for name, _ in METHOD_REGISTRY))}, or "
            "train the plain student by its own MODEL.META_ARCHITECTURE."
        )
    if cfg.MODEL.TEACHER.CHANNELS_LAST not in CHANNELS_LAST:
        raise UserError(
            f"MODEL.TEACHER.CHANNELS_LAST is {cfg.MODEL.TEACHER.CHANNELS_LAST!r}: expected one of "
            f"{', '.join(CHANNELS_LAST)}."
        )
    _check_cache(cfg.MODEL.TEACHER)
    for method in methods_of(cfg).values():
        method.check_config(cfg)


def check_parts(cfg: CfgNode, *, what: str = "") -> None:
    """Every part of a model that a config names is one that Detectron2 knows.

    Args:
        what: of whom the config is, for the message.

    Raises:
        UserError: the key, the unknown name and those that are known.
    """
    for key, registry in PARTS.items():
        name = functools.reduce(operator.getitem, key.split("."), cfg)
        known = sorted(known for known, _ in registry)
        if name not in known and name != "PrecomputedProposals":
            raise UserError(
                f"{what}{key} is {name!r}: expected one of {', '.join(known)}; correct the name, or import the file "
                "that registers it."
            )


def _check_unlabeled(cfg: CfgNode) -> None:
    """``DATASETS.UNLABELED`` and its part of a batch fit the run."""
    names = f"DATASETS.UNLABELED names {list(cfg.DATASETS.UNLABELED)}"
    if not is_distiller(cfg):
        raise UserError(
            f"{names}, and MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: only a Distiller learns "
            "from pictures without labels; leave the list empty, or distil."
        )
    if not label_free_methods(cfg):
        raise UserError(
            f"{names}, and no method of MODEL.DISTILLER.METHODS {list(cfg.MODEL.DISTILLER.METHODS)} has, with "
            "these weights, a loss that needs no labels: leave the list empty, or switch such a loss on."
        )
    count, total, steps = (
        cfg.SOLVER[key] for key in ("UNLABELED_PER_BATCH", "IMS_PER_BATCH", "ACCUMULATION_STEPS")
    )
    if not 1 <= count < total or count % steps:
        raise UserError(
            f"SOLVER.UNLABELED_PER_BATCH is {count}, and {names}: expected at least 1 and fewer than "
            f"SOLVER.IMS_PER_BATCH ({total}), in equal parts for SOLVER.ACCUMULATION_STEPS {steps}; set it so, or "
            "leave the list empty."
        )


def _check_features_alone(cfg: CfgNode) -> None:
    """Nothing of a run asks what the teacher's heads say."""
    keys, found = cfg.MODEL.DISTILLER, ""
    for name, method in methods_of(cfg).items():
        if method.needs(cfg).heads:
            found = f"the method {name} with these settings reads the teacher's heads"
    if keys.INIT_STUDENT != INHERIT_NOTHING:
        found = f"MODEL.DISTILLER.INIT_STUDENT {keys.INIT_STUDENT} takes the teacher's heads"
    elif len(cfg.DATASETS.UNLABELED) > 0:
        found = "DATASETS.UNLABELED has the teacher detect"
    elif cfg.TEST.EVAL_TEACHER:
        found = "TEST.EVAL_TEACHER has the teacher detect"
    if found:
        raise UserError(
            f"MODEL.DISTILLER.CLASS_MAP is {FEATURE_ONLY}, and {found}: expected what compares feature maps alone; switch that "
            "off, or match the classes by name (auto)."
        )


def _check_cache(keys: CfgNode) -> None:
    where = keys.CACHE
    if where not in ("off", "memory") and (os.sep not in where or is_remote(where)):
        raise UserError(
            f"MODEL.TEACHER.CACHE is {where!r}: expected off, memory, or a folder of this machine written with "
            f"a {os.sep}, such as ./{os.path.basename(where) or 'cache'}."
        )
    if not 0 < keys.CACHE_GIB < float("inf"):
        raise UserError(f"MODEL.TEACHER.CACHE_GIB is {keys.CACHE_GIB}: expected GiB above 0.")
    if keys.CACHE_DTYPE not in CACHE_DTYPES:
        raise UserError(
            f"MODEL.TEACHER.CACHE_DTYPE is {keys.CACHE_DTYPE!r}: expected one of {', '.join(CACHE_DTYPES)}."
        )
