"""Further views of a step's pictures, for methods that compare what the models say of two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torchvision.transforms import v2

from era.errors import UserError
from era.modeling.detectors import Predictions
from era.modeling.teacher_cache.cache import PICTURE_KEY, UNKEYED_BY

if TYPE_CHECKING:
    from era.modeling.step import Step

# Photometric views and cutout leave every object where it is; flip mirrors each picture, and its boxes with it.
PHOTOMETRIC, CUTOUT, STRONG, FLIP = "photometric", "cutout", "strong", "flip"
SAME_GEOMETRY = (PHOTOMETRIC, CUTOUT, STRONG)
VIEWS = (*SAME_GEOMETRY, FLIP)
# Half as bright to half as bright again, and the like: RandAugment's middle for what moves nothing.
JITTER = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5}
BLUR_SIGMA = (0.1, 2.0)  # pixels
CUTOUT_AREA = (0.02, 0.2)  # of a picture


class View:
    """A step's pictures seen another way, by student and teacher; everything is computed when first asked for, once
    for all methods.

    The student runs its backbone in training mode again: batch statistics are the view's own, and running ones move
    once more. Random numbers follow from the view's name, the iteration and the process alone; the global random
    state is left as it is. A teacher's cache has no part in changed pixels.

    Args:
        step: whose pictures, models and samples these are.
        name: one of :data:`VIEWS`: ``photometric`` (brightness, contrast, saturation, blur), ``cutout`` (a
            rectangle in the student's mean colour), ``strong`` (both), ``flip`` (left to right).

    Attributes:
        batched_inputs: as the step's, with other pixels.
    """

    def __init__(self, step: Step, name: str):
        self.step, self.name = step, name
        self.batched_inputs = changed(step.batched_inputs, name, step.detector.pixel_mean)

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """The student's FPN maps, level name to (B, C_S, H, W), with gradient."""
        return self.step.detector.maps(self.batched_inputs)

    @cached_property
    def teacher_features(self) -> dict[str, Tensor]:
        """The teacher's FPN maps, cut to the student's height and width, no gradient."""
        like = self.step.student.features
        size = tuple(self.step.student.images.tensor.shape[-2:])
        return self.step.teacher.features(self.batched_inputs, like, size)

    @cached_property
    def samples(self) -> object:
        """The samples of the student's own step, where they are in this view."""
        return self.located(self.step.student.samples)

    @cached_property
    def predictions(self) -> Predictions:
        """The student's predictions on :attr:`samples`, with gradient; rows align with those of its own step. Of
        :data:`FLIP` box deltas are of mirrored boxes."""
        return self.step.detector.predict(self.features, self.samples)

    @cached_property
    def teacher_predictions(self) -> Predictions:
        """The teacher's predictions on the same samples, no gradient; rows as :attr:`predictions`."""
        return self.step.teacher.predict(self.teacher_features, self.samples)

    @cached_property
    def class_logits(self) -> tuple[Tensor, Tensor]:
        """As :attr:`Step.class_logits`, of this view; rows as there."""
        found = self.predictions.class_logits, self.teacher_predictions.class_logits
        return self.step.shared(found[0]), self.step.shared(found[1])

    def located(self, instances: list[Instances]) -> list[Instances]:
        """Boxes of the step's pictures where they are in this view."""
        return [mirrored(own) for own in instances] if self.name == FLIP else instances


def check_view(name: str, key: str, views: Sequence[str] = VIEWS) -> None:
    """A view that there is, and that serves.

    Args:
        key: the config key that names it, for the message.
        views: those that serve.

    Raises:
        UserError: it is none of them.
    """
    if name not in views:
        raise UserError(f"{key} is {name!r}: expected one of {', '.join(views)}; name one of them.")


def changed(inputs: Sequence[dict], name: str, mean: Sequence[float]) -> list[dict]:
    """Inputs with the pixels of a view; their types stay.

    Args:
        inputs: ``image`` is (3, h, w), 0 to 255; the order of the channels does not matter but to the weights of
            a grey value (saturation, contrast).
        name: one of :data:`VIEWS`.
        mean: value of each channel in a cut-out rectangle.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed(name))  # torch.manual_seed would seed GPUs too
        return [
            {**item, "image": _change(item["image"], name, mean), PICTURE_KEY: None, UNKEYED_BY: f"the view {name}"}
            for item in inputs
        ]  # fmt: skip


def mirrored(instances: Instances) -> Instances:
    """Instances whose boxes, of whatever name, are mirrored left to right within their image; the rest as it is."""
    width = instances.image_size[1]
    found = Instances(instances.image_size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            x0, y0, x1, y1 = value.tensor.unbind(1)
            value = Boxes(torch.stack([width - x1, y0, width - x0, y1], dim=1))
        found.set(name, value)
    return found


def _seed(name: str) -> int:
    text = f"{name} {get_event_storage().iter} {comm.get_rank()}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _change(image: Tensor, name: str, mean: Sequence[float]) -> Tensor:
    if name == FLIP:
        return image.flip(2)
    found = image.clamp(0, 255).to(torch.uint8)
    if name in (PHOTOMETRIC, STRONG):
        found = v2.ColorJitter(**JITTER)(found)
        found = v2.RandomApply([v2.GaussianBlur(kernel_size=5, sigma=BLUR_SIGMA)], p=0.5)(found)
    if name in (CUTOUT, STRONG):
        found = v2.RandomErasing(p=1.0, scale=CUTOUT_AREA, value=list(mean))(found)
    return found.to(image.dtype)
