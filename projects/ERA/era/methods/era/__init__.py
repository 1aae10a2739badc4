"""ERA, Expandable Residual Approximation (arXiv 2508.16050)."""
