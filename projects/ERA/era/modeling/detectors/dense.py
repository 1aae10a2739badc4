"""Dense detectors: Detectron2's ``DenseDetector``, one head over all positions of an FPN. RetinaNet and FCOS are families of it."""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from fvcore.nn import giou_loss
from torch import Tensor, nn

from era.errors import UserError
from era.losses import at_least_float32
from era.modeling.detectors.base import Detector
from era.modeling.detectors.dense_batches import DenseBatches
from era.modeling.detectors.dense_inference import BlendedDense
from era.modeling.detectors.dense_losses import (
    object_probability,
    soft_class_losses,
    soft_dense_loss,
)
from era.modeling.detectors.dense_parts import DensePart
from era.modeling.detectors.dense_record import (
    DenseRecording,
    Positions,
    at_positions,
    by_anchor,
    recorded,
)
from era.modeling.detectors.parts import HeadPart
from era.modeling.detectors.reading import NEVER, ClassLayer
from era.modeling.detectors.recording import (
    ALL_POSITIONS,
    SAMPLED_POSITIONS,
    Predictions,
    TaskLoss,
)
from era.registry import architecture_of


class Dense(DenseBatches, Detector):
    """A ``DenseDetector`` with a head of two towers, as :class:`detectron2.modeling.meta_arch.retinanet.RetinaNetHead`;
    classes are independent sigmoids. A subclass says what its head's outputs are and how they are judged.

    The one part of the heads is ``dense``. Its predictions are class logits (n, K) and the rest of what it says of an anchor,
    (n, 4 or more), at all anchors of all images, or at those of a sample of positions.

    Attributes:
        model_class: the stock model.
        keys: name of the config node of the family, in ``MODEL``.
        class_loss: name of its loss of classes.
    """

    model_class: ClassVar[type[DenseDetector]]
    keys: ClassVar[str]
    class_loss: ClassVar[str]
    heads = ("head",)
    parts = ("dense",)
    soft_parts = ("dense",)
    running = ("loss_normalizer",)

    # ---- what it is ------------------------------------------------------------------------------

    @classmethod
    def describes(cls, cfg: CfgNode) -> bool:
        """By the meta-architecture: the stock one or one derived from it."""
        name = architecture_of(cfg)
        known = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
        is_derived = isinstance(known, type) and issubclass(known, cls.model_class)
        return name == cls.meta_architecture or is_derived

    @classmethod
    def lazy_keys(cls, target: object, node: Mapping) -> list | None:
        """Of the stock model or one derived from it."""
        if not (isinstance(target, type) and issubclass(target, cls.model_class)):
            return None
        return [cls.num_classes_key(), node["num_classes"], "MODEL.MASK_ON", False]

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """By the stock model's class."""
        return isinstance(model, cls.model_class)

    @classmethod
    def num_classes_key(cls) -> str:
        """``NUM_CLASSES`` of the family's node."""
        return f"MODEL.{cls.keys}.NUM_CLASSES"

    @classmethod
    def num_classes_in(cls, cfg: CfgNode) -> int:
        """``NUM_CLASSES`` of the family's node."""
        return cfg.MODEL[cls.keys].NUM_CLASSES

    def check_student(self) -> None:
        """Its head has a class tower, a box tower and their last layers by Detectron2's names."""
        head = self.model.head
        missing = [
            name
            for name in ("cls_subnet", "bbox_subnet", "cls_score", "bbox_pred")
            if not hasattr(head, name)
        ]
        if missing:
            raise UserError(
                f"the student, a {type(self.model).__name__}, has a {type(head).__name__} as head, without {missing}: "
                f"expected Detectron2's head of a {self.meta_architecture}; change "
                "MODEL.DISTILLER.STUDENT_META_ARCHITECTURE."
            )

    @property
    def num_classes(self) -> int:
        """Of the class tower."""
        return self.model.num_classes

    def class_layers(self) -> dict[str, ClassLayer]:
        """``cls_score``, with all classes of an anchor one after the other."""
        layer = self.model.head.cls_score
        anchors = layer.out_channels // self.num_classes
        return {"head.cls_score": ClassLayer(layer, groups=anchors, absent=NEVER)}

    def set_num_classes(self, count: int) -> None:
        """Of the model."""
        self.model.num_classes = count

    def rename_levels(self, names: Mapping[str, str]) -> None:
        """Of the head."""
        self.model.head_in_features = [names[level] for level in self.model.head_in_features]

    @property
    def head_levels(self) -> set[str]:
        """``IN_FEATURES`` of the family's node."""
        return set(self.model.head_in_features)

    @property
    def mask_on(self) -> bool:
        """It has none."""
        return False

    @property
    def keypoint_on(self) -> bool:
        """It has none."""
        return False

    @contextmanager
    def boxes_alone(self) -> Iterator[None]:
        """There is nothing else."""
        yield

    # ---- training --------------------------------------------------------------------------------

    def record(self) -> AbstractContextManager[DenseRecording]:
        """See :func:`era.modeling.detectors.dense_record.recorded`."""
        return recorded(self)

    @abstractmethod
    def at_anchors(
        self, output: Sequence[list[Tensor]], collect: Callable[[list[Tensor], int], Tensor]
    ) -> Predictions:
        """What the head says of anchors, out of its outputs.

        Args:
            output: each a list by level, (B, A * size, H, W).
            collect: from one output and its size to (n, size).
        """

    @abstractmethod
    def anchor_losses(
        self, predictions: Predictions, recording: DenseRecording
    ) -> dict[str, TaskLoss]:
        """The family's own losses of what a head says at all anchors, against the student's anchor labels and by its
        normaliser, with this model's settings."""

    @abstractmethod
    def decoded(self, predictions: Predictions, anchors: Tensor) -> Tensor:
        """Boxes (n, 4) as x1, y1, x2, y2, of predictions at anchors (n, 4)."""

    def overlap_distances(
        self, predictions: Predictions, targets: Predictions, anchors: Tensor
    ) -> Tensor:
        """``1 - GIoU(b, b_T)`` of the decoded boxes of two predictions at the same anchors, (n,); what else the family
        says of a box is added."""
        boxes = (self.decoded(x, anchors) for x in (predictions, targets))
        return giou_loss(*boxes, reduction="none")

    @abstractmethod
    def box_distances(
        self, predictions: Predictions, targets: Predictions, anchors: Tensor
    ) -> Tensor:
        """How far the boxes of two predictions at the same anchors are apart, (n,), in the kind of the family's own loss."""

    def head_output(self, features: dict[str, Tensor]) -> Sequence[list[Tensor]]:
        """What the head says on given maps, a list by level of each of its outputs."""
        return self.model.head([features[level] for level in self.model.head_in_features])

    def joined(self, output: Sequence[list[Tensor]]) -> Predictions:
        """The head's outputs at all anchors, all images one after the other."""
        return self.at_anchors(output, by_anchor)

    def at_positions(self, output: Sequence[list[Tensor]], positions: Positions) -> Predictions:
        """The head's outputs at the anchors of some positions, (rows,)."""
        return self.at_anchors(output, lambda maps, size: at_positions(maps, positions, size))

    def predict(self, features: dict[str, Tensor], samples: Tensor) -> Predictions:
        """At the anchors of these rows, (n,)."""
        return Predictions(*(x[samples] for x in self.joined(self.head_output(features))))

    def task_losses(self, recording: DenseRecording) -> dict[str, TaskLoss]:
        """See :meth:`anchor_losses`; all of the family's losses."""
        return self.anchor_losses(self.joined(recording.output), recording)

    def check_class_distributions(self, student: Detector, reason: str) -> None:
        """Never: classes are independent sigmoids."""
        raise UserError(
            f"the teacher is a {type(self).__name__}, whose classes are independent sigmoids without background: {reason} "
            "needs a softmax over classes and background in both models, as a Faster R-CNN has it; name other models, or "
            "switch that off."
        )

    def check_judge(self, student: Detector, reason: str) -> None:
        """One family, and the same anchors."""
        if type(student) is not type(self):
            raise UserError(
                f"the teacher is a {type(self).__name__} and the student a {type(student).__name__}: {reason} needs "
                "detectors of one family; name another teacher, or switch that off."
            )
        own, other = (detector.model.anchor_generator for detector in (student, self))
        if (
            list(own.strides) != list(other.strides)
            or own.offset != other.offset
            or not all(map(torch.equal, _cells(own), _cells(other)))
        ):
            raise UserError(
                f"the teacher's anchors differ from the student's (MODEL.ANCHOR_GENERATOR, MODEL.{self.keys}.IN_FEATURES "
                f"or strides): {reason} needs equal anchors; make the student's config equal, or switch that off."
            )

    def head_loss(
        self,
        part: str,
        features: dict[str, Tensor],
        recording: DenseRecording,
        *,
        samples_per_image: int = 0,
    ) -> Tensor:
        """The sum of :meth:`anchor_losses` at all anchors that the student labels, whatever ``samples_per_image``: the
        normaliser is of all. Anchors of a class that this detector does not know add nothing."""
        if self.known_classes is not None:
            labels = [torch.where(self.knows(own), own, -1) for own in recording.labels]
            recording = dataclasses.replace(recording, labels=labels)
        losses = self.anchor_losses(self.joined(self.head_output(features)), recording)
        return sum(own.values.sum() / own.normaliser for own in losses.values())

    @torch.no_grad()
    def soft_targets(
        self,
        part: str,
        features: dict[str, Tensor],
        recording: DenseRecording,
        *,
        positions: str = ALL_POSITIONS,
    ) -> Predictions:
        """Of the anchors of ``all`` positions, or of those of :class:`~era.modeling.detectors.dense_record.Positions`."""
        return self._at(features, recording, positions)

    def soft_head_loss(
        self,
        part: str,
        features: dict[str, Tensor],
        targets: Predictions,
        recording: DenseRecording,
        *,
        samples_per_image: int = 0,
        positions: str = ALL_POSITIONS,
        temperature: float = 1.0,
    ) -> Tensor:
        """:meth:`soft_losses` there; sigmoids have no temperature."""
        rows = recording.positions.rows if positions == SAMPLED_POSITIONS else None
        predictions = self._at(features, recording, positions)
        return self.soft_losses(predictions, targets, recording.anchor_boxes(rows))

    def soft_losses(
        self, predictions: Predictions, targets: Predictions, anchors: Tensor
    ) -> Tensor:
        """:func:`soft_dense_loss` of :func:`soft_class_losses` and :meth:`box_distances`, at the same anchors (n, 4)."""
        return soft_dense_loss(
            soft_class_losses(predictions.class_logits, targets.class_logits),
            self.box_distances(predictions, targets, anchors),
            object_probability(targets.class_logits),
        )

    def _at(
        self, features: dict[str, Tensor], recording: DenseRecording, positions: str
    ) -> Predictions:
        output = self.head_output(features)
        if positions == SAMPLED_POSITIONS:
            return self.at_positions(output, recording.positions)
        return self.joined(output)

    @property
    def cuts(self) -> dict[str, tuple[nn.Sequential, int]]:
        """Where the towers of the head are cut in two: by tower its layers, and which of them comes first after the cut, the
        activation of its last conv but one (of its only conv, if there is one); none of a tower without ReLUs."""
        found = {}
        for name in ("cls_subnet", "bbox_subnet"):
            layers = getattr(self.model.head, name)
            places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
            if places:
                found[name] = (layers, places[max(len(places) - 2, 0)])
        return found

    @property
    def head_parts(self) -> dict[str, HeadPart]:
        """``dense``, see :class:`DensePart`."""
        return {"dense": DensePart(self)}

    @property
    def foreground_levels(self) -> set[str]:
        """Of the head."""
        return self.head_levels

    @torch.no_grad()
    def foreground(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The highest class probability over the anchors of a position."""
        some = next(iter(features.values()))
        empty = some.new_zeros(len(some), some.shape[1], 1, 1)  # the head counts its levels
        levels = self.model.head_in_features
        logits = self.model.head([features.get(level, empty) for level in levels])[0]
        return {
            level: at_least_float32(x).amax(1, keepdim=True).sigmoid()
            for level, x in zip(levels, logits, strict=True)
            if level in features
        }

    # ---- inference -------------------------------------------------------------------------------

    def detect(self, batched_inputs: list[dict], do_postprocess: bool = True) -> list:
        """The model's own forward, or what it does before it scales its detections."""
        if do_postprocess:
            return self.model(batched_inputs)
        images = self.model.preprocess_image(batched_inputs)
        return self.detect_on(self.model.backbone(images.tensor), images)

    def detect_on(self, features: dict[str, Tensor], images: ImageList) -> list[Instances]:
        """The head, then ``forward_inference`` of the model."""
        maps = [features[level] for level in self.model.head_in_features]
        return self.model.forward_inference(images, maps, self.model.head(maps))

    @property
    def thresholds(self) -> dict[str, float | int]:
        """Test settings of the model."""
        model = self.model
        return {
            "score_threshold": model.test_score_thresh,
            "nms_threshold": model.test_nms_thresh,
            "max_detections": model.max_detections_per_image,
        }

    def set_score_threshold(self, value: float) -> None:
        """``SCORE_THRESH_TEST`` of the family's node."""
        self.model.test_score_thresh = value

    def blended(
        self, teacher: Dense, estimate: Callable[[dict, Tensor], dict], alpha: float
    ) -> Callable[..., list]:
        """The heads' outputs are blended before detections are chosen."""
        return BlendedDense(self, teacher, estimate, alpha)

    def with_heads_of(self, teacher: Dense, backbone: Backbone) -> DenseDetector:
        """See :meth:`Detector.with_heads_of`."""
        own = self.model
        model = copy.copy(own)  # the settings; its modules are replaced below
        model._modules = dict(own._modules)
        model._buffers = dict(own._buffers)
        model.backbone = backbone
        model.head = copy.deepcopy(teacher.model.head)
        model.anchor_generator = copy.deepcopy(teacher.model.anchor_generator)
        model.head_in_features = list(teacher.model.head_in_features)
        model.box2box_transform = copy.deepcopy(teacher.model.box2box_transform)
        return model.requires_grad_(False).eval()


def _cells(generator: nn.Module) -> list[Tensor]:
    return [cells.cpu() for cells in generator.cell_anchors]
