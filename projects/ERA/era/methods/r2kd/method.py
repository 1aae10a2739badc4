"""R2KD: correlations of class probabilities with two teachers, one of them pruned, on two views of a picture.

Kim et al., "Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning", arXiv
2311.13934; form and weights as in the official ``mdistiller/distillers/R2KD.py`` and ``engine/utils.py``. That code
classifies images: this is inspired by it, and mapped so:

* A sample is a proposal: all models predict the classes of the STUDENT's sampled proposals. Columns compare all
  proposals of a process as the source's compare the images of its batch.
* The further view is one of the frame's, of the source's augmentations cutout; mixing two pictures has no meaning for
  proposals. As in the source the student's own losses are taken on the pictures as they are alone.
* The rank term has ranks that send a gradient, see :func:`~era.methods.r2kd.losses.rank_loss`.
* tau is 1, as DKD, GDKD and DIST have it in detection, not the source's 4. On a trained toy student (three batches of 8
  pictures) the value term's gradient at the backbone was 3 to 4 times that of the student's own class loss; at 4, where
  the published weight is multiplied by 16, it was 20 to 51 times.

**The pruned teacher.** The source prunes once and does not train it again. That follows from the teacher's weights
alone, so here the run that distils does it by itself, in seconds and the same every time, if
``MODEL.R2KD.PRUNED_WEIGHTS`` is "". What takes a run of its own is to train the weights that are left. With
``MODEL.R2KD.FINE_TUNE`` a run prunes, trains the pruned teacher on its own losses on the student's pictures, and distils
nothing; its zeros and the statistics of its batch norms stay, all else is trained, also what its own config freezes. The
run that distils names the checkpoint. It is a part of this method (``Method.prepares``), because that is a training run
like any other: a plan of runs starts, resumes and reports the chain, see ``studies/r2kd.yaml``.
"""

from __future__ import annotations

from typing import ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from era.checkpoint.part import load_part
from era.errors import UserError
from era.methods.base import Method, Needs
from era.methods.checks import (
    check_class_logits,
    check_every_class,
    check_temperature,
    check_weights,
)
from era.methods.r2kd.losses import rank_loss, value_loss
from era.methods.r2kd.pruning import keep_zeros, prune_smallest
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.modeling.views import CUTOUT, VIEWS, check_view
from era.registry import METHOD_REGISTRY

NO_VIEW = "none"
PART = "methods.r2kd.pruned."  # in the checkpoint of a run that fine-tunes


