"""The part of the contract for a detector that is read in another one's words: its classes, and its levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# The logit of a class that a detector does not know: its probability is exactly 0, in float16 too.
NEVER = -1e4


class ClassLayer(NamedTuple):
    """A last layer with an output for every class: rows of its weight (out, ...) in the order (groups, classes, size).

    Attributes:
        module: a linear layer or a convolution.
        groups: anchors of a position.
        size: outputs for a class.
        background: whether every group ends in one output more, the background's.
        absent: bias of a class that is not there.
    """

    module: nn.Module
    groups: int = 1
    size: int = 1
    background: bool = False
    absent: float = 0.0

    def rows(self, index: Sequence[int | None], num_classes: int) -> Tensor:
        """Which rows the outputs for these classes, group by group and with the background, are.

        Args:
            index: classes of this layer, None for one that it lacks.
            num_classes: K of this layer.

        Returns:
            (groups * (len(index) * size + background),), long, on the CPU; -1 for what it lacks.
        """
        of_group = num_classes * self.size + self.background
        found = []
        for start in range(0, self.groups * of_group, of_group):
            for own in index:
                first = start + (0 if own is None else own * self.size)
                found += [-1 if own is None else first + i for i in range(self.size)]
            found += [start + of_group - 1] * self.background
        return torch.tensor(found, dtype=torch.long)

    @torch.no_grad()
    def read(self, rows: Tensor) -> None:
        """Keep these rows alone, in this order; -1 is a new one with weights of 0 and the bias ``absent``."""
        old, is_new = self.module.weight, (rows < 0).to(self.module.weight.device)
        kept = rows.clamp(min=0).to(old.device)
        weight, bias = old[kept].clone(), self.module.bias[kept].clone()
        weight[is_new], bias[is_new] = 0.0, self.absent
        self.module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        self.module.bias = nn.Parameter(bias, requires_grad=self.module.bias.requires_grad)
        for name in ("out_features", "out_channels"):
            if hasattr(self.module, name):
                setattr(self.module, name, len(rows))


class Reading:
    """A detector read as one of other classes, and with other names of its levels. Which classes it knows is an attribute
    of its model, ``known_classes``, so that a copy of the model says the same."""

    model: nn.Module
    num_classes: int

    def class_layers(self) -> dict[str, ClassLayer]:
        """The layers with an output for every class, by their names in the model."""
        raise NotImplementedError(f"{type(self).__name__} does not say which layers tell classes")

    def set_num_classes(self, count: int) -> None:
        """Tell the model how many foreground classes its layers have."""
        raise NotImplementedError(f"{type(self).__name__} does not say where K is kept")

    def rename_levels(self, names: Mapping[str, str]) -> None:
        """The heads read their feature maps by new names from now on.

        Args:
            names: of every level of the backbone its new one.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which levels its heads read")

    def read_classes(self, index: Sequence[int | None]) -> None:
        """Become, in place, a detector of ``len(index)`` classes, the i-th of which is the class ``index[i]`` of now; None is
        a class that it does not know: its probability is 0, and softmax is over the others and background.

        Raises:
            UserError: its heads are of a form that cannot be read by class.
        """
        count = self.num_classes
        for layer in self.class_layers().values():
            layer.read(layer.rows(index, count))
        self.set_num_classes(len(index))
        if None in index:
            self.model.known_classes = tuple(own is not None for own in index)

    @property
    def known_classes(self) -> tuple[bool, ...] | None:
        """Of every class whether it is known; None if all are."""
        return getattr(self.model, "known_classes", None)

    @property
    def num_known_classes(self) -> int:
        """Foreground classes that it knows."""
        known = self.known_classes
        return self.num_classes if known is None else sum(known)

    def knows(self, classes: Tensor) -> Tensor:
        """Of samples of these classes, (R,), whether a judgement by the class can be asked for: it is known, or background.

        Labels below 0, of what does not count, are known.
        """
        known = torch.tensor([*self.known_classes, True], device=classes.device)
        return known[classes.clamp(min=0)] | (classes < 0)

    def shared_logits(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Class logits (R, K + 1), this detector's or another one's in the same order, as far as this one can compare them.

        Args:
            classes: the class of each sample, (R,), K for background.

        Returns:
            The rows of samples that it :meth:`knows`, and the columns of known classes and background: their softmax is over
            these. All, the same tensor, where every class is known.
        """
        if self.known_classes is None:
            return logits
        columns = torch.tensor([*self.known_classes, True], device=logits.device)
        return logits[self.knows(classes)][:, columns]

    def shared_labels(self, classes: Tensor) -> Tensor:
        """The class of each row of :meth:`shared_logits` as the number of its column."""
        if self.known_classes is None:
            return classes
        columns = torch.tensor([*self.known_classes, True], device=classes.device).cumsum(0) - 1
        return columns[classes[self.knows(classes)]]
