"""What a training step of a detector leaves for the methods, and the forms of what its heads say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from detectron2.structures import ImageList, Instances
from torch import Tensor

from era.modeling.detectors.proposals import ProposalSample

# Where the soft judgements of dense heads look.
ALL_POSITIONS, SAMPLED_POSITIONS = "all", "sampled"


class Predictions(NamedTuple):
    """What a detector's heads say about R samples (proposals, or positions of dense heads).

    Attributes:
        class_logits: (R, K + 1) with the background last, or (R, K) of sigmoid heads.
        box_deltas: (R, 4K) or (R, 4), in the family's own box coding.
    """

    class_logits: Tensor
    box_deltas: Tensor


@dataclass(frozen=True)
class TaskLoss:
    """One of the student's own losses before it is summed: ``values.sum() / normaliser``.

    Attributes:
        values: (n,), one a sample, Detectron2's loss weight included, with gradient.
        normaliser: what Detectron2 divides the sum by.
        rows: (n,), which of the step's anchors or proposals each value belongs to, all images one after
            the other.
    """

    values: Tensor
    normaliser: float
    rows: Tensor

    def weighted(self, weights: Tensor) -> Tensor:
        """The loss with a weight for every value, (n,); ones give Detectron2's own."""
        return (self.values * weights).sum() / self.normaliser


@dataclass
class KeypointSamples:
    """What a keypoint head was given in a training step, and what it said.

    Attributes:
        features: pooled at N objects, (N, C, P, P), with gradient.
        proposals: those objects with ``gt_keypoints``, one an image.
        heatmaps: logits of J joints, (N, J, S, S), with gradient.
    """

    features: Tensor
    proposals: list[Instances]
    heatmaps: Tensor = None


@dataclass
class Recording:
    """What a training step of the student produced on its way to the losses; families add to it.

    Attributes:
        images: the student's preprocessed, padded batch.
        targets: ground truth of each image, boxes in pixels of the resized image.
        features: FPN maps, level name to (B, C_S, H, W), with gradient.
        stages: maps of the bottom-up network that the FPN is built on (``res2`` to ``res5``), name to (B, C, H, W),
            with gradient; see :attr:`Detector.stage_shapes`.
        predictions: of the student's heads on its samples, with gradient.
        vectors: what a head makes of each sample before its last layers, (R, D), with gradient, where
            :attr:`Detector.vector_channels` says that there is such a vector.
        keypoints: of the keypoint head; None if there is none, or it did not run (:meth:`Detector.boxes_alone`).
    """

    images: ImageList = None
    targets: list[Instances] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    stages: dict[str, Tensor] = field(default_factory=dict)
    predictions: Predictions = None
    vectors: Tensor = None
    keypoints: KeypointSamples = None

    @property
    def samples(self) -> object:
        """Where :meth:`Detector.predict` is to predict so that its rows align with ``predictions``."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its samples are")

    @property
    def classes(self) -> Tensor:
        """The ground-truth class of each sample, (R,), ``Detector.num_classes`` where it is background; rows align with
        ``predictions``."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say what class its samples are of"
        )

    def sample(self, per_image: int) -> ProposalSample:
        """A part of the samples that stands for all, with its strata (0 = all); taken once a step."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how to take a part of its samples"
        )
