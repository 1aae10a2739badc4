"""ERA, Expandable Residual Approximation (arXiv 2508.16050)."""

from era.methods.era.method import ERA

__all__ = ["ERA"]
