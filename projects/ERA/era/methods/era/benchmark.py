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
    TWI_WEIGHTS,
)
from era.methods.era.fast import Levers
from era.modeling.detectors import Detector, family_of
from era.modeling.detectors.recording import ALL_POSITIONS, SAMPLED_POSITIONS
from era.modeling.teacher import Teacher
from era.modeling.teacher_config import teacher_config

Builder = Callable[[CfgNode, Detector, Teacher], Method]
MIMIC = (
    "NUM_BRANCHES", 0,
    "SCALES", [],
    "RESIDUAL_WEIGHT", 0.0,
    "KD_WEIGHT", 0.0,
    *(item for key, _ in TWI_WEIGHTS.values() for item in (f"TWI.{key}", 0.0)),
    *(item for key in ROI_WEIGHTS.values() for item in (f"ROI.{key}", 0.0)),
)  # fmt: skip
SOFT = (
    *(item for _, key in TWI_WEIGHTS.values() for item in (f"TWI.{key}", 1.0)),
    "TWI.SOFT_POSITIONS",
)
NO_SOFT = tuple(item for _, key in TWI_WEIGHTS.values() for item in (f"TWI.{key}", 0.0))
NO_HARD = tuple(item for key, _ in TWI_WEIGHTS.values() for item in (f"TWI.{key}", 0.0))
ROI_FEATURE = tuple(item for key in ROI_WEIGHTS.values() for item in (f"ROI.{key}", 1.0))
BRANCHES = (1, 2, 8)
HEADS = {"rpn": "the RPN", "roi": "the ROI head", "dense": "the dense head"}
# The levers that a part of the heads, or some of them, has; the others are the maps' own.
LEVERS_OF = {
    "sparse_rpn": "rpn",
    "stacked_roi": "roi",
    "reuse_pooling": "roi",
    "sparse_dense": "dense",
}


def rows(method: type[Method], cfg: CfgNode) -> dict[str, Builder]:
    """The definition, every lever off in turn, every cost-bearing key at another value, and N.

    Args:
        method: the class.
        cfg: the run's; settings that leave no room for a row leave it out.
    """
    era = cfg.MODEL.ERA
    judge = family_of(student_config(teacher_config(cfg)))
    parts = [part for part in TWI_WEIGHTS if part in judge.parts]

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
            if LEVERS_OF.get(lever.name) in (None, *parts):
                found[f"{lever.name} off"] = without(lever.name)
    if era.TWI.PROPOSALS_PER_IMAGE > 0 and "roi" in parts:
        found["TWI on all proposals"] = with_keys("TWI.PROPOSALS_PER_IMAGE", 0)
    if era.HIDDEN_CHANNELS > 0:
        found["branches of full width"] = with_keys("HIDDEN_CHANNELS", 0)
    switched = {TWI_WEIGHTS[part][0]: f"TWI of {HEADS[part]}" for part in parts}
    for key, name in switched.items():
        on = era.TWI[key] > 0
        found[f"{'without' if on else 'with'} {name}"] = with_keys(f"TWI.{key}", 0.0 if on else 1.0)
    if "roi" in parts:
        on = era.KD_WEIGHT > 0
        found[f"{'without' if on else 'with'} KD"] = with_keys("KD_WEIGHT", 0.0 if on else 1.0)
    found["with soft judges"] = with_keys(*SOFT, SAMPLED_POSITIONS)
    found["with soft judges at all anchors"] = with_keys(*SOFT, ALL_POSITIONS)
    found["with soft judges alone"] = with_keys(*NO_HARD, *SOFT, SAMPLED_POSITIONS)
    if any(era.TWI[TWI_WEIGHTS[part][1]] > 0 for part in parts):
        found["without soft judges"] = with_keys(*NO_SOFT)
    if era.NUM_BRANCHES > 1 and era.TWI.ESTIMATES == ALL_ESTIMATES:
        found["e_0 and e_N judged alone"] = with_keys("TWI.ESTIMATES", ENDS)
    judges = family_of(student_config(teacher_config(cfg)))
    has_stages = judges.first_stage is not Detector.first_stage
    if has_stages and era.TWI.STAGES == FIRST_STAGE:
        found["all stages judge"] = with_keys("TWI.STAGES", ALL_STAGES)
    if era.STANDARDIZE == RAW:
        found["with a standardised target"] = with_keys("STANDARDIZE", BY_TEACHER)
    else:
        found["with a raw target"] = with_keys("STANDARDIZE", RAW)
    found["branches with context"] = with_keys("CONTEXT_KERNEL", 3)
    found["a projection at equal width"] = with_keys("PROJECTION", ALWAYS)
    found["positions weighted"] = with_keys("POSITION_WEIGHT", BY_JUDGE)
    if "roi" in parts:
        found["with the ROI feature"] = with_keys(*ROI_FEATURE)
    for count in BRANCHES:
        scales = [0.5**i for i in range(count)]
        found[f"N = {count}"] = with_keys("NUM_BRANCHES", count, "SCALES", scales)
    found["torch.compile on"] = with_keys("COMPILE", True)
    return found
