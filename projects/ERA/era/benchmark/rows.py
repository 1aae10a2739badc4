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

from era.config import student_config, validate_config
from era.engine.stepping import StepTrainer
from era.errors import UserError
from era.methods import Method
from era.modeling.detectors import detector_of
from era.modeling.distiller import Distiller
from era.modeling.teacher import Teacher, zero_init_residuals
from era.registry import METHOD_REGISTRY, methods_of, set_alpha

OBJECTS_PER_IMAGE = 8
PLAIN, TEACHER, FLOOR = "plain student step", "teacher forward", "floor"
INFERENCE, ALPHA_1 = "inference: student", "inference: alpha 1"
CHANNELS_LAST, COMPILE = "channels-last", "torch.compile"
COMPILED_TEACHER = f"{TEACHER}, {COMPILE} on"
Builder = Callable[..., Method]


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
        self.detector = detector_of(self.student)
        self.detector.check_student()
        zero_init_residuals(self.student)
        self.teacher = Teacher(cfg)
        self.teacher.fit_levels(self.detector, resample=cfg.MODEL.DISTILLER.RESAMPLE_LEVELS)
        self.channels_last = self.teacher.memory_format == torch.channels_last
        self._optimizer_state = defaultdict(dict)
        self.equal_heads = True
        try:
            self.detector.check_equal_heads(self.teacher.detector, reason="equal proposals")
        except UserError:
            self.equal_heads = False
        else:  # so that student, alpha 1 and teacher choose about as many proposals
            self.detector.inherit(self.teacher.detector, fpn=False)

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
                0, self.detector.num_classes, (OBJECTS_PER_IMAGE,), generator=generator
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

    def methods(
        self, *, alpha: float = 0.0, cfg: CfgNode | None = None, **instead: Builder
    ) -> nn.ModuleDict:
        """The config's methods, from the same random numbers at every call.

        Args:
            alpha: how far inference leans on the teacher.
            cfg: another config of the same student and teacher; None for the bench's own.
            instead: by a method's lower-case name, what builds it in another way.
        """
        cfg = (cfg or self.cfg).clone()
        if alpha > 0:
            set_alpha(cfg, alpha)
        built = {}
        for name, method in methods_of(cfg).items():
            torch.manual_seed(1)  # the same branches, adapters and projectors in every row
            built[name] = instead.get(name, method)(cfg, self.detector, self.teacher)
        return nn.ModuleDict(built).to(self.device)

    def training_step(self, model: nn.Module, inputs: list[dict]) -> Callable[[], None]:
        """One optimiser step of a model as :class:`era.engine.stepping.StepTrainer` does it."""
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

    def distiller_row(
        self,
        name: str,
        inputs: list[dict],
        methods: nn.ModuleDict,
        *,
        channels_last: bool | None = None,
    ) -> Row:
        """A distiller's training step.

        Args:
            channels_last: the teacher's memory layout; None for the config's.
        """
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
        """Detection of the student, of the run's methods at alpha 1 if one has an alpha, and of the teacher."""

        def make(name: str) -> Row:
            model = {"student": self.student, "teacher": self.teacher}.get(name.split(": ")[1])
            if model is None:
                methods = self.methods(alpha=1.0)
                model = Distiller(student=self.student, teacher=self.teacher, methods=methods)

            def step() -> None:
                with torch.no_grad(), self.autocast():
                    model(inputs)

            return Row(name, step, self._preparation(model, training=False))

        has_alpha = any(method.alpha_key for method in methods_of(self.cfg).values())
        names = [INFERENCE, *([ALPHA_1] if has_alpha else []), "inference: teacher"]
        return {name: lambda n=name: make(n) for name in names}

    def _preparation(
        self, model: nn.Module, *, training: bool, channels_last: bool = False
    ) -> Callable[[], None]:
        def prepare() -> None:
            self.teacher.set_memory_format(channels_last=channels_last)
            self.student.zero_grad(set_to_none=True)
            model.train(training)
            torch.manual_seed(2)  # every row samples the same anchors and proposals

        return prepare


def plan(bench: Bench, inputs: list[dict]) -> Plan:
    """All rows of the main table: floor, the run's methods together, each method's own further rows, and
    inference. Where a row does not fit this student and teacher, a note says why."""
    found = Plan(dict(bench.plain_rows(inputs)))
    together = run_name(bench.cfg)

    def add(name: str, make: Callable[[], nn.ModuleDict], **options) -> None:
        found.makers[name] = lambda: bench.distiller_row(name, inputs, make(), **options)

    add(together, bench.methods)
    switch = f"{together}, teacher {CHANNELS_LAST} {'off' if bench.channels_last else 'on'}"
    add(switch, bench.methods, channels_last=not bench.channels_last)
    for lower, method in methods_of(bench.cfg).items():
        for name, build in method.benchmark_rows(bench.cfg).items():
            row = f"{method.__name__}, {name}"
            try:
                bench.methods(**{lower: build})
            except UserError as e:
                found.notes.append(f"{row} is left out: {e}")
                continue
            add(row, lambda n=lower, b=build: bench.methods(**{n: b}))
    if not bench.equal_heads:
        found.notes.append(
            "Student and teacher heads differ in shape and are random: at inference they choose "
            "different numbers of proposals, so compare those rows with care."
        )
    found.makers.update(bench.inference_rows(inputs[:1]))
    return found


def other_methods(bench: Bench, inputs: list[dict], plan: Plan) -> None:
    """Add a row of every registered method that the config does not name, alone, with the settings that the config gives
    it; where it does not fit this student and teacher, a note says why."""
    named = methods_of(bench.cfg)
    for name, _ in sorted(METHOD_REGISTRY):
        if name.lower() in named:
            continue
        cfg = bench.cfg.clone()
        cfg.MODEL.DISTILLER.METHODS = (name,)
        try:
            validate_config(cfg)
            bench.methods(cfg=cfg)
        except UserError as e:
            plan.notes.append(f"{name} is left out: {e}")
            continue

        def make(name: str = name, cfg: CfgNode = cfg) -> Row:
            return bench.distiller_row(name, inputs, bench.methods(cfg=cfg))

        plan.makers[name] = make


def run_name(cfg: CfgNode) -> str:
    """The row of the config's methods together, e.g. ``ERA`` or ``ERA + PKD``."""
    return " + ".join(cfg.MODEL.DISTILLER.METHODS)
