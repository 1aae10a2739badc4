"""What is measured: models from a config, a synthetic batch, and rows that each do one step of it."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from era.benchmark.reference import PlainLossERA
from era.config import student_config
from era.engine.trainer import StepTrainer
from era.errors import UserError
from era.methods import ERA
from era.methods.era.fast.heads import FastTeacherHeads
from era.methods.era.twi import TeacherHeads, check_equal_heads
from era.modeling.detectors.rcnn import check_student, record
from era.modeling.distiller import Distiller, check_classes
from era.modeling.teacher import Teacher, tame_random_weights

OBJECTS_PER_IMAGE = 8
PLAIN, TEACHER, FLOOR, MIMIC = "plain student step", "teacher forward", "floor", "feature mimic"
REFERENCE, FAST = "ERA reference", "ERA fast"
INFERENCE = "inference: student"
CHANNELS_LAST, COMPILE = "channels-last", "torch.compile"
COMPILED_TEACHER = f"{TEACHER}, {COMPILE} on"
MIMIC_KEYS = (
    "NUM_BRANCHES", 0,
    "SCALES", [],
    "RESIDUAL_WEIGHT", 0.0,
    "KD_WEIGHT", 0.0,
    "TWI.RPN_WEIGHT", 0.0,
    "TWI.ROI_WEIGHT", 0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        step: does one step and returns nothing.
        prepare: brings the models into the row's state; called before every step, its time not counted.
    """

    name: str
    step: Callable[[], None]
    prepare: Callable[[], None]

    @property
    def base(self) -> str:
        """Name of the row that this one is divided by."""
        return base_of(self.name)


def base_of(name: str) -> str:
    """Name of the row that a row of this name is divided by."""
    if name.startswith("inference"):
        return INFERENCE
    return TEACHER if name.startswith(f"{TEACHER}, ") else FLOOR


@dataclass
class Plan:
    """Rows by name, each built when it is asked for, and what a reader must know of them."""

    makers: dict[str, Callable[[], Row]]
    notes: list[str] = field(default_factory=list)

    def make(self, names: list[str]) -> list[Row]:
        """The rows of these names, built."""
        return [self.makers[name]() for name in names]


