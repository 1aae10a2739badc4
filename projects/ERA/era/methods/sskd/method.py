"""SSKD: Self-Supervision Knowledge Distillation (Xu et al., "Knowledge Distillation Meets Self-Supervision", arXiv
2006.07114), inspired by it: the source classifies images, and the form for detectors is this project's.

Similarities between two views of the same things say more of what a teacher knows than its classes. Mapped so:

* An instance is a ground-truth object, its vector what the box head makes of its box (1024 numbers at COCO). The source
  takes whole images.
* The further view is one of the frame's, photometric unless said otherwise (the paper's colour distortion). The source turns
  images by 90, 180 and 270 degrees, three rows an image, which leaves no upright box; here there is one row an instance.
  A flip also comes from the training's own augmentation; cutout and strong may hide an object altogether.
* Rows are this batch's objects in the further view, columns the same objects as they are and those of earlier batches
  (:class:`~era.methods.sskd.queue.EmbeddingQueue`), for a batch has few. The source has 64 images and no queue.
* Class distributions are those of the STUDENT's sampled proposals, background included, in both views.
* The student's own losses count as ever; the source gives its cross entropy the weight 0.1 beside the weights here.

It takes two runs. With ``MODEL.SSKD.STAGE`` head the teacher's projection head is trained on the frozen teacher's
vectors of both views, negatives from the batch alone; with distil the student learns, and its own projection
head with it. ``studies/sskd.yaml`` is the chain as one command.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from era.errors import UserError
from era.losses import kd_loss
from era.methods.base import Method, Needs
from era.methods.checks import (
    check_class_logits,
    check_stage,
    check_temperature,
    check_vectors,
    check_weights,
)
from era.methods.shared import load_frozen_part
from era.methods.sskd.losses import contrastive_loss, cosine_similarities, selected_kd_loss
from era.methods.sskd.queue import EmbeddingQueue
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.modeling.views import PHOTOMETRIC, View, check_view
from era.registry import METHOD_REGISTRY

HEAD, DISTIL = STAGES = ("head", "distil")
PART = "methods.sskd.head."  # in the checkpoint of the run that trains it
WEIGHTS = {"clean": "CLEAN_WEIGHT", "view": "VIEW_WEIGHT", "similarity": "SIMILARITY_WEIGHT"}
SHARES = ("WRONG_CLASSES", "WRONG_SIMILARITIES")


def projection_head(channels: int) -> nn.Sequential:
    """The source's MLP on vectors (R, channels), of their width throughout."""
    return nn.Sequential(
        nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)
    )  # fmt: skip


