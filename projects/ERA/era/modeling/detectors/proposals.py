"""A part of a step's sampled proposals that stands for all of them.

To run a ROI head on many estimates of the features is expensive, so a part of the proposals can stand for
the whole. It is a stratified sample of every image: foreground, which carries the class and every box
loss, is preferred, and each stratum's mean counts with the stratum's share of the whole. The expected
loss is then that of all proposals, and a batch split among processes gives the same loss as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

FOREGROUND_PART = 0.75  # of the proposals that are taken, at most so many are foreground


@dataclass(frozen=True)
class Stratum:
    """Proposals whose mean loss counts as one.

    Attributes:
        share: their stratum's part of all proposals, 0 to 1; the shares add up to 1.
        indices: their rows in the sample, long.
        proposals: the same as Instances, one an image.
        is_foreground: whether all are objects (True) or none (False); None if both are among them.
    """

    share: float
    indices: Tensor
    proposals: list[Instances]
    is_foreground: bool | None = None


@dataclass(frozen=True)
class ProposalSample:
    """Some or all of one step's proposals.

    Attributes:
        proposals: one an image, with ``proposal_boxes``, ``gt_classes`` (and ``gt_boxes`` if any).
        rows: (R',), where they are among all of the step's proposals, all images one after the other.
        strata: one if nothing was left out, else foreground and background of every image; empty ones are
            left out.
    """

    proposals: list[Instances]
    rows: Tensor
    strata: list[Stratum]

    def rows_of(self, proposals: list[Instances]) -> list[Instances]:
        """The sample's rows of what a cascade made of all of the step's proposals, one an image, boxes alone."""
        if sum(map(len, proposals)) == len(self.rows):
            return proposals
        boxes = torch.cat([own.proposal_boxes.tensor for own in proposals])[self.rows]
        found = []
        for own, part in zip(
            self.proposals, boxes.split([len(x) for x in self.proposals]), strict=True
        ):
            found.append(Instances(own.image_size, proposal_boxes=Boxes(part)))
        return found


def split(count: int, foreground: int, background: int) -> tuple[int, int]:
    """How many of an image's foreground and background proposals to take.

    Foreground takes up to three quarters of ``count`` (at least one), and what the other leaves.
    """
    kept = min(foreground, max(1, int(FOREGROUND_PART * count), count - background))
    return kept, min(background, count - kept)


def sample_proposals(proposals: list[Instances], num_classes: int, count: int) -> ProposalSample:
    """At most ``count`` of every image's proposals.

    Detectron2 lists foreground first and each part in random order, so that the first of each part are
    a random subset; no random number is drawn here.

    Args:
        proposals: all of the step's, one an image, with ``gt_classes``.
        num_classes: the class of background.
        count: proposals an image; 0 for all.
    """
    device = proposals[0].gt_classes.device
    sizes = [len(own) for own in proposals]
    if count == 0 or count >= max(sizes):
        rows = torch.arange(sum(sizes), device=device)
        strata = [Stratum(1.0, rows, proposals)] if len(rows) > 0 else []
        return ProposalSample(proposals, rows, strata)
    is_background = [own.gt_classes == num_classes for own in proposals]
    totals = torch.stack([b.sum() for b in is_background]).tolist()  # one wait for a GPU
    sampled, rows, strata = [], [], []
    start = place = 0  # of an image among all proposals, and in the sample
    for own, background, size, total in zip(proposals, is_background, sizes, totals, strict=True):
        # a stable sort: foreground first, each part in its own order
        order = background.to(torch.uint8).argsort(stable=True)
        objects, others = split(count, size - total, total)
        picked = torch.cat([order[:objects], order[size - total :][:others]])
        sampled.append(own[picked])
        rows.append(picked + start)
        for is_foreground, members, begin, end in (
            (True, size - total, 0, objects),
            (False, total, objects, objects + others),
        ):
            if end > begin:
                indices = torch.arange(place + begin, place + end, device=device)
                part = [sampled[-1][begin:end]]
                strata.append(Stratum(members / sum(sizes), indices, part, is_foreground))
        start, place = start + size, place + objects + others
    return ProposalSample(sampled, torch.cat(rows), strata)