class Bench:
    """One student and one teacher with random weights, from which every row is made.

    The rows share both models and the student's optimiser state, and the learning rate is 0, so every
    repeat of every row does the same arithmetic on the same numbers.

    Args:
        cfg: a distiller's config, see :func:`era.benchmark.cli.prepare_config`.
        amp_dtype: type of autocast, None for float32; float16 scales the loss as training does.

    Raises:
        UserError: student and teacher do not fit together.
    """

    def __init__(self, cfg: CfgNode, *, amp_dtype: torch.dtype | None = None):
        self.cfg = cfg
        self.amp_dtype = amp_dtype
        self.device = torch.device(cfg.MODEL.DEVICE)
        torch.manual_seed(0)
        self.student = build_model(student_config(cfg))
        check_student(self.student)
        tame_random_weights(self.student)
        self.teacher = Teacher(cfg)
        self.channels_last = self.teacher.memory_format == torch.channels_last
        check_classes(self.student, self.teacher)
        self._optimizer_state = defaultdict(dict)
        self.equal_heads = True
        try:
            check_equal_heads(self.teacher.model, self.student, reason="equal proposals")
        except UserError:
            self.equal_heads = False
        else:  # so that student, alpha 1 and teacher choose about as many proposals
            Distiller(student=self.student, teacher=self.teacher).init_student_from_teacher()

    def batch(self, height: int, width: int, images: int) -> list[dict]:
        """Inputs as Detectron2's mapper makes them: noise, and boxes of 16 pixels to half the image."""
        generator = torch.Generator().manual_seed(0)
        size, inputs = torch.tensor([width, height]), []
        for _ in range(images):
            share = torch.rand(OBJECTS_PER_IMAGE, 4, generator=generator)
            extent = 16 + share[:, :2] ** 2 * (size / 2 - 16).clamp(min=0)
            corner = share[:, 2:] * (size - extent)
            truth = Instances((height, width))
            truth.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
            truth.gt_classes = torch.randint(
                0, self.teacher.num_classes, (OBJECTS_PER_IMAGE,), generator=generator
            )
            pixels = (3, height, width)
            image = torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8)
            inputs.append({"image": image, "instances": truth, "height": height, "width": width})
        return inputs

    def autocast(self):
        """The context that a forward runs in."""
        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        )

    def method(self, *overrides, kind: type[ERA] = ERA, plain_heads: bool = False, **levers) -> ERA:
        """An ERA method from the config.

        Args:
            overrides: ``KEY, VALUE, ...`` below ``MODEL.ERA``.
            kind: the class.
            plain_heads: judge with the plain :class:`TeacherHeads`.
            levers: switches of :class:`FastTeacherHeads`.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        keys = [f"MODEL.ERA.{key}" for key in overrides[::2]]
        cfg.merge_from_list([x for pair in zip(keys, overrides[1::2], strict=True) for x in pair])
        torch.manual_seed(1)  # the same branches in every row
        arguments = kind.from_config(cfg, self.student, self.teacher)
        if arguments["heads"] is not None and (plain_heads or levers):
            parts = (
                self.teacher.model.proposal_generator,
                self.teacher.model.roi_heads,
                cfg.MODEL.ERA.TWI.PROPOSALS_PER_IMAGE,
            )
            options = {"student_pooler": self.student.roi_heads.box_pooler, **levers}
            arguments["heads"] = (
                TeacherHeads(*parts) if plain_heads else FastTeacherHeads(*parts, **options)
            )
        return kind(**arguments).to(self.device)

    def training_step(self, model: nn.Module, inputs: list[dict]) -> Callable[[], None]:
        """One optimiser step of a model as :class:`era.engine.trainer.StepTrainer` does it."""
        optimizer = build_optimizer(self.cfg, model)
        optimizer.state = self._optimizer_state  # one momentum a student weight, whatever the rows
        trainer = StepTrainer(
            model,
            itertools.repeat(inputs),
            optimizer,
            amp_dtype=self.amp_dtype,
            device_type=self.device.type,
        )

        def step() -> None:
            with EventStorage(0):
                trainer.run_step()

        return step

    def era_row(
        self, name: str, inputs: list[dict], method: ERA, *, channels_last: bool | None = None
    ) -> Row:
        """A distiller's training step.

        Args:
            channels_last: the teacher's memory layout; None for the config's.
        """
        methods = nn.ModuleDict({"era": method})
        model = Distiller(student=self.student, teacher=self.teacher, methods=methods)
        if channels_last is None:
            channels_last = self.channels_last
        prepare = self._preparation(model, training=True, channels_last=channels_last)
        return Row(name, self.training_step(model, inputs), prepare)

    def plain_rows(self, inputs: list[dict]) -> dict[str, Callable[[], Row]]:
        """Plain student step, teacher forward as Detectron2 runs it, and both one after the other: the
        floor. And the teacher forward with each speed option of ``MODEL.TEACHER``."""
        images = self.student.preprocess_image(inputs)
        with torch.no_grad():
            maps = self.student.backbone(images.tensor)
        like = {level: torch.empty(m.shape, device="meta") for level, m in maps.items()}
        size = tuple(images.tensor.shape[-2:])
        student_step = self.training_step(self.student, inputs)
        prepare = self._preparation(self.student, training=True)

        def teacher_step(teacher: Teacher) -> Callable[[], None]:
            def step() -> None:
                with self.autocast():
                    teacher.features(inputs, like, size)

            return step

        forward = teacher_step(self.teacher)

        def both() -> None:
            student_step()
            forward()

        def compiled() -> Row:
            teacher = Teacher(
                model=copy.deepcopy(self.teacher.model),
                input_format="BGR",
                received_format="RGB" if self.teacher.flip_channels else "BGR",
                source=self.teacher.source,
                compile_backbone=True,
            )
            return Row(COMPILED_TEACHER, teacher_step(teacher), prepare)

        steps = {PLAIN: student_step, TEACHER: forward, FLOOR: both}
        rows = {name: lambda n=name: Row(n, steps[n], prepare) for name in steps}
        laid_out = self._preparation(self.student, training=True, channels_last=True)
        name = f"{TEACHER}, {CHANNELS_LAST} on"
        rows[name] = lambda: Row(name, forward, laid_out)
        rows[COMPILED_TEACHER] = compiled
        return rows

    def inference_rows(self, inputs: list[dict]) -> dict[str, Callable[[], Row]]:
        """Detection of the student, of the student with ERA at alpha 1, and of the teacher."""

        def make(name: str) -> Row:
            model = {"student": self.student, "teacher": self.teacher}.get(name.split(": ")[1])
            if model is None:
                methods = nn.ModuleDict({"era": self.method("ALPHA", 1.0)})
                model = Distiller(student=self.student, teacher=self.teacher, methods=methods)

            def step() -> None:
                with torch.no_grad(), self.autocast():
                    model(inputs)

            return Row(name, step, self._preparation(model, training=False))

        names = [INFERENCE, "inference: alpha 1", "inference: teacher"]
        return {name: lambda n=name: make(n) for name in names}

    def sampled(self, inputs: list[dict]) -> tuple[int, int]:
        """Anchors and proposals that the student's losses look at in one step, over all images."""
        self.student.train()
        with torch.no_grad(), EventStorage(0), record(self.student) as recording, self.autocast():
            self.student(inputs)
        anchors = sum(int((labels >= 0).sum()) for labels in recording.anchor_labels)
        return anchors, sum(len(p) for p in recording.proposals)

    def _preparation(
        self, model: nn.Module, *, training: bool, channels_last: bool = False
    ) -> Callable[[], None]:
        def prepare() -> None:
            self.teacher.lay_out(channels_last=channels_last)
            self.student.zero_grad(set_to_none=True)
            model.train(training)
            torch.manual_seed(2)  # every row samples the same anchors and proposals

        return prepare


