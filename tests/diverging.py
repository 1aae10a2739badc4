"""A method that makes real runs fail in a chosen way, by numbers that arise as they do in life."""

from __future__ import annotations

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from era.methods import Method, Needs

FROM = 3  # iteration from which it fails


class DIVERGING(Method):
    """To be registered for a test. Its loss reads the student's finest map, and from iteration :data:`FROM` on fails as ``kind`` says.

    ``loss``: the logarithm of a negative number; ``gradient``: the root of 0, whose value is 0 and whose gradient is not finite;
    ``large``: a billion times as much; ``forward``: what a detector raises. ``rank``: in this process alone, None in all.
    """

    kind, rank = "loss", None

    def __init__(self, cfg, student, teacher):
        super().__init__()

    @classmethod
    def needs(cls, cfg):
        return Needs(teacher=False)

    def losses(self, step):
        level = next(iter(step.student.features))
        mean = step.student.features[level].abs().mean()
        loss = 0.01 * mean + torch.rand(())  # the step's own random numbers
        if get_event_storage().iter >= FROM and self.rank in (None, comm.get_rank()):
            if self.kind == "loss":
                loss = (-mean).log()
            elif self.kind == "gradient":
                loss = loss + (mean * 0).sqrt()
            elif self.kind == "large":
                loss = mean * 1e9
            elif self.kind == "forward":
                raise FloatingPointError("Predicted boxes contain Inf or NaN.")
        return {"loss_diverging_mean": loss}
