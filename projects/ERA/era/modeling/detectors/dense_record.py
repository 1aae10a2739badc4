"""What a training step of a dense detector holds, watched by hooks, and the positions of it that stand for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor

from era.losses import at_least_float32
from era.modeling.detectors.proposals import split
from era.modeling.detectors.recording import Predictions, Recording

if TYPE_CHECKING:
    from era.modeling.detectors.dense import Dense

# Positions of an image at which a sample of a dense head's outputs is judged: up to three quarters of them where the
# student's anchors are objects. 64 of the 22,400 of an image of 800x1344 cost a tenth of a pass over all.
POSITIONS_PER_IMAGE = 64


@dataclass(frozen=True)
class Positions:
    """Some positions of a dense head's maps, with all anchors of each.

    Attributes:
        by_level: (image, y, x) of those of each level, long.
        rows: (n,), which of the anchors of all images these are, images one after the other; in the order of the
            levels, within one of the positions.
    """

    by_level: list[tuple[Tensor, Tensor, Tensor]]
    rows: Tensor


@dataclass
class DenseRecording(Recording):
    """A training step of a dense detector of R anchors an image (FCOS has one a position).

    Attributes:
        anchors: one :class:`Boxes` a level, pixels.
        labels: per image, (R,) classes of the anchors, ``num_classes`` where it is background, -1 where it does not count.
        boxes: per image, the matched ground-truth box of every anchor, (R, 4); of any value but at objects.
        output: what the head says, a list by level of each of its outputs, (B, A * K, H, W), with gradient.
        normaliser: what the student's losses are divided by: its running number of objects' anchors in a batch.
        num_classes: K.
        hidden: what each tower of the head holds where CrossKD cuts it, by tower a list by level, with gradient.
    """

    anchors: list[Boxes] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    output: Sequence[list[Tensor]] = ()
    normaliser: float = 1.0
    num_classes: int = 0
    hidden: dict[str, list[Tensor]] = field(default_factory=dict)
    _positions: Positions | None = field(default=None, repr=False)

    @property
    def positions(self) -> Positions:
        """Those that stand for all; taken once a step, see :func:`sample_positions`."""
        if self._positions is None:
            self._positions = sample_positions(
                torch.stack(self.labels),
                [own.shape[-2:] for own in self.output[0]],
                self.num_classes,
                POSITIONS_PER_IMAGE,
                seed=get_event_storage().iter,
            )
        return self._positions

    @property
    def counted(self) -> Tensor:
        """(rows,), which of the anchors at those positions count, being object or background."""
        return torch.cat(self.labels)[self.positions.rows] >= 0

    @property
    def samples(self) -> Tensor:
        """(n,), rows of the anchors at those positions that count."""
        return self.positions.rows[self.counted]

    @property
    def classes(self) -> Tensor:
        """Labels of those anchors."""
        return torch.cat(self.labels)[self.samples]

    def anchor_boxes(self, rows: Tensor | None = None) -> Tensor:
        """The anchors of these rows, all images one after the other, (n, 4); of all without rows."""
        anchors = Boxes.cat(self.anchors).tensor
        if rows is None:
            return anchors.repeat(len(self.labels), 1)
        return anchors[rows % len(anchors)]


def sample_positions(
    labels: Tensor, sizes: Sequence[tuple[int, int]], num_classes: int, count: int, *, seed: int
) -> Positions:
    """At most ``count`` positions of every image: those where an anchor is an object, up to three quarters of them, and
    others, both in one random order for all images, so that a batch split among processes has the same.

    The global random state is left as it is.

    Args:
        labels: (B, R), as of :class:`DenseRecording`.
        sizes: height and width of the levels.
        seed: of the order.
    """
    areas = [height * width for height, width in sizes]
    total = sum(areas)
    per_position = labels.shape[1] // total
    is_object = ((labels >= 0) & (labels < num_classes)).unflatten(1, (total, per_position)).any(2)
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randperm(total, generator=generator).to(labels.device)
    order = (rank + total * ~is_object).argsort(1)  # objects first, each part at random
    taken = torch.zeros_like(is_object)
    counts = is_object.sum(1).tolist()  # one wait for a GPU
    for own, places, objects in zip(taken, order, counts, strict=True):
        first, others = split(count, objects, total - objects)
        own[places[:first]] = True
        own[places[objects : objects + others]] = True
    by_level, rows, start = [], [], 0
    slots = torch.arange(per_position, device=labels.device)
    for (_, width), area in zip(sizes, areas, strict=True):
        image, place = taken[:, start : start + area].nonzero(as_tuple=True)
        by_level.append((image, place // width, place % width))
        first = image * labels.shape[1] + (start + place) * per_position
        rows.append((first[:, None] + slots).flatten())
        start += area
    return Positions(by_level, torch.cat(rows))


def by_anchor(maps: Sequence[Tensor], size: int) -> Tensor:
    """One output of a dense head, (B, A * size, H, W) by level, in the order of the anchors of all images, (B * R, size),
    float32."""
    return at_least_float32(torch.cat([permute_to_N_HWA_K(x, size) for x in maps], 1).flatten(0, 1))


def at_positions(maps: Sequence[Tensor], positions: Positions, size: int) -> Tensor:
    """As :func:`by_anchor`, of the anchors at some positions alone, (rows, size)."""
    found = [
        x[image, :, y, column].reshape(-1, size)
        for x, (image, y, column) in zip(maps, positions.by_level, strict=True)
    ]
    return at_least_float32(torch.cat(found))


@contextmanager
def recorded(detector: Dense) -> Iterator[DenseRecording]:
    """:meth:`Detector.record`: hooks and two wrapped methods (the model's public ``label_anchors`` and ``forward_training``)
    are put on at entry and taken off at exit."""
    model = detector.model
    recording = DenseRecording(num_classes=detector.num_classes)
    label_anchors, forward_training = model.label_anchors, model.forward_training

    def on_backbone(_module, _args, output):
        recording.features = output

    def on_stages(_module, _args, output):
        recording.stages = output

    def label_and_keep(anchors, gt_instances):
        recording.anchors = anchors
        recording.labels, recording.boxes = label_anchors(anchors, gt_instances)
        return recording.labels, recording.boxes

    def train_and_keep(images, features, predictions, gt_instances):
        recording.images, recording.targets = images, gt_instances
        recording.output = predictions
        losses = forward_training(images, features, predictions, gt_instances)
        recording.normaliser = model.loss_normalizer
        found, counted = detector.at_positions(predictions, recording.positions), recording.counted
        recording.predictions = Predictions(*(x[counted] for x in found))
        return losses

    def on_cut(tower):
        def keep(_module, args):
            recording.hidden.setdefault(tower, []).append(args[0])

        return keep

    handles = [model.backbone.register_forward_hook(on_backbone)]
    if detector.stage_shapes:
        handles.append(model.backbone.bottom_up.register_forward_hook(on_stages))
    for tower, (layers, cut) in detector.cuts.items():
        handles.append(layers[cut].register_forward_pre_hook(on_cut(tower)))
    model.label_anchors, model.forward_training = label_and_keep, train_and_keep
    try:
        yield recording
    finally:
        del model.label_anchors, model.forward_training
        for handle in handles:
            handle.remove()
