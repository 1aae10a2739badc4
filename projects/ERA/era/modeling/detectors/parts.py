"""One part of a detector's heads, for methods that look into it: where it can be cut in two, and its loss of classes
sample by sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from era.modeling.detectors.recording import Predictions, Recording


class HeadPart(ABC):
    """A part of a detector's heads. It holds no weights of its own and no state.

    Attributes:
        names: of the hidden tensors where it is cut, the same in student and teacher if they fit together.
        channels: C of the hidden tensors; None if it cannot be cut.
        dense: whether these are maps (B, C, H, W); else they are vectors of samples, (R, C).
        class_loss: the name of its loss of classes among ``Detector.task_losses``.
        exclusive: whether a sample is of exactly one class, so that the logits are those of one distribution.
    """

    names: tuple[str, ...]
    channels: int | None
    dense: ClassVar[bool]
    class_loss: str
    exclusive: bool

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

    @abstractmethod
    def own_logits(self, recording: Recording) -> Tensor:
        """What the student said of the classes in this step, row by row as the values of ``class_loss``: (n, C + 1), or
        (n,) of one class that is there or not; with gradient."""

    @abstractmethod
    def truth(self, recording: Recording) -> Tensor:
        """The right class of every row, (n,), long; 1 and 0 where there is one class."""

    @abstractmethod
    def mirrored_logits(
        self, features: dict[str, Tensor], recording: Recording, width: int
    ) -> Tensor:
        """What this part says of the classes on the maps of mirrored pictures, at the mirror images of the student's
        samples; rows as :meth:`own_logits`, float32, without gradient.

        Args:
            features, width: of :meth:`~era.modeling.teacher.Teacher.mirrored_maps`.
        """
