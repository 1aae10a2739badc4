"""The config: the keys of the frame, safe loading, cheap checks.

Every other key belongs to a method, or to a family of detectors or a backbone that Detectron2 has no keys of, and stands
in its file (``Method.add_config``, ``Detector.add_config``, ``register_pyramids``).
"""

from era.config.checks import check_parts, validate_config
from era.config.keys import (
    EXACT,
    FEATURE_ONLY,
    INHERIT_FPN,
    INHERIT_HEADS,
    INHERIT_NOTHING,
    add_era_config,
)
from era.config.loading import (
    find_config_file,
    get_era_cfg,
    load_config,
    merge_config,
    student_config,
)

__all__ = [
    "EXACT",
    "FEATURE_ONLY",
    "INHERIT_FPN",
    "INHERIT_HEADS",
    "INHERIT_NOTHING",
    "add_era_config",
    "check_parts",
    "find_config_file",
    "get_era_cfg",
    "load_config",
    "merge_config",
    "student_config",
    "validate_config",
]
