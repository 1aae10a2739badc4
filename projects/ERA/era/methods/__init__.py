"""Distillation methods; importing this package registers those that come with the project."""

from era.methods.base import METHOD_REGISTRY, Method, build_methods
from era.methods.era.method import ERA
from era.modeling.step import DistillationStep

__all__ = ["ERA", "METHOD_REGISTRY", "DistillationStep", "Method", "build_methods"]
