"""R2KD, Robustness-Reinforced Knowledge Distillation (arXiv 2311.13934)."""

from era.methods.r2kd.method import R2KD

__all__ = ["R2KD"]
