"""What makes ERA's step cheap, each to be switched off to measure what it is worth (tools/benchmark.py)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Levers:
    """All on in training; docs/performance.md has what each saves.

    Attributes:
        sparse_rpn: run the RPN head at the sampled positions alone.
        sparse_dense: run the head of a dense detector at the sampled positions alone.
        stacked_roi: one ROI pass for all estimates.
        reuse_pooling: let the student's own pooling of ``e_0`` serve the teacher's box head.
        narrow_residual: feature and residual losses from products of narrow maps.
        fused_branches: 1x1 branches in one buffer, forward and backward.
    """

    sparse_rpn: bool = True
    sparse_dense: bool = True
    stacked_roi: bool = True
    reuse_pooling: bool = True
    narrow_residual: bool = True
    fused_branches: bool = True


ALL_ON = Levers()
