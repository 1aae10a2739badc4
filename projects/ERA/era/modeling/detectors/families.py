"""The registry that every family of detectors enters."""

from detectron2.utils.registry import Registry

DETECTOR_FAMILIES = Registry("DETECTOR_FAMILY")
DETECTOR_FAMILIES.__doc__ = "Subclasses of :class:`era.modeling.detectors.Detector` by their names."
