"""The meta-architecture: a student, a frozen teacher, and the methods between them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from era.config import INHERIT_HEADS, INHERIT_NOTHING, student_config, validate_config
from era.errors import UserError
from era.modeling.detectors import Detector, detector_of
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.modeling.unlabeled import mean_over_images, pseudo_labels, split_by_labels
from era.registry import label_free_methods, methods_of

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """Trains a stock student beside a frozen teacher; at inference it is the student, unless a method says
    otherwise.

    In training, ``forward`` returns the student's own losses plus those of every method. The student's
    forward is Detectron2's own, undisturbed. The teacher is not a submodule, so the optimiser, DDP, the
    checkpoints and ``train()`` never reach it; it follows ``to()``.

    Inputs that say ``"unlabeled": True`` have no ground truth and give the methods a step of their own. The
    student's own losses, and whatever else needs ground truth, are those of the other inputs alone. A loss of a
    method on both parts is their mean over all images. Two parts are two forwards of the student: each is
    normalised by its own batch statistics and both move BatchNorm's running ones, the labelled part first.

    Args:
        student: a stock model of a known family.
        teacher: the frozen teacher; None if no method needs one.
        methods: distillation methods by lower-case name; none means a plain student.
        label_free: names of those that have losses without ground truth.
        pseudo_score: the teacher's detections of at least this score choose anchors and proposals on pictures
            without labels, in the place of the ground truth; no loss is taken against them.
        preparing: only parts of the methods are trained (:meth:`era.methods.base.Method.prepares`): the student is frozen and
            its losses are dropped.

    Raises:
        UserError: more than one method brings its own detector.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None = None,
        methods: nn.ModuleDict | None = None,
        label_free: Sequence[str] = (),
        pseudo_score: float = 0.5,
        preparing: bool = False,
    ):
        super().__init__()
        self.student = student
        self.methods = methods if methods is not None else nn.ModuleDict()
        self.detector = detector_of(student)
        self._teacher = (teacher,)
        self.label_free = tuple(label_free)
        self.pseudo_score = pseudo_score
        self.preparing = preparing
        if preparing:
            student.requires_grad_(False)
        own = [name for name, m in self.methods.items() if m.detector(self.detector) is not None]
        if len(own) > 1:
            raise UserError(
                f"MODEL.DISTILLER.METHODS: {' and '.join(own)} both bring a detector of their own for "
                "inference: leave one of them the plain student (alpha 0)."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Build student, teacher and methods.

        The student is built first and nothing after it draws from the global random state, so it starts
        from the same weights as the plain student of the same seed, and so does what follows.

        Raises:
            UserError: a key, the teacher, or the fit of the two is wrong.
        """
        validate_config(cfg)
        preparing = is_preparation(cfg)
        student = build_model(student_config(cfg))
        detector = detector_of(student)
        detector.check_student()
        with _random_state_of_its_own(cfg):
            teacher = Teacher(cfg) if needs_teacher(cfg) else None
            if teacher is not None:
                teacher.fit_levels(detector, resample=cfg.MODEL.DISTILLER.RESAMPLE_LEVELS)
            if cfg.MODEL.DISTILLER.INIT_STUDENT != INHERIT_NOTHING:
                check_inheritance(cfg, detector, teacher.detector)
            methods = nn.ModuleDict(
                {name: method(cfg, detector, teacher) for name, method in methods_of(cfg).items()}
            )
        return {
            "student": student,
            "teacher": teacher,
            "methods": methods,
            "label_free": label_free_methods(cfg),
            "pseudo_score": cfg.MODEL.DISTILLER.PSEUDO_SCORE,
            "preparing": preparing,
        }

    @property
    def teacher(self) -> Teacher | None:
        """The frozen teacher, if there is one."""
        return self._teacher[0]

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.device

    def _apply(self, fn, recurse: bool = True):
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses by name in training, detections in eval; inputs and outputs as the student's own.

        Raises:
            ValueError: a loss of a method is not named ``loss_<method>_<term>``, or is there already.
        """
        if not self.training:
            return self.inference(batched_inputs)
        if len(self.methods) == 0:
            return self.student(batched_inputs)
        if self.preparing:
            return self._preparation(batched_inputs)
        labeled, unlabeled = split_by_labels(batched_inputs)
        with self.detector.record() as recording:
            losses = self.student(labeled)
        step = Step(labeled, recording, self.detector, self.teacher)
        losses.update(self._reweighted(step))
        terms = self._losses_of_methods(step, self.methods, losses)
        if unlabeled:
            with get_event_storage().name_scope("unlabeled"):  # apart from the student's statistics
                step = self._unlabeled_step(unlabeled)
                others = self._losses_of_methods(step, self.label_free, losses)
            terms = mean_over_images(terms, others, (len(labeled), len(unlabeled)))
        return {**losses, **terms}

    def _preparation(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """The methods' losses alone, on a step of the frozen student."""
        with torch.no_grad(), self.detector.record() as recording:
            self.student(batched_inputs)
        step = Step(batched_inputs, recording, self.detector, self.teacher)
        return self._losses_of_methods(step, self.methods, {})

    def _losses_of_methods(
        self, step: Step, names: Iterable[str], taken: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the methods of these names say of a step; ``taken`` are names that no loss may have."""
        losses: dict[str, Tensor] = {}
        for name in names:
            for key, loss in self.methods[name].losses(step).items():
                if key in taken or key in losses or not key.startswith(f"loss_{name}_"):
                    raise ValueError(
                        f"method {name} returns the loss {key!r}: expected a name of its own, "
                        f"loss_{name}_<term>, that no other loss of the step has"
                    )
                losses[key] = loss
        return losses

    def _unlabeled_step(self, batched_inputs: list[dict]) -> Step:
        """The student's forward on pictures without labels, with anchors and proposals sampled by what the teacher
        detects; its losses are dropped, and the ROI heads say nothing but classes and boxes."""
        size = tuple(self.student.preprocess_image(batched_inputs).tensor.shape[-2:])
        detections, maps = self.teacher.detect_with_maps(batched_inputs, size)
        truth = [pseudo_labels(found, self.pseudo_score) for found in detections]
        get_event_storage().put_scalar("pseudo_boxes", sum(map(len, truth)) / len(truth))
        inputs = [
            {**item, "instances": own} for item, own in zip(batched_inputs, truth, strict=True)
        ]
        detector = self.detector
        with detector.boxes_alone(), detector.running_kept(), detector.record() as recording:
            self.student(inputs)
        return Step(
            batched_inputs, recording, self.detector, self.teacher, labeled=False, teacher_maps=maps
        )

    def _reweighted(self, step: Step) -> dict[str, Tensor]:
        """The student's own losses that methods weight, by name; weights of several are multiplied."""
        weights: dict[str, Tensor] = {}
        for method in self.methods.values():
            for key, own in method.reweight(step).items():
                weights[key] = weights[key] * own if key in weights else own
        return {key: step.task_losses[key].weighted(own) for key, own in weights.items()}

    def inference(self, batched_inputs: list[dict], do_postprocess: bool = True) -> list:
        """Detections of the plain student, or of a method's own detector."""
        for method in self.methods.values():
            detector = method.detector(self.detector)
            if detector is not None:
                return detector(batched_inputs, do_postprocess)
        return self.detector.detect(batched_inputs, do_postprocess)

    def deployable(self) -> nn.Module:
        """What :meth:`inference` computes as one ordinary model in eval mode, for export.

        Raises:
            UserError: a method's detector is no such model.
        """
        for name, method in self.methods.items():
            if method.detector(self.detector) is not None:
                model = method.deployable(self.detector)
                if model is None:
                    raise UserError(
                        f"the detector of method {name} with these settings is no single model: export "
                        "alpha 0, the plain student, or alpha 1."
                    )
                return model
        return self.student

    def init_student_from_teacher(self, *, fpn: bool = False) -> None:
        """Copy the teacher's heads, and its FPN if asked for, into the student (``INIT_STUDENT``)."""
        self.detector.inherit(self.teacher.detector, fpn=fpn)
        what = "FPN and heads start" if fpn else "heads start"
        logger.info("The student's %s from the teacher's weights (inherited).", what)


def needs_teacher(cfg: CfgNode) -> bool:
    """Whether a distiller of this config trains with a teacher: a method needs it, or the student starts from
    it, it is evaluated beside the student, or there are pictures without labels."""
    return (
        any(method.needs(cfg).teacher for method in methods_of(cfg).values())
        or cfg.MODEL.DISTILLER.INIT_STUDENT != INHERIT_NOTHING
        or cfg.TEST.EVAL_TEACHER
        or len(cfg.DATASETS.UNLABELED) > 0
    )


def is_preparation(cfg: CfgNode) -> bool:
    """Whether a run trains parts of its methods alone, see :meth:`era.methods.base.Method.prepares`.

    Raises:
        UserError: some of its methods do, and others do not; or there are pictures without labels.
    """
    methods = methods_of(cfg)
    parts = [name for name, method in methods.items() if method.prepares(cfg)]
    if parts and len(parts) < len(methods):
        others = ", ".join(name for name in methods if name not in parts)
        raise UserError(
            f"MODEL.DISTILLER.METHODS: {', '.join(parts)} trains a part of its own first in this run, and {others} "
            "does not: expected a run for that part alone; name the others in the run that distils."
        )
    if parts and cfg.DATASETS.UNLABELED:
        raise UserError(
            f"DATASETS.UNLABELED names {list(cfg.DATASETS.UNLABELED)} in a run that trains a part of {', '.join(parts)}: "
            "expected labelled pictures alone; set it to ()."
        )
    return bool(parts)


def check_inheritance(cfg: CfgNode, student: Detector, teacher: Detector) -> None:
    """The student can start from the teacher's heads as ``MODEL.DISTILLER.INIT_STUDENT`` asks.

    Raises:
        UserError: they differ in shape, anchors or box coders.
    """
    value = cfg.MODEL.DISTILLER.INIT_STUDENT
    reason = f"MODEL.DISTILLER.INIT_STUDENT {value}"
    teacher.check_judge(student, reason)
    student.check_inherits(teacher, fpn=value != INHERIT_HEADS, reason=reason)


@contextmanager
def _random_state_of_its_own(cfg: CfgNode):
    """What is built inside draws from a fork of torch's random state, which is then put back."""
    device = torch.device(cfg.MODEL.DEVICE)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
