"""What the frame and the methods ask of a detector, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from era.errors import UserError
from era.modeling.detectors.batches import Batches
from era.modeling.detectors.further_heads import FurtherHeads
from era.modeling.detectors.head_outputs import HeadOutputs
from era.modeling.detectors.reading import Reading
from era.modeling.detectors.recording import Predictions, Recording, TaskLoss


class Detector(HeadOutputs, FurtherHeads, Reading, Batches, ABC):
    """A stock Detectron2 model seen as a detector of one family.

    Not a module and without state of its own: it uses the model that it is given. A family is one file of
    this package with one registered subclass; student and teacher may be of different families.

    Attributes:
        meta_architecture: the stock meta-architecture that stands for the family in messages.
        heads: names of the model's submodules that come after the backbone and hold its heads.
        parts: names of the heads that can judge features, see :meth:`head_loss`.
        soft_parts: those of them that can judge by their own outputs, see :meth:`soft_head_loss`.
        running: names of the model's plain numbers that a training forward moves and its ``state_dict`` lacks, such as a
            running normaliser of its losses.
    """

    meta_architecture: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    soft_parts: ClassVar[tuple[str, ...]] = ()
    running: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module):
        self.model = model

    # ---- what it is ------------------------------------------------------------------------------

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add the keys of the family that stock Detectron2 lacks, under ``MODEL``, in place; by default none."""

    @classmethod
    @abstractmethod
    def describes(cls, cfg: CfgNode) -> bool:
        """Whether a stock config builds a detector of this family."""

    @classmethod
    def title(cls, cfg: CfgNode) -> str:
        """What people call the detector that a stock config describes, for reports."""
        return cls.meta_architecture

    @classmethod
    def lazy_keys(cls, target: object, node: Mapping) -> list | None:
        """What a LazyConfig says of a model, as config keys and values of this family.

        Args:
            target: what the config calls to build the model.
            node: its arguments.

        Returns:
            ``[KEY, VALUE, ...]``; None if it builds no detector of this family, as by default.
        """
        return None

    @classmethod
    @abstractmethod
    def holds(cls, model: nn.Module) -> bool:
        """Whether a model is of this family."""

    @classmethod
    @abstractmethod
    def num_classes_in(cls, cfg: CfgNode) -> int:
        """Foreground classes that a stock config of this family asks for."""

    @classmethod
    @abstractmethod
    def num_classes_key(cls) -> str:
        """The config key of :meth:`num_classes_in`, for messages."""

    @classmethod
    def check_config(cls, cfg: CfgNode, *, what: str = "") -> None:
        """What a stock config of this family must say beyond what Detectron2 puts into words; by default nothing.

        Args:
            what: of whom the config is, such as ``the teacher's ``, for the message.

        Raises:
            UserError: names the key, what was found, what was expected and what to do.
        """

    @abstractmethod
    def check_student(self) -> None:
        """The model can be watched in training.

        Raises:
            UserError: says what it has, what is expected and which key to change.
        """

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Foreground classes."""

    @property
    def family(self) -> type[Detector]:
        """Whose form the heads have, for what needs two models of one form."""
        return type(self)

    def first_stage(self) -> Detector:
        """This detector with the first of several heads that see a box one after the other (a cascade), as if the others
        were not there; itself where there is one head."""
        return self

    @property
    def feature_shapes(self) -> dict[str, ShapeSpec]:
        """Channels and strides of the feature maps by level name."""
        return self.model.backbone.output_shape()

    @property
    def stage_shapes(self) -> dict[str, ShapeSpec]:
        """Channels and strides of the stages of the bottom-up network that the FPN is built on, by name; none for a
        backbone of another form."""
        bottom_up = getattr(self.model.backbone, "bottom_up", None)
        return bottom_up.output_shape() if bottom_up is not None else {}

    @property
    def pixel_mean(self) -> list[float]:
        """Mean of each channel, in the model's order, 0 to 255."""
        return self.model.pixel_mean.flatten().tolist()

    @property
    @abstractmethod
    def head_levels(self) -> set[str]:
        """Names of the feature maps that the heads read."""

    @property
    @abstractmethod
    def mask_on(self) -> bool:
        """Whether it predicts masks."""

    @property
    @abstractmethod
    def keypoint_on(self) -> bool:
        """Whether it predicts keypoints."""

    # ---- training --------------------------------------------------------------------------------

    @abstractmethod
    def record(self) -> AbstractContextManager[Recording]:
        """Watch the model's next training forward; what it produces is in the recording afterwards.

        The model's own ``forward`` runs unchanged, so its losses are those of plain training. Nothing is
        left on the model, also when the forward fails.
        """

    def maps(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """The model's FPN maps of other inputs of the form of its own, level name to (B, C, H, W); with gradient and
        batch statistics as the model's mode has them."""
        return self.model.backbone(self.model.preprocess_image(batched_inputs).tensor)

    def running_state(self) -> dict[str, float]:
        """The values of ``running``, by name, as far as the model has them by now: with the weights and the optimiser they
        are what training goes on from."""
        return {
            name: float(getattr(self.model, name))
            for name in self.running
            if hasattr(self.model, name)
        }

    def load_running_state(self, state: dict[str, float]) -> None:
        """Inverse of :meth:`running_state`; names that are not ``running`` are left out."""
        for name in self.running:
            if name in state:
                setattr(self.model, name, state[name])
            elif hasattr(self.model, name):
                delattr(self.model, name)

    @contextmanager
    def running_kept(self) -> Iterator[None]:
        """Whatever is trained inside, ``running`` is afterwards what it was before: for a forward whose losses are
        dropped."""
        before = self.running_state()
        try:
            yield
        finally:
            self.load_running_state(before)

    @abstractmethod
    def boxes_alone(self) -> AbstractContextManager[None]:
        """Inside, heads that say more of an object than class and box (masks, keypoints) do not run, in training
        and inference: their losses and outputs are not there, and their ground truth is not needed."""

    @abstractmethod
    def predict(self, features: dict[str, Tensor], samples: object) -> Predictions:
        """What the heads say on given feature maps.

        Args:
            features: level name to (B, C, H, W).
            samples: where: a recording's samples of the same family, for a two-stage detector one
                :class:`Instances` with ``proposal_boxes`` an image.

        Returns:
            Rows in the order of the samples, float32.
        """

    @abstractmethod
    def check_class_distributions(self, student: Detector, reason: str) -> None:
        """These heads predict on the student's samples, and the class logits of both models are of one distribution a
        sample, the softmax over classes and background; arguments and errors as of :meth:`check_judge`."""

    @abstractmethod
    def task_losses(self, recording: Recording) -> dict[str, TaskLoss]:
        """The student's own losses sample by sample, under the names that its forward gives them.

        Only those that can be weighted by sample; each one's sum over its normaliser is Detectron2's.
        """

    @abstractmethod
    def check_judge(self, student: Detector, reason: str) -> None:
        """These heads can judge feature maps by the student's samples.

        Args:
            reason: what needs it, for the message.

        Raises:
            UserError: says what does not fit.
        """

    @abstractmethod
    def head_loss(
        self,
        part: str,
        features: dict[str, Tensor],
        recording: Recording,
        *,
        samples_per_image: int = 0,
    ) -> Tensor:
        """This detector's own loss of one part of its heads, on given feature maps, against the ground truth.

        Args:
            part: one of ``parts``.
            features: level name to (B, C, H, W), at the levels that the heads read.
            recording: the student's step, for its samples and their ground truth.
            samples_per_image: judge on a part of the samples that stands for all; 0 = all.

        Returns:
            Scalar, with this detector's loss settings and the student's normaliser.
        """

    # ---- the teacher's heads in the student ------------------------------------------------------

    @abstractmethod
    def coder_settings(self) -> dict[str, tuple]:
        """What the heads' outputs mean beyond their weights: box coders, by config key."""

    def check_equal_heads(self, other: Detector, *, fpn: bool = False, reason: str) -> None:
        """Heads, and the FPN if asked for, have the same weights by name and shape and the same coders.

        Args:
            reason: the config setting that needs it, for the message.

        Raises:
            UserError: names the first weight or setting that differs.
        """
        if self.family is not other.family:
            raise UserError(
                f"{reason} needs student and teacher of one family: the student is a "
                f"{type(self).__name__}, the teacher a {type(other).__name__}; name another teacher."
            )
        own, theirs = (detector.inheritable(fpn=fpn) for detector in (self, other))
        for key in sorted(own.keys() | theirs.keys()):
            shapes = [tuple(x[key].shape) if key in x else "absent" for x in (own, theirs)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{reason} needs student and teacher heads of equal shape: {key} is {shapes[0]} in the "
                    f"student and {shapes[1]} in the teacher; make the student's heads and "
                    f"MODEL.FPN.OUT_CHANNELS equal to the teacher's{', or inherit the heads alone' if fpn else ''}."
                )
        settings = other.coder_settings()
        for key, value in self.coder_settings().items():
            if value != settings[key]:
                raise UserError(
                    f"{reason} needs equal box coders: {key} is {value} in the student and "
                    f"{settings[key]} in the teacher; make them equal."
                )

    def inheritable(self, *, fpn: bool) -> dict[str, Tensor]:
        """The weights of the heads by name, and those of the FPN (all of the backbone but its bottom-up
        network) if asked for."""
        return {
            key: value
            for key, value in self.model.state_dict().items()
            if key.split(".")[0] in self.heads
            or (fpn and key.startswith("backbone.") and not key.startswith("backbone.bottom_up."))
        }

    def check_inherits(self, teacher: Detector, *, fpn: bool, reason: str) -> None:
        """:meth:`inherit` is possible; arguments and errors as of :meth:`check_equal_heads`."""
        self.check_equal_heads(self._heir_to(teacher), fpn=fpn, reason=reason)

    @torch.no_grad()
    def inherit(self, teacher: Detector, *, fpn: bool) -> None:
        """Copy the teacher's weights into the heads, and into the FPN if asked for; of a teacher with a cascade of heads
        those of its first stage, where this detector has one head. What is for a class that the teacher does not know stays
        as it is."""
        own, known = self.inheritable(fpn=fpn), teacher.known_classes
        layers = {} if known is None else self.class_layers()
        for key, value in self._heir_to(teacher).inheritable(fpn=fpn).items():
            layer = layers.get(key.rpartition(".")[0])
            if layer is None:
                own[key].copy_(value)
            else:
                rows = layer.rows([i if k else None for i, k in enumerate(known)], len(known))
                rows = rows[rows >= 0].to(value.device)
                own[key][rows] = value[rows]

    def _heir_to(self, teacher: Detector) -> Detector:
        """The teacher, or its first stage where that alone is of this detector's form."""
        first = teacher.first_stage()
        return first if first.family is self.family else teacher

    # ---- inference -------------------------------------------------------------------------------

    @abstractmethod
    def detect(self, batched_inputs: list[dict], do_postprocess: bool = True) -> list:
        """Detections of an eval-mode model: a dict with ``instances`` an image, in pixels of the original
        image, or without postprocessing raw :class:`Instances` in pixels of the input."""

    @abstractmethod
    def detect_on(self, features: dict[str, Tensor], images: ImageList) -> list[Instances]:
        """What the heads of an eval-mode model detect on its own feature maps.

        Args:
            features: level name to (B, C, H, W), all levels of the backbone.
            images: the batch that they were computed from.

        Returns:
            ``pred_boxes``, ``scores`` and ``pred_classes`` an image, boxes in pixels of the batch.
        """

    @property
    @abstractmethod
    def thresholds(self) -> dict[str, float | int]:
        """``score_threshold``, ``nms_threshold`` (IoU) and ``max_detections`` an image."""

    @abstractmethod
    def set_score_threshold(self, value: float) -> None:
        """Detect only what has a higher score than this."""

    @abstractmethod
    def blended(
        self, teacher: Detector, estimate: Callable[[dict, Tensor], dict], alpha: float
    ) -> Callable[..., list]:
        """A detector that predicts ``(1 - alpha) * own heads + alpha * teacher's heads``.

        Args:
            teacher: of the same family, :meth:`check_judge` passed; below alpha 1 with equal coders.
            estimate: from this model's feature maps, and the batch (B, 3, height, width) that they were computed from, to
                the maps that the teacher's heads are to see.
            alpha: above 0, at most 1.

        Returns:
            A callable with the arguments and results of :meth:`detect`.
        """

    @abstractmethod
    def with_heads_of(self, teacher: Detector, backbone: Backbone) -> nn.Module:
        """An ordinary model of the family, in eval mode: another backbone, copies of the teacher's heads with
        this detector's test settings, this detector's preprocessing.

        Raises:
            UserError: it predicts masks or keypoints, which would need heads of both.
        """