@METHOD_REGISTRY.register()
class SSKD(Method):
    """In the run that distils, with sampled proposals' classes p and similarities s of objects::

        loss_sskd_clean      = w_n tau^2 KL(p_T || p_S)                    of the pictures as they are
        loss_sskd_view       = w_t tau^2 KL(p'_T || p'_S)                  of the further view, chosen rows
        loss_sskd_similarity = w_s tau_s^2 KL(softmax_j s_T || softmax_j s_S)   chosen rows

    In the run before, ``loss_sskd_contrast``, :func:`~era.methods.sskd.losses.contrastive_loss` of the teacher's head.
    Objects and queue are those of a process: what the last two are depends on how a batch is split among processes.

    Args:
        stage: ``head`` or ``distil``.
        view: the further view's name.
        head: the teacher's projection head, frozen in the run that distils; None where no loss uses it.
        weights: ``clean`` (w_n), ``view`` (w_t), ``similarity`` (w_s).
        temperature: tau. similarity_temperature: tau_s.
        shares: of the rows in which the teacher errs, for classes and for similarities.
        projector: the student's projection head, and queue: of both models' embeddings; None without similarities.
    """

    idea = "match how alike objects are to the teacher in two views, by a projection head trained first"
    paper = "inspired by SSKD, arXiv 2006.07114 (on objects, two views, a queue: this project's)"
    loss_labels: ClassVar = {
        "loss_sskd_clean": "SSKD: classes of the proposals",
        "loss_sskd_view": "SSKD: classes in the further view",
        "loss_sskd_similarity": "SSKD: similarities of objects",
        "loss_sskd_contrast": "SSKD: the teacher's head finds the object again",
    }
    part_key = "MODEL.SSKD.HEAD_WEIGHTS"

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.SSKD``; numbers are the source's but where it says otherwise."""
        cfg.MODEL.SSKD = CfgNode()
        # head: train the teacher's projection head and nothing else, the first run of a chain. distil: the student.
        cfg.MODEL.SSKD.STAGE = DISTIL
        # model_final.pth of the first run; only read to distil with a SIMILARITY_WEIGHT above 0.
        cfg.MODEL.SSKD.HEAD_WEIGHTS = ""
        cfg.MODEL.SSKD.VIEW = (
            PHOTOMETRIC  # this project's: photometric, cutout, strong (both) or flip
        )
        cfg.MODEL.SSKD.CLEAN_WEIGHT = 0.9  # w_n; 0 switches a term off
        cfg.MODEL.SSKD.VIEW_WEIGHT = 2.7  # w_t
        cfg.MODEL.SSKD.SIMILARITY_WEIGHT = 10.0  # w_s
        cfg.MODEL.SSKD.TEMPERATURE = 4.0  # tau, of classes
        cfg.MODEL.SSKD.SIMILARITY_TEMPERATURE = 0.5  # tau_s
        # Of the rows in which the teacher errs, the part that is kept, those with the least error first.
        cfg.MODEL.SSKD.WRONG_CLASSES = 1.0
        cfg.MODEL.SSKD.WRONG_SIMILARITIES = 0.75
        # This project's: objects of earlier batches that are columns too; 0 = none. About two batches of 16 COCO pictures:
        # the student's embeddings in it are as old.
        cfg.MODEL.SSKD.QUEUE = 256

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """A stage and a view that there are, weights and a queue of at least 0, temperatures above 0, parts of 1."""
        keys = cfg.MODEL.SSKD
        check_stage("MODEL.SSKD.STAGE", keys.STAGE, STAGES)
        check_view(keys.VIEW, "MODEL.SSKD.VIEW")
        check_weights({f"MODEL.SSKD.{key}": keys[key] for key in WEIGHTS.values()})
        for key in ("TEMPERATURE", "SIMILARITY_TEMPERATURE"):
            check_temperature(f"MODEL.SSKD.{key}", keys[key])
        for key in SHARES:
            if not 0.0 <= keys[key] <= 1.0:
                raise UserError(
                    f"MODEL.SSKD.{key} is {keys[key]}: expected a part, 0 to 1; set it so."
                )
        if keys.QUEUE < 0:
            raise UserError(
                f"MODEL.SSKD.QUEUE is {keys.QUEUE}: expected a number of objects, 0 for no queue; set it so."
            )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher and a second view; labels for all but the classes of the pictures as they are; a trained head."""
        keys = cfg.MODEL.SSKD
        if keys.STAGE == HEAD:
            return Needs(more=("a second view",))
        views = keys.VIEW_WEIGHT > 0 or keys.SIMILARITY_WEIGHT > 0
        more = [("a second view", views), ("a trained head", keys.SIMILARITY_WEIGHT > 0)]
        return Needs(labels=keys.CLEAN_WEIGHT == 0, more=tuple(what for what, on in more if on))

    @classmethod
    def prepares(cls, cfg: CfgNode) -> bool:
        """With ``MODEL.SSKD.STAGE`` head."""
        return cfg.MODEL.SSKD.STAGE == HEAD

    @configurable
    def __init__(
        self,
        *,
        stage: str,
        view: str,
        head: nn.Module | None,
        weights: dict[str, float],
        temperature: float,
        similarity_temperature: float,
        shares: tuple[float, float],
        projector: nn.Module | None = None,
        queue: EmbeddingQueue | None = None,
    ):
        super().__init__()
        self.stage = stage
        self.view = view
        self.head = head
        self.weights = dict(weights)
        self.temperature = temperature
        self.similarity_temperature = similarity_temperature
        self.shares = shares
        self.projector = projector
        self.queue = queue

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.SSKD``, and to distil the head that an earlier run trained.

        Raises:
            UserError: a model makes no vector of a box, the models' class distributions cannot be compared, or the head
                is absent, of another shape or of another teacher.
        """
        keys = cfg.MODEL.SSKD
        check_class_logits(student, teacher.detector, "SSKD")
        check_vectors("teacher", teacher.detector, "SSKD compares vectors of objects")
        found = {
            "stage": keys.STAGE,
            "view": keys.VIEW,
            "weights": {name: keys[key] for name, key in WEIGHTS.items()},
            "temperature": keys.TEMPERATURE,
            "similarity_temperature": keys.SIMILARITY_TEMPERATURE,
            "shares": tuple(keys[key] for key in SHARES),
        }
        if keys.STAGE == DISTIL and keys.SIMILARITY_WEIGHT == 0:
            return {**found, "head": None}
        other = teacher.detector.vector_channels
        head = projection_head(other)
        if keys.STAGE == HEAD:
            return {**found, "head": head}
        check_vectors("student", student, "SSKD compares vectors of objects")
        load_frozen_part(head, keys.HEAD_WEIGHTS, PART, what=cls.part_key, teacher=teacher)
        own = student.vector_channels
        queue = EmbeddingQueue(keys.QUEUE, own, other)
        return {**found, "head": head, "projector": projection_head(own), "queue": queue}

    def losses(self, step: Step) -> dict[str, Tensor]:
        """See the class; without labels ``loss_sskd_clean`` alone, for the selection and the objects need them."""
        if self.stage == HEAD:
            return {"loss_sskd_contrast": self._contrast(step)}
        found = {}
        if self.weights["clean"] > 0:
            found["clean"] = kd_loss(*step.class_logits, self.temperature)
        if step.labeled and self.weights["view"] > 0:
            view = step.view(self.view)
            found["view"] = selected_kd_loss(
                *view.class_logits,
                step.shared_classes,
                self.temperature,
                self.shares[0],
            )
        if step.labeled and self.weights["similarity"] > 0:
            found["similarity"] = self._similarity(step)
        return {f"loss_sskd_{name}": self.weights[name] * loss for name, loss in found.items()}

    def _contrast(self, step: Step) -> Tensor:
        """Of the teacher's head; how often it finds the object goes into the event storage."""
        view, objects = step.view(self.view), objects_of(step)
        clean, changed = map(self.head, teacher_vectors(step, view, objects))
        similarities = cosine_similarities(changed, clean)
        if len(similarities) > 0:
            own = torch.arange(len(similarities), device=similarities.device)
            hits = (similarities.detach().argmax(1) == own).float().mean()
            get_event_storage().put_scalar("sskd/head_accuracy", hits)
        return contrastive_loss(similarities)

    def _similarity(self, step: Step) -> Tensor:
        """Of this batch's objects in the further view to them as they are and to the queue, which they then enter."""
        view, objects = step.view(self.view), objects_of(step)
        clean = self.projector(step.detector.vectors(step.student.features, objects))
        changed = self.projector(step.detector.vectors(view.features, view.located(objects)))
        with torch.no_grad():
            others = tuple(map(self.head, teacher_vectors(step, view, objects)))
        own_before, other_before = self.queue.rows()
        own = cosine_similarities(changed, torch.cat([clean, own_before.to(clean.dtype)]))
        other = cosine_similarities(
            others[1], torch.cat([others[0], other_before.to(others[0].dtype)])
        )
        self.queue.push(clean.detach(), others[0])
        right = torch.arange(len(own), device=own.device)
        return selected_kd_loss(own, other, right, self.similarity_temperature, self.shares[1])


def objects_of(step: Step) -> list[Instances]:
    """The ground-truth boxes of a step's pictures as samples of :meth:`Detector.vectors`."""
    found = []
    for truth in step.student.targets:
        own = Instances(truth.image_size)
        own.proposal_boxes = truth.gt_boxes
        found.append(own)
    return found


@torch.no_grad()
def teacher_vectors(step: Step, view: View, objects: list[Instances]) -> tuple[Tensor, Tensor]:
    """The frozen teacher's vectors of objects in the pictures as they are and in a view, (R, D_T) each."""
    vectors = step.teacher.detector.vectors
    clean = vectors(step.teacher_features, objects)
    return clean, vectors(view.teacher_features, view.located(objects))
