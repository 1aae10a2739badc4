"""On which of the student's sampled proposals the teacher's ROI head judges, and with what weight.

``e_0`` is judged on all: it has the largest weight, and the student has pooled it already. To pool N more
estimates is what Teacher Weight Integration costs, so for them a part can stand for the whole. It is a
stratified sample of every image: foreground, which carries the class and every box loss, is preferred,
and each stratum's mean counts with the stratum's share of the whole. The expected loss is then that of all
proposals, and a batch split among processes gives the same loss as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor

from era.modeling.detectors.rcnn import Recording

FOREGROUND_PART = 0.75  # of the proposals that are looked at, at most so many are foreground


@dataclass(frozen=True)
class Stratum:
    """Proposals whose mean loss counts as one.

    Attributes:
        share: their stratum's part of the whole sample, 0 to 1; the shares add up to 1.
        indices: rows of the chosen proposals, long.
        proposals: the same as Instances, one an image.
        is_foreground: whether all are objects (True) or none (False); None if both are among them.
    """

    share: float
    indices: Tensor
    proposals: list[Instances]
    is_foreground: bool | None = None


@dataclass(frozen=True)
class ChosenProposals:
    """A choice from one step's sampled proposals.

    Attributes:
        proposals: one an image, with ``proposal_boxes``, ``gt_classes`` (and ``gt_boxes`` if any).
        rows: (R',) of the chosen in the student's sample, all images one after the other.
        strata: one if everything was chosen, else foreground and background of every image; empty ones
            are left out.
    """

    proposals: list[Instances]
    rows: Tensor
    strata: list[Stratum]


def chosen_proposals(step: Recording, num_classes: int, count: int) -> ChosenProposals:
    """At most ``count`` of every image's sampled proposals; chosen once a step, whoever asks.

    Detectron2 lists foreground first and each part in random order, so that the first of each part are
    a random subset; no random number is drawn here.

    Args:
        step: the student's step.
        num_classes: the class of background.
        count: proposals an image; 0 for all.
    """
    if count not in step.chosen:
        step.chosen[count] = _choose(step.proposals, num_classes, count)
    return step.chosen[count]


def split(count: int, foreground: int, background: int) -> tuple[int, int]:
    """How many of an image's foreground and background proposals to look at.

    Foreground takes up to three quarters of ``count`` (at least one), and what the other leaves.
    """
    kept = min(foreground, max(1, int(FOREGROUND_PART * count), count - background))
    return kept, min(background, count - kept)


def _choose(proposals: list[Instances], num_classes: int, count: int) -> ChosenProposals:
    device = proposals[0].gt_classes.device
    sizes = [len(own) for own in proposals]
    if count == 0 or count >= max(sizes):
        rows = torch.arange(sum(sizes), device=device)
        strata = [Stratum(1.0, rows, proposals)] if len(rows) > 0 else []
        return ChosenProposals(proposals, rows, strata)
    is_background = [own.gt_classes == num_classes for own in proposals]
    totals = torch.stack([b.sum() for b in is_background]).tolist()  # one wait for a GPU
    chosen, rows, strata = [], [], []
    start = place = 0  # of an image in the whole sample, and among the chosen
    for own, background, size, total in zip(proposals, is_background, sizes, totals, strict=True):
        # a stable sort: foreground first, each part in its own order
        order = background.to(torch.uint8).argsort(stable=True)
        objects, others = split(count, size - total, total)
        picked = torch.cat([order[:objects], order[size - total :][:others]])
        chosen.append(own[picked])
        rows.append(picked + start)
        for is_foreground, members, begin, end in (
            (True, size - total, 0, objects),
            (False, total, objects, objects + others),
        ):
            if end > begin:
                indices = torch.arange(place + begin, place + end, device=device)
                part = [chosen[-1][begin:end]]
                strata.append(Stratum(members / sum(sizes), indices, part, is_foreground))
        start, place = start + size, place + objects + others
    return ChosenProposals(chosen, torch.cat(rows), strata)
