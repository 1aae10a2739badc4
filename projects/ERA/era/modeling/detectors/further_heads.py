"""The part of the contract for methods that train further heads beside a detector's own."""

from __future__ import annotations

from abc import ABC, abstractmethod

from detectron2.config import CfgNode
from torch import Tensor, nn

from era.modeling.detectors.recording import Predictions, Recording


class NewBoxHead(nn.Module, ABC):
    """A further head of a detector's form, see :meth:`Detector.new_box_head`."""

    @abstractmethod
    def forward(self, pooled: Tensor) -> Predictions:
        """What it says of pooled features (R, C, P, P), float32."""

    @abstractmethod
    def learns(self, *, classes: bool, boxes: bool) -> None:
        """Freeze what only a loss of classes or of boxes would train, where there is no such loss."""


class FurtherHeads:
    """What a detector pools at its samples, and fresh heads of its form; nothing of it by default."""

    @property
    def pooled_shape(self) -> tuple[int, int, int] | None:
        """(C, P, P) of what a two-stage detector pools out of its maps for each sample, ``roi_features`` of its recordings;
        None where nothing is pooled."""
        return None

    def pooled(self, feature_map: Tensor, stride: int, samples: object) -> Tensor:
        """What is pooled at given samples out of one map alone, (R, C, P, P), with gradient.

        Args:
            feature_map: (B, C, H, W), of any C.
            stride: pixels of the picture in one of the map.
            samples: as in :meth:`era.modeling.detectors.Detector.predict`.
        """
        raise NotImplementedError(f"{type(self).__name__} pools nothing")

    def new_box_head(self, cfg: CfgNode) -> NewBoxHead:
        """A further head of the form of this detector's own, with weights of its own, from (R, C, P, P) of
        :attr:`pooled_shape`.

        Args:
            cfg: the config that this detector was built from.
        """
        raise NotImplementedError(f"{type(self).__name__} pools nothing")

    @property
    def keypoint_form(self) -> tuple[int, int] | None:
        """Channels of the recordings' ``keypoints.features`` and the number of joints; None where there are no heatmaps of
        keypoints."""
        return None

    def new_keypoint_head(self, cfg: CfgNode) -> nn.Module:
        """As :meth:`new_box_head`, of keypoints: a module whose ``layers`` turn the recording's ``keypoints.features`` into
        heatmap logits (N, J, S, S); only with a :attr:`keypoint_form`."""
        raise NotImplementedError(f"{type(self).__name__} makes no heatmaps of keypoints")

    def keypoint_loss(self, heatmaps: Tensor, recording: Recording) -> Tensor:
        """This detector's own loss of heatmap logits (N, J, S, S) of the recording's ``keypoints``, against the ground
        truth."""
        raise NotImplementedError(f"{type(self).__name__} makes no heatmaps of keypoints")