@METHOD_REGISTRY.register()
class R2KD(Method):
    """``loss_r2kd_value = w_v sum over views L_value`` and ``loss_r2kd_rank = w_r sum over views L_rank`` of all sampled
    proposals, :func:`~era.methods.r2kd.losses.value_loss` and :func:`~era.methods.r2kd.losses.rank_loss`, against the
    logits ``s z_T + (1 - s) z_pruned``.

    A run that fine-tunes has the pruned teacher's own losses instead, ``loss_r2kd_<its name>``, and draws anchors and
    proposals from the global random state as any detector in training: there is no plain training beside it.

    The value term compares the proposals of a process' images with each other, so what it is depends on how a batch is
    split among processes.

    Args:
        weights: ``value`` (w_v) and ``rank`` (w_r).
        temperature: tau.
        rank_temperature: epsilon.
        teacher_share: s.
        view: the further view's name, or ``none``.
        pruned: the second teacher; no submodule, but it follows ``to()``. None if no loss is on.
        fine_tune: train it instead; its model is a submodule then.
    """

    idea = (
        "match two teachers' classes, one pruned, by cosine and by rank, also on an augmented view"
    )
    paper = "inspired by R2KD, arXiv 2311.13934 (on proposals, soft ranks: this project's)"
    loss_labels: ClassVar = {
        "loss_r2kd_value": "R2KD: 1 − cosine of the classes",
        "loss_r2kd_rank": "R2KD: 1 − correlation of ranks",
    }

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.R2KD``."""
        cfg.MODEL.R2KD = CfgNode()
        # Weights, part and share are the source's; both temperatures are this project's.
        cfg.MODEL.R2KD.VALUE_WEIGHT = 2.0  # w_v; 0 switches the term off
        cfg.MODEL.R2KD.RANK_WEIGHT = 2.0  # w_r; 0 switches the term off
        cfg.MODEL.R2KD.TEMPERATURE = 1.0  # tau, of the probabilities; the source's is 4
        # epsilon, in logits: below 1 ranks are more like whole numbers, and classes far apart send less gradient.
        cfg.MODEL.R2KD.RANK_TEMPERATURE = 1.0
        # The view on which both terms are taken once more: photometric, cutout, strong (both) or flip; none.
        cfg.MODEL.R2KD.VIEW = CUTOUT
        cfg.MODEL.R2KD.TEACHER_SHARE = (
            0.7  # s, of the teacher as it is in the logits; 1 - s is the pruned one's
        )
        # Part of the weights of every convolution and fully connected layer that is set to 0. Read where this run
        # prunes: not if PRUNED_WEIGHTS names a teacher that is pruned already.
        cfg.MODEL.R2KD.PRUNE_AMOUNT = 0.1
        # Prune, train what is left on the pruned teacher's own losses, and distil nothing: the first run of a chain.
        cfg.MODEL.R2KD.FINE_TUNE = False
        # model_final.pth of that run; "": the teacher is pruned here, once, and not trained again, as published.
        cfg.MODEL.R2KD.PRUNED_WEIGHTS = ""

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """A view that there is, weights of at least 0, temperatures above 0, parts of 1, one run at a time."""
        keys = cfg.MODEL.R2KD
        check_view(keys.VIEW, "MODEL.R2KD.VIEW", (NO_VIEW, *VIEWS))
        check_weights({f"MODEL.R2KD.{key}": keys[key] for key in ("VALUE_WEIGHT", "RANK_WEIGHT")})
        for key in ("TEMPERATURE", "RANK_TEMPERATURE"):
            check_temperature(f"MODEL.R2KD.{key}", keys[key])
        for key in ("TEACHER_SHARE", "PRUNE_AMOUNT"):
            if not 0.0 <= keys[key] <= 1.0:
                raise UserError(
                    f"MODEL.R2KD.{key} is {keys[key]}: expected a part, 0 to 1; set it so."
                )
        if keys.FINE_TUNE and keys.PRUNED_WEIGHTS:
            raise UserError(
                f"MODEL.R2KD.PRUNED_WEIGHTS is {keys.PRUNED_WEIGHTS!r} and MODEL.R2KD.FINE_TUNE True, but a run that "
                'fine-tunes starts from the teacher: expected one of the two; set PRUNED_WEIGHTS "", or distil with '
                "FINE_TUNE False."
            )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher, pruned once more, and a second view; labels to fine-tune it."""
        keys = cfg.MODEL.R2KD
        if keys.FINE_TUNE:
            return Needs()
        more = ("a pruned teacher", *(["a second view"] if keys.VIEW != NO_VIEW else []))
        return Needs(labels=not (keys.VALUE_WEIGHT or keys.RANK_WEIGHT), more=more)

    @classmethod
    def prepares(cls, cfg: CfgNode) -> bool:
        """With ``MODEL.R2KD.FINE_TUNE``."""
        return cfg.MODEL.R2KD.FINE_TUNE

    @configurable
    def __init__(
        self,
        *,
        weights: dict[str, float],
        temperature: float,
        rank_temperature: float,
        teacher_share: float,
        view: str,
        pruned: Teacher | None,
        fine_tune: bool = False,
    ):
        super().__init__()
        self.weights = dict(weights)
        self.temperature = temperature
        self.rank_temperature = rank_temperature
        self.teacher_share = teacher_share
        self.view = view
        self.fine_tune = fine_tune
        self._second = (pruned,)  # in a tuple: never saved, trained or wrapped
        if fine_tune:
            self.pruned = pruned.model.requires_grad_(True)
            keep_zeros(self.pruned)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.R2KD``, and prune the teacher or read what an earlier run made of it.

        Raises:
            UserError: the models' class distributions cannot be compared, there is no ground truth to fine-tune with,
                or ``PRUNED_WEIGHTS`` is absent or of another teacher, see :func:`~era.checkpoint.part.load_part`.
        """
        check_class_logits(student, teacher.detector, "R2KD")
        keys = cfg.MODEL.R2KD
        weights = {"value": keys.VALUE_WEIGHT, "rank": keys.RANK_WEIGHT}
        pruned = teacher.copy() if keys.FINE_TUNE or any(weights.values()) else None
        if keys.FINE_TUNE:
            check_ground_truth(student, teacher.detector)
            check_every_class(teacher, "MODEL.R2KD.FINE_TUNE True")
        if pruned is not None and keys.PRUNED_WEIGHTS:
            what = "MODEL.R2KD.PRUNED_WEIGHTS"
            load_part(pruned.model, keys.PRUNED_WEIGHTS, PART, what=what, teacher=teacher.sha256)
        elif pruned is not None:
            prune_smallest(pruned.model, keys.PRUNE_AMOUNT)
        return {
            "weights": weights,
            "temperature": keys.TEMPERATURE,
            "rank_temperature": keys.RANK_TEMPERATURE,
            "teacher_share": keys.TEACHER_SHARE,
            "view": keys.VIEW,
            "pruned": pruned,
            "fine_tune": keys.FINE_TUNE,
        }

    @property
    def second_teacher(self) -> Teacher | None:
        """The pruned teacher, if there is one."""
        return self._second[0]

    def _apply(self, fn, recurse: bool = True):
        if self.second_teacher is not None and not self.fine_tune:
            self.second_teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> R2KD:
        """The pruned teacher's batch norms keep the teacher's statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``loss_r2kd_value`` and ``loss_r2kd_rank``, each unless its weight is 0; or the pruned teacher's own losses."""
        if self.fine_tune:
            return self._own_losses(step)
        if self.second_teacher is None:
            return {}
        pairs = [self._clean(step)]
        if self.view != NO_VIEW:
            pairs.append(self._augmented(step))
        found = {}
        if self.weights["value"] > 0:
            found["value"] = sum(value_loss(*pair, self.temperature) for pair in pairs)
        if self.weights["rank"] > 0:
            found["rank"] = sum(rank_loss(*pair, self.rank_temperature) for pair in pairs)
        return {f"loss_r2kd_{name}": self.weights[name] * loss for name, loss in found.items()}

    def _clean(self, step: Step) -> tuple[Tensor, Tensor]:
        """The student's logits and those of both teachers, on the pictures as they are."""
        other = self._both(
            step, step.batched_inputs, step.student.samples, step.teacher_predictions.class_logits
        )
        return step.shared(step.student.predictions.class_logits), step.shared(other)

    def _augmented(self, step: Step) -> tuple[Tensor, Tensor]:
        """The same on the further view."""
        view = step.view(self.view)
        other = self._both(
            step, view.batched_inputs, view.samples, view.teacher_predictions.class_logits
        )
        return step.shared(view.predictions.class_logits), step.shared(other)

    def _both(self, step: Step, inputs: list[dict], samples: object, logits: Tensor) -> Tensor:
        """``s z_T + (1 - s) z_pruned``, from the first teacher's logits."""
        second = self.second_teacher
        second.cache = step.teacher.cache  # keys tell weights apart
        size = tuple(step.student.images.tensor.shape[-2:])
        maps = second.features(inputs, step.student.features, size)
        pruned = second.predict(maps, samples).class_logits
        return self.teacher_share * logits + (1 - self.teacher_share) * pruned

    def _own_losses(self, step: Step) -> dict[str, Tensor]:
        """Of the pruned teacher in training, on the student's pictures."""
        inputs = step.batched_inputs
        if self.second_teacher.flip_channels:
            inputs = [{**item, "image": item["image"].flip(0)} for item in inputs]
        with get_event_storage().name_scope("pruned"):  # apart from the student's statistics
            found = self.pruned(inputs)
        return {f"loss_r2kd_{name.removeprefix('loss_')}": loss for name, loss in found.items()}


def check_ground_truth(student: Detector, teacher: Detector) -> None:
    """The student's pictures have what the teacher's own losses need.

    Raises:
        UserError: they have not.
    """
    lacking = [
        name
        for name, needed, given in (
            ("masks", teacher.mask_on, student.mask_on),
            ("keypoints", teacher.keypoint_on, student.keypoint_on),
        )
        if needed and not given
    ]
    if lacking:
        raise UserError(
            f"MODEL.R2KD.FINE_TUNE True trains a teacher that predicts {' and '.join(lacking)}, which a student without "
            "them is not given the ground truth of: expected the same in both; train a student that predicts them "
            "too, or distil with FINE_TUNE False."
        )
