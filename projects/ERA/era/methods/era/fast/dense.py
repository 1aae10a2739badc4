"""The teacher's dense head on factored estimates at sampled positions alone, with its soft losses there.

An output of a tower of n 3x3 convs depends on a square of 2n + 3 positions. So each layer runs at the sampled positions and
those that the layers after it read, and neighbouring samples share: of an image of 800x1344 a tenth of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from era.losses import at_least_float32
from era.methods.era.fast.factored import FactoredEstimates
from era.methods.era.fast.levers import ALL_ON, Levers
from era.methods.era.fast.patches import Places, conv_at, is_plain_conv
from era.methods.era.twi import NO_SOFT_JUDGES, SoftJudges
from era.modeling.detectors import Predictions
from era.modeling.detectors.dense import Dense
from era.modeling.detectors.dense_record import DenseRecording
from era.modeling.detectors.recording import SAMPLED_POSITIONS


@dataclass(frozen=True)
class Reach:
    """Where each of L 3x3 convs, one after the other, must run.

    Attributes:
        first: by level, where the first one does; rows of the levels one after the other.
        neighbours: of every other one, (P, 9), the rows of the one before that each of its own P rows reads, in the order of
            a kernel; the number of rows, one too many, outside the map.
    """

    first: list[Places]
    neighbours: list[Tensor]


def reach(positions: Sequence[Places], maps: Sequence[Tensor], layers: int) -> Reach:
    """Where convs must run whose last one is wanted at some positions.

    Args:
        positions: by level, in the order of images, rows and columns.
        maps: by level (B, C, H, W), for their sizes.
        layers: L.
    """
    by_layer = [list(positions)]
    for _ in range(layers - 1):
        by_layer.insert(0, [_read_at(own, x) for own, x in zip(by_layer[0], maps, strict=True)])
    offset = torch.arange(-1, 2, device=positions[0][0].device)
    neighbours = []
    for before, after in itertools.pairwise(by_layer):
        start, outside, rows = 0, sum(len(own[0]) for own in before), []
        for read, wanted, x in zip(before, after, maps, strict=True):
            images, _, height, width = x.shape
            number = torch.full((images, height + 2, width + 2), outside, device=offset.device)
            image, y, column = read
            number[image, y + 1, column + 1] = start + torch.arange(len(y), device=y.device)
            start += len(y)
            image, y, column = (own[:, None, None] for own in wanted)
            found = number[image, y + 1 + offset[:, None], column + 1 + offset]
            rows.append(found.flatten(1))
        neighbours.append(torch.cat(rows))
    return Reach(by_layer[0], neighbours)


def _read_at(where: Places, maps: Tensor) -> Places:
    """The positions that a 3x3 conv reads to be run at some."""
    images, _, height, width = maps.shape
    mask = maps.new_zeros(images, 1, height, width, dtype=torch.float32)
    image, y, column = where
    mask[image, 0, y, column] = 1
    return F.max_pool2d(mask, 3, stride=1, padding=1)[:, 0].nonzero(as_tuple=True)


def conv_of_rows(conv: nn.Conv2d, hidden: Tensor, neighbours: Tensor) -> Tensor:
    """A 3x3 conv, (E, P', C), of what the one before it said at some positions, (E, P, C_in), at those of ``neighbours``,
    (P', 9)."""
    padded = F.pad(hidden, (0, 0, 0, 1))
    patches = padded.index_select(1, neighbours.flatten()).unflatten(1, neighbours.shape)
    return F.linear(patches.flatten(2), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


class FastDense:
    """A dense teacher's head on factored estimates; it knows soft judgements at sampled positions of a head without norms.

    Args:
        judge: the teacher.
        levers: what is switched on.
        soft: how the head judges softly.
    """

    def __init__(self, judge: Dense, levers: Levers = ALL_ON, soft: SoftJudges = NO_SOFT_JUDGES):
        self.judge = judge
        self.soft = soft
        self.sparse = levers.sparse_dense and knows_dense_head(judge)

    def describe(self) -> str:
        """Which paths run, for the log."""
        return f"soft pass of the dense head {'sparse' if self.knows_soft('dense') else 'dense (as defined)'}"

    def knows(self, part: str) -> bool:
        """Nothing against the ground truth: focal losses look at all positions."""
        return False

    def knows_soft(self, part: str) -> bool:
        """At sampled positions, where the head is one that it can run there."""
        return self.sparse and self.soft.positions == SAMPLED_POSITIONS

    def losses(
        self,
        part: str,
        estimates: FactoredEstimates,
        weights: list[float],
        recording: DenseRecording,
        *,
        hard: bool = False,
        target: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """As :func:`era.methods.era.twi.soft_twi_loss` under ``soft``.

        Args:
            target: ``F_T``, level name to (B, C_T, H, W).
        """
        judge, positions = self.judge, recording.positions
        levels = judge.model.head_in_features
        maps = [target[level] for level in levels]
        where = reach(positions.by_level, maps, 1 + len(_convs(judge.model.head.cls_subnet)))
        with torch.no_grad():
            alone = FactoredEstimates(target, {}, None, 0, nn.Identity())  # e_0, no branches
            (expected,) = self._predictions(alone, where)
        anchors = recording.anchor_boxes(positions.rows)
        found = [
            weight * judge.soft_losses(own, expected, anchors)
            for weight, own in zip(weights, self._predictions(estimates, where), strict=True)
        ]
        return {"soft": sum(found)}

    def _predictions(self, estimates: FactoredEstimates, where: Reach) -> list[Predictions]:
        """What the head says of every estimate at the positions."""
        model = self.judge.model
        towers = [_convs(model.head.cls_subnet), _convs(model.head.bbox_subnet)]
        first = [convs[0] for convs in towers]
        hidden = conv_at(first, estimates, model.head_in_features, where.first)
        outputs = []
        last = [["cls_score"], ["bbox_pred", "ctrness"]]
        for own, convs, names in zip(hidden, towers, last, strict=True):
            own = torch.relu(own)
            for conv, neighbours in zip(convs[1:], where.neighbours, strict=False):
                own = torch.relu(conv_of_rows(conv, own, neighbours))
            outputs += [
                conv_of_rows(getattr(model.head, name), own, where.neighbours[-1])
                for name in names
                if hasattr(model.head, name)
            ]
        return [
            self.judge.at_anchors(output, lambda x, size: at_least_float32(x.reshape(-1, size)))
            for output in zip(*outputs, strict=True)
        ]


def _convs(tower: nn.Sequential) -> list[nn.Conv2d]:
    return [layer for layer in tower if isinstance(layer, nn.Conv2d)]


def knows_dense_head(judge: Dense) -> bool:
    """Whether the sparse pass can stand for the head: two towers of as many 3x3 convs with a ReLU each, at least one, and 3x3
    convs as last layers."""
    head = judge.model.head
    towers = [list(head.cls_subnet), list(head.bbox_subnet)]
    last = [head.cls_score, head.bbox_pred, *([head.ctrness] if hasattr(head, "ctrness") else [])]
    return (
        len(towers[0]) == len(towers[1]) > 0
        and all(is_plain_conv(conv) for tower in towers for conv in tower[::2])
        and all(isinstance(layer, nn.ReLU) for tower in towers for layer in tower[1::2])
        and len(towers[0]) % 2 == 0
        and all(map(is_plain_conv, last))
    )
