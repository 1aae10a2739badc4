"""The registry that every family of detectors enters."""

from era.registry import DETECTOR_FAMILIES

__all__ = ["DETECTOR_FAMILIES"]
