"""One part of a detector's heads, for methods that look into it: where it can be cut in two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from era.modeling.detectors.recording import Predictions, Recording


class HeadPart(ABC):
    """A part of a detector's heads. It holds no weights of its own and no state.

    Attributes:
        names: of the hidden tensors where it is cut, the same in student and teacher if they fit together.
        channels: C of the hidden tensors.
        dense: whether these are maps (B, C, H, W); else they are vectors of samples, (R, C).
    """

    names: tuple[str, ...]
    channels: int
    dense: ClassVar[bool]

    @abstractmethod
    def own_hidden(self, recording: Recording) -> dict[str, Tensor]:
        """What the student's first piece said in this step, by name, before the activation, with gradient."""

    @abstractmethod
    def hidden(self, features: dict[str, Tensor], recording: Recording) -> dict[str, Tensor]:
        """What the first piece says on given maps at the student's samples; as :meth:`own_hidden`."""

    @abstractmethod
    def predict_hidden(self, hidden: dict[str, Tensor]) -> Predictions:
        """What the second piece, from the activation on, says of hidden tensors; float32, rows as the detector's
        ``soft_targets`` at all positions."""

    @abstractmethod
    def cross_losses(
        self,
        predictions: Predictions,
        targets: Predictions,
        recording: Recording,
        temperature: float,
    ) -> dict[str, Tensor]:
        """How far this part's predictions are from its own on the maps that set the example; no ground truth.

        Args:
            predictions, targets: of :meth:`predict_hidden`; the targets are constants.
            temperature: ``tau`` of class distributions, above 0.

        Returns:
            Scalars >= 0, ``class`` and ``box``; 0, connected to the graph, where there is nothing to compare.
        """
