"""The part of the contract for methods that use what a detector's heads say, beside their judgement by the ground truth."""

from __future__ import annotations

from torch import Tensor

from era.modeling.detectors.parts import HeadPart
from era.modeling.detectors.recording import ALL_POSITIONS, Predictions, Recording


class HeadOutputs:
    """Judgement by the heads' own outputs, the vectors of samples, parts of the heads, and foreground; nothing of it by
    default."""

    def soft_targets(
        self,
        part: str,
        features: dict[str, Tensor],
        recording: Recording,
        *,
        positions: str = ALL_POSITIONS,
    ) -> Predictions:
        """What one part of the heads says on the maps that set the example, for :meth:`soft_head_loss`: computed
        once, whatever number of maps is judged by it.

        Args:
            part: one of ``soft_parts``.
            features: level name to (B, C, H, W): this detector's own, where it is the teacher.
            recording: the student's step, for its samples.
            positions: of dense heads: ``all``, or those that the student ``sampled`` (an RPN's anchors), or that the recording
                does where the student judges all (the ``positions`` of dense detectors).

        Returns:
            Rows in the order of the positions or samples, float32, without gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} does not judge by its own outputs")

    def soft_head_loss(
        self,
        part: str,
        features: dict[str, Tensor],
        targets: Predictions,
        recording: Recording,
        *,
        samples_per_image: int = 0,
        positions: str = ALL_POSITIONS,
        temperature: float = 1.0,
    ) -> Tensor:
        """How far the outputs of one part of the heads on given maps are from ``targets``; no ground truth.

        Args:
            part: one of ``soft_parts``.
            features: level name to (B, C, H, W), at the levels that the heads read.
            targets: :meth:`soft_targets` of the same part, step and positions.
            recording: the student's step, for its samples.
            samples_per_image: judge on a part of the samples that stands for all; 0 = all.
            positions: as in :meth:`soft_targets`.
            temperature: ``tau`` of class distributions, above 0.

        Returns:
            Scalar >= 0; on the maps of the targets 0 but for a constant that sends no gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} does not judge by its own outputs")

    @property
    def vector_channels(self) -> int | None:
        """D, the width of the vector that a two-stage detector makes of each sample before its last layers; None
        where there is no such vector."""
        return None

    def vectors(self, features: dict[str, Tensor], samples: object) -> Tensor:
        """The vectors of given samples on given maps, (R, D); arguments and order as in :meth:`~era.modeling.detectors.Detector.predict`."""
        raise NotImplementedError(f"{type(self).__name__} makes no vector of a sample")

    def predict_vectors(self, vectors: Tensor) -> Predictions:
        """What the last layers say of vectors (R, D), float32: :meth:`~era.modeling.detectors.Detector.predict` is this of :meth:`vectors`."""
        raise NotImplementedError(f"{type(self).__name__} makes no vector of a sample")

    def prediction_loss(self, predictions: Predictions, recording: Recording) -> Tensor:
        """As :meth:`~era.modeling.detectors.Detector.head_loss`, of what the last layers say of the student's samples, row by row."""
        raise NotImplementedError(f"{type(self).__name__} makes no vector of a sample")

    def soft_prediction_loss(
        self, predictions: Predictions, targets: Predictions, temperature: float
    ) -> Tensor:
        """As :meth:`soft_head_loss`, of what the last layers say against what they said of other vectors, row by row."""
        raise NotImplementedError(f"{type(self).__name__} makes no vector of a sample")

    @property
    def head_parts(self) -> dict[str, HeadPart]:
        """By name, parts of the heads that methods can look into; those that are no such part are left out."""
        return {}

    @property
    def foreground_levels(self) -> set[str]:
        """Names of the levels at which :meth:`foreground` says something; none if the family does not."""
        return set()

    def foreground(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """How likely the dense head of this detector holds that there is an object at a position.

        Args:
            features: this detector's own maps, level name to (B, C, H, W), at some of ``foreground_levels``.

        Returns:
            At each of them (B, 1, H, W), from 0 to 1, float32, without gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what is foreground")
