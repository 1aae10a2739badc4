"""What of ERA ``tools/benchmark.py`` measures beside the method as it is configured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from detectron2.config import CfgNode

from era.config import student_config
from era.methods.base import Method
from era.methods.era.config import (
    ALL_ESTIMATES,
    ALL_STAGES,
    ALWAYS,
    BY_JUDGE,
    BY_TEACHER,
    ENDS,
    FIRST_STAGE,
    RAW,
    ROI_WEIGHTS,
)
from era.methods.era.fast import Levers
from era.modeling.detectors import Detector, family_of
from era.modeling.detectors.recording import ALL_POSITIONS, SAMPLED_POSITIONS
from era.modeling.teacher import Teacher, teacher_config

Builder = Callable[[CfgNode, Detector, Teacher], Method]
MIMIC = (
    "NUM_BRANCHES", 0,
    "SCALES", [],
    "RESIDUAL_WEIGHT", 0.0,
    "KD_WEIGHT", 0.0,
    "TWI.RPN_WEIGHT", 0.0,
    "TWI.ROI_WEIGHT", 0.0,
    *(item for key in ROI_WEIGHTS.values() for item in (f"ROI.{key}", 0.0)),
)  # fmt: skip
SOFT = ("TWI.SOFT_RPN_WEIGHT", 1.0, "TWI.SOFT_ROI_WEIGHT", 1.0, "TWI.SOFT_POSITIONS")
NO_SOFT = ("TWI.SOFT_RPN_WEIGHT", 0.0, "TWI.SOFT_ROI_WEIGHT", 0.0)
NO_HARD = ("TWI.RPN_WEIGHT", 0.0, "TWI.ROI_WEIGHT", 0.0)
ROI_FEATURE = tuple(item for key in ROI_WEIGHTS.values() for item in (f"ROI.{key}", 1.0))
BRANCHES = (1, 2, 8)


def rows(method: type[Method], cfg: CfgNode) -> dict[str, Builder]:
    """The definition, every lever off in turn, every cost-bearing key at another value, and N.

    Args:
        method: the class.
        cfg: the run's; settings that leave no room for a row leave it out.
    """
    era = cfg.MODEL.ERA

    def with_keys(*overrides) -> Builder:
        def build(cfg: CfgNode, student: Detector, teacher: Teacher) -> Method:
            cfg = cfg.clone()
            cfg.defrost()
            keys = [f"MODEL.ERA.{key}" for key in overrides[::2]]
            pairs = zip(keys, overrides[1::2], strict=True)
            cfg.merge_from_list([item for pair in pairs for item in pair])
            return method(cfg, student, teacher)

        return build

    def without(lever: str) -> Builder:
        def build(cfg: CfgNode, student: Detector, teacher: Teacher) -> Method:
            built = method.from_config(cfg, student, teacher)
            return method(**built, levers=Levers(**{lever: False}))

        return build

    found = {
        "feature mimic alone": with_keys(*MIMIC, *NO_SOFT),
        "as defined": with_keys("FAST", False),
    }
    if era.FAST:
        for lever in fields(Levers):
            found[f"{lever.name} off"] = without(lever.name)
    if era.TWI.PROPOSALS_PER_IMAGE > 0:
        found["TWI on all proposals"] = with_keys("TWI.PROPOSALS_PER_IMAGE", 0)
    if era.HIDDEN_CHANNELS > 0:
        found["branches of full width"] = with_keys("HIDDEN_CHANNELS", 0)
    for key, name in {
        "TWI.RPN_WEIGHT": "TWI of the RPN",
        "TWI.ROI_WEIGHT": "TWI of the ROI head",
        "KD_WEIGHT": "KD",
    }.items():
        on = cfg.MODEL.ERA.TWI[key[4:]] if key.startswith("TWI.") else cfg.MODEL.ERA[key]
        found[f"{'without' if on else 'with'} {name}"] = with_keys(key, 0.0 if on else 1.0)
    found["with soft judges"] = with_keys(*SOFT, SAMPLED_POSITIONS)
    found["with soft judges at all anchors"] = with_keys(*SOFT, ALL_POSITIONS)
    found["with soft judges alone"] = with_keys(*NO_HARD, *SOFT, SAMPLED_POSITIONS)
    if era.TWI.SOFT_RPN_WEIGHT > 0 or era.TWI.SOFT_ROI_WEIGHT > 0:
        found["without soft judges"] = with_keys(*NO_SOFT)
    if era.NUM_BRANCHES > 1 and era.TWI.ESTIMATES == ALL_ESTIMATES:
        found["e_0 and e_N judged alone"] = with_keys("TWI.ESTIMATES", ENDS)
    judges = family_of(student_config(teacher_config(cfg)))
    has_stages = judges.first_stage is not Detector.first_stage
    if has_stages and era.TWI.STAGES == ALL_STAGES:
        found["the first stage judges alone"] = with_keys("TWI.STAGES", FIRST_STAGE)
    if era.STANDARDIZE == RAW:
        found["with a standardised target"] = with_keys("STANDARDIZE", BY_TEACHER)
    else:
        found["with a raw target"] = with_keys("STANDARDIZE", RAW)
    found["branches with context"] = with_keys("CONTEXT_KERNEL", 3)
    found["a projection at equal width"] = with_keys("PROJECTION", ALWAYS)
    found["positions weighted"] = with_keys("POSITION_WEIGHT", BY_JUDGE)
    found["with the ROI feature"] = with_keys(*ROI_FEATURE)
    for count in BRANCHES:
        scales = [0.5**i for i in range(count)]
        found[f"N = {count}"] = with_keys("NUM_BRANCHES", count, "SCALES", scales)
    found["torch.compile on"] = with_keys("COMPILE", True)
    return found
