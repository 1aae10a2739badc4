"""Distillation methods; importing this package registers those that come with the project."""

from era.methods.base import METHOD_REGISTRY, DistillationStep, Method, build_methods
from era.methods.era import ERA

__all__ = ["ERA", "METHOD_REGISTRY", "DistillationStep", "Method", "build_methods"]
