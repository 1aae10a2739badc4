"""Embeddings of earlier batches, to be compared with where a batch has few objects."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EmbeddingQueue(nn.Module):
    """The last embeddings of objects, of student and teacher, as a first-in-first-out queue.

    Its buffers are in training checkpoints, with the method's modules, so that a run that is resumed goes on with the
    same queue (one of several processes with the main process's); no student's file holds them.

    The teacher's and its head's weights stay, so its embeddings are what they would be now. The student's are not: they
    are kept as they were, constants, as old as it takes to fill the queue (MoCo's queue without its slow encoder). The
    cure is a short queue, not a correction.

    Args:
        size: most embeddings that are kept; 0 = none.
        student_channels, teacher_channels: their widths.
    """

    def __init__(self, size: int, student_channels: int, teacher_channels: int):
        super().__init__()
        self.size = size
        self.register_buffer("student", torch.zeros(size, student_channels))
        self.register_buffer("teacher", torch.zeros(size, teacher_channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def rows(self) -> tuple[Tensor, Tensor]:
        """What is in it, newest first: the student's (Q, D_S) and the teacher's (Q, D_T), float32, no gradient."""
        count = int(self.count)
        return self.student[:count].clone(), self.teacher[:count].clone()

    @torch.no_grad()
    def push(self, student: Tensor, teacher: Tensor) -> None:
        """Put a batch's embeddings first, (R, D_S) and (R, D_T); the oldest leave."""
        for kept, new in ((self.student, student), (self.teacher, teacher)):
            kept.copy_(torch.cat([new.to(kept.dtype), kept])[: self.size])
        self.count += len(student)
        self.count.clamp_(max=self.size)