def plan(bench: Bench, inputs: list[dict]) -> Plan:
    """All rows of the main table.

    Levers that the config leaves no room for are left out, with a note.
    """
    era = bench.cfg.MODEL.ERA
    found = Plan(dict(bench.plain_rows(inputs)))

    def add(name: str, *overrides, **options) -> None:
        found.makers[name] = lambda: bench.era_row(
            name, inputs, bench.method(*overrides, **options)
        )

    add(MIMIC, *MIMIC_KEYS)
    found.makers[REFERENCE] = lambda: bench.era_row(
        REFERENCE,
        inputs,
        bench.method(kind=PlainLossERA, plain_heads=True),
        channels_last=False,
    )
    add(FAST)
    if era.TWI.RPN_WEIGHT > 0:
        add(f"{FAST}, sparse RPN pass off", sparse_rpn=False)
    if era.TWI.ROI_WEIGHT > 0:
        add(f"{FAST}, stacked ROI pass off", stacked_roi=False)
        add(f"{FAST}, folding off", fold=False)
        add(f"{FAST}, reuse of e_0's pooling off", student_pooler=None)
        if era.TWI.PROPOSALS_PER_IMAGE > 0:
            add(f"{FAST}, fewer TWI proposals off", "TWI.PROPOSALS_PER_IMAGE", 0)
        else:
            found.notes.append("MODEL.ERA.TWI.PROPOSALS_PER_IMAGE is 0: fewer proposals are off.")
    if era.HIDDEN_CHANNELS > 0:
        add(f"{FAST}, narrow branches off", "HIDDEN_CHANNELS", 0)
    else:
        found.notes.append("MODEL.ERA.HIDDEN_CHANNELS is 0: narrow branches are off.")
    add(f"{FAST}, narrow residual loss off", kind=PlainLossERA)
    switch = f"{FAST}, teacher {CHANNELS_LAST} {'off' if bench.channels_last else 'on'}"
    found.makers[switch] = lambda: bench.era_row(
        switch, inputs, bench.method(), channels_last=not bench.channels_last
    )
    add(f"{FAST}, MBRNet {COMPILE} on", "COMPILE", True)
    add(f"{FAST}, without TWI RPN loss", "TWI.RPN_WEIGHT", 0.0)
    add(f"{FAST}, without TWI ROI loss", "TWI.ROI_WEIGHT", 0.0)
    add(f"{FAST}, without KD loss", "KD_WEIGHT", 0.0)
    if not bench.method().estimator.mbrnet.is_factored:
        found.notes.append(
            "The branches do not end in a 1x1 conv without norm (MODEL.ERA.NORM, KERNEL_SIZE): nothing "
            "can be folded."
        )
    if not bench.equal_heads:
        found.notes.append(
            "Student and teacher heads differ in shape and are random: at inference they choose "
            "different numbers of proposals, so compare those rows with care."
        )
    found.makers.update(bench.inference_rows(inputs[:1]))
    return found
