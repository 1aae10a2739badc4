"""The meta-architecture: a student, a frozen teacher, and the methods between them."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from torch import Tensor, nn

from era.config import student_config, validate_config
from era.errors import UserError
from era.methods import build_methods
from era.methods.era.twi import check_equal_heads, check_teacher_heads
from era.modeling.detectors.rcnn import check_student, record
from era.modeling.step import DistillationStep
from era.modeling.teacher import Teacher

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """Trains a stock student beside a frozen teacher; at inference it is the student (alpha 0).

    In training, ``forward`` returns the student's own losses plus those of every method. The student's
    forward is Detectron2's own, undisturbed. The teacher is not a submodule, so the optimiser, DDP, the
    checkpoints and ``train()`` never reach it; it follows ``to()``.

    Args:
        student: a stock model.
        teacher: the frozen teacher.
        methods: distillation methods by name; none means a plain student.
    """

    @configurable
    def __init__(
        self, *, student: GeneralizedRCNN, teacher: Teacher, methods: nn.ModuleDict | None = None
    ):
        super().__init__()
        self.student = student
        self.methods = methods if methods is not None else nn.ModuleDict()
        self._teacher = (teacher,)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Build student, teacher and methods.

        The student is built first and nothing after it draws from the global random state, so it starts
        from the same weights as the plain student of the same seed, and so does what follows.

        Raises:
            UserError: a key, the teacher, or the fit of the two is wrong.
        """
        validate_config(cfg)
        student = build_model(student_config(cfg))
        check_student(student)
        with _random_state_of_its_own(cfg):
            teacher = Teacher(cfg)
            check_classes(student, teacher)
            if cfg.MODEL.ERA.TWI.INIT_STUDENT:
                check_teacher_heads(teacher.model, student, list(cfg.MODEL.ERA.LEVELS))
                check_equal_heads(teacher.model, student, reason="MODEL.ERA.TWI.INIT_STUDENT True")
            methods = build_methods(cfg, student, teacher)
        return {"student": student, "teacher": teacher, "methods": methods}

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.device

    def _apply(self, fn, recurse: bool = True):
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses by name in training, detections in eval; inputs and outputs as ``GeneralizedRCNN``."""
        if not self.training:
            return self.inference(batched_inputs)
        if len(self.methods) == 0:
            return self.student(batched_inputs)
        with record(self.student) as recording:
            losses = self.student(batched_inputs)
        step = DistillationStep(
            student=recording,
            teacher=self.teacher,
            teacher_features=self.teacher.features(
                batched_inputs, recording.features, recording.images.tensor.shape[-2:]
            ),
        )
        for method in self.methods.values():
            losses.update(method.losses(step))
        return losses

    def inference(self, batched_inputs: list[dict], do_postprocess: bool = True):
        """Detections of the plain student, or of a method's own detector (ERA at alpha above 0)."""
        for method in self.methods.values():
            detector = method.detector(self.student)
            if detector is not None:
                return detector(batched_inputs, do_postprocess)
        return self.student.inference(batched_inputs, do_postprocess=do_postprocess)

    @torch.no_grad()
    def init_student_from_teacher(self) -> None:
        """Copy the teacher's RPN and ROI heads into the student's (``MODEL.ERA.TWI.INIT_STUDENT``)."""
        for part in ("proposal_generator", "roi_heads"):
            weights = getattr(self.teacher.model, part).state_dict()
            getattr(self.student, part).load_state_dict(weights, strict=True)
        logger.info("The student's RPN and ROI heads start from the teacher's weights (inherited).")


def check_classes(student: GeneralizedRCNN, teacher: Teacher) -> None:
    """Student and teacher tell the same number of classes apart.

    Raises:
        UserError: they do not.
    """
    own = student.roi_heads.num_classes
    if own != teacher.num_classes:
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {own} in the student and {teacher.num_classes} in the "
            f"teacher of {teacher.source['config_file']}: expected equal numbers; distil with a teacher "
            "trained on the same classes, or correct the student's config."
        )


@contextmanager
def _random_state_of_its_own(cfg: CfgNode):
    """What is built inside draws from a fork of torch's random state, which is then put back."""
    device = torch.device(cfg.MODEL.DEVICE)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
