"""Training and evaluation: Detectron2's DefaultTrainer for distillers and plain detectors alike."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import OrderedDict
from contextlib import nullcontext

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from era import compat
from era.checkpoint.reading import SafeCheckpointer
from era.checkpoint.student import save_plain_student
from era.config import INHERIT_FPN, INHERIT_NOTHING
from era.data.keyed import training_mapper
from era.data.unlabeled import build_mixed_loader
from era.engine.evaluation import DetectionEvaluator, evaluate, evaluate_teacher
from era.engine.preflight import teacher_record
from era.engine.schedule import amp_dtype, scale_to_world
from era.modeling.distiller import Distiller
from era.modeling.teacher_cache import TeacherCache, build_teacher_cache
from era.registry import is_distiller

logger = logging.getLogger(__name__)

STUDENT_FOLDER = "student"  # below OUTPUT_DIR: the plain student at the end of training
GPU_MEMORY = "gpu_memory_mib"  # a scalar: most memory of tensors on the main process's GPU so far
# float16 skips a step whose scaled gradients overflow and halves the scale, from 65536. Below this (fairseq's
# bound; thirty steps in a row) no scale helps.
MIN_LOSS_SCALE = 1e-4


class StepTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer with gradient accumulation and mixed precision on GPU and CPU.

    Args:
        model, data_loader, optimizer: as SimpleTrainer.
        accumulation_steps: batches whose mean gradient makes one optimiser step.
        amp_dtype: type of autocast, None for float32 throughout. float16 scales the loss.
        device_type: ``cuda`` or ``cpu``, for autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation_steps: int = 1,
        amp_dtype: torch.dtype | None = None,
        device_type: str = "cuda",
    ):
        super().__init__(model, data_loader, optimizer)
        self.accumulation_steps = accumulation_steps
        self.amp_dtype = amp_dtype
        self.device_type = device_type
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=amp_dtype == torch.float16)

    def run_step(self) -> None:
        """One optimiser step: forward and backward of every batch in it, then the update.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; the weights are as before the step.
        """
        assert self.model.training, "the model was changed to eval mode"
        self.optimizer.zero_grad()
        data_time, total = 0.0, {}
        for index in range(self.accumulation_steps):
            start = time.perf_counter()
            data = compat.next_batch(self)
            data_time += time.perf_counter() - start
            is_last = index == self.accumulation_steps - 1
            with self._no_sync() if not is_last else nullcontext():
                with torch.autocast(
                    self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
                ):
                    losses = self.model(data)
                losses = {name: loss / self.accumulation_steps for name, loss in losses.items()}
                self.grad_scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0.0) + loss.detach()
        self.after_backward()
        compat.write_metrics(self, total, data_time)
        self._check_gradients()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _check_gradients(self) -> None:
        # DDP has averaged the gradients: every process sees the same and stops alike.
        if self.grad_scaler.is_enabled():  # it looks at the gradients itself, and skips the step
            scale = self.grad_scaler.get_scale()
            if scale < MIN_LOSS_SCALE:
                raise FloatingPointError(
                    f"gradients in float16 were not finite at any loss scale down to {scale:.1e} "
                    f"at iteration {self.iter}"
                )
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not torch.isfinite(get_total_norm(gradients)):  # all that the host waits for
            raise FloatingPointError(f"a gradient became infinite or NaN at iteration {self.iter}")

    def _no_sync(self):
        is_ddp = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if is_ddp else nullcontext()

    def state_dict(self) -> dict:
        """Optimiser, hooks, and the loss scale of float16."""
        state = super().state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Inverse of :meth:`state_dict`; a checkpoint of a run in another precision is accepted."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class Trainer(DefaultTrainer):
    """Trains distillers, teachers and plain baselines by config, on GPUs and on the CPU.

    Unlike DefaultTrainer it works with several CPU processes, accumulates gradients, reads checkpoints
    without running pickled code, evaluates on COCO, and leaves a plain student behind.

    Args:
        cfg: config after :func:`era.engine.launch.setup_config`.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)  # DefaultTrainer's own __init__ cannot do CPU DDP
        cfg = scale_to_world(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        if isinstance(model, Distiller) and model.teacher is not None:
            model.teacher.cache = build_teacher_cache(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        device = torch.device(cfg.MODEL.DEVICE)
        ddp_options = {"device_ids": None} if device.type == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp_options)
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
            amp_dtype=amp_dtype(cfg),
            device_type=device.type,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **teacher_record(model)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._teacher_results: dict | None = None
        self.register_hooks(self.build_hooks())

    @property
    def bare_model(self) -> nn.Module:
        """The model without DDP around it."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def is_preparation(self) -> bool:
        """Whether only a part of a method is trained, and the student is of no interest."""
        return isinstance(self.bare_model, Distiller) and self.bare_model.preparing

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer; a fresh start of a distiller may let the student inherit weights."""
        super().resume_or_load(resume)
        resumed = resume and self.checkpointer.has_checkpoint()
        inherited = self.cfg.MODEL.DISTILLER.INIT_STUDENT
        if is_distiller(self.cfg) and inherited != INHERIT_NOTHING and not resumed:
            self.bare_model.init_student_from_teacher(fpn=inherited == INHERIT_FPN)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, the memory of a GPU, the figures of the teacher's cache, and the plain student at the
        end."""
        ret = super().build_hooks()
        if self.cfg.MODEL.DEVICE.startswith("cuda"):
            ret.insert(0, GpuMemory())  # before the writers
        teacher = self.bare_model.teacher if isinstance(self.bare_model, Distiller) else None
        if teacher is not None and teacher.cache is not None:
            ret.insert(0, CacheFigures(teacher.cache))
        if comm.is_main_process() and not self.is_preparation:
            ret.append(SaveStudent())
        return ret

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """Batches of ``IMS_PER_BATCH / ACCUMULATION_STEPS`` images over all processes; where
        ``DATASETS.UNLABELED`` names sets, ``UNLABELED_PER_BATCH / ACCUMULATION_STEPS`` of them without labels."""
        steps = cfg.SOLVER.ACCUMULATION_STEPS
        total = cfg.SOLVER.IMS_PER_BATCH // steps
        if len(cfg.DATASETS.UNLABELED) == 0:
            return build_detection_train_loader(
                cfg, mapper=training_mapper(cfg), total_batch_size=total
            )
        unlabeled = cfg.SOLVER.UNLABELED_PER_BATCH // steps
        labeled = build_detection_train_loader(
            cfg, mapper=training_mapper(cfg), total_batch_size=total - unlabeled
        )
        return build_mixed_loader(cfg, labeled, unlabeled)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Detectron2's test loader."""
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        """COCO evaluation into ``OUTPUT_DIR/inference``."""
        return DetectionEvaluator(
            dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference")
        )

    def test(self, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate on every ``DATASETS.TEST``; with ``TEST.EVAL_TEACHER`` the teacher too, once. Nothing where only a
        part of a method is trained."""
        if self.is_preparation:
            return OrderedDict()
        results = evaluate(cfg, model)
        if cfg.TEST.EVAL_TEACHER and isinstance(self.bare_model, Distiller):
            if self._teacher_results is None:
                self._teacher_results = evaluate_teacher(cfg, self.bare_model)
            results["teacher"] = self._teacher_results
        return results


class GpuMemory(HookBase):
    """Puts the most memory that tensors took on this process's GPU so far, in MiB, into the event storage, as
    Detectron2's own hooks print it and write it nowhere."""

    def after_step(self) -> None:
        """Evaluations before this step count too."""
        mib = torch.cuda.max_memory_allocated() / 2**20
        self.trainer.storage.put_scalar(GPU_MEMORY, mib, smoothing_hint=False)


class CacheFigures(HookBase):
    """Puts the figures of the teacher's cache into the event storage at every step, and into the log at the end."""

    def __init__(self, cache: TeacherCache):
        self.cache = cache

    def after_step(self) -> None:
        """Totals since the process began, not to be smoothed."""
        self.trainer.storage.put_scalars(**self.cache.figures(), smoothing_hint=False)

    def after_train(self) -> None:
        """One line, also if training stopped early."""
        logger.info(self.cache.summary())


class SaveStudent(HookBase):
    """After complete training, writes the plain student to ``OUTPUT_DIR/student``."""

    def after_train(self) -> None:
        """Nothing is written if training stopped early."""
        trainer = self.trainer
        if trainer.iter < trainer.max_iter:
            return
        model = trainer.bare_model
        student = model.student if isinstance(model, Distiller) else model
        folder = os.path.join(trainer.cfg.OUTPUT_DIR, STUDENT_FOLDER)
        path = save_plain_student(student, trainer.cfg, folder)
        logger.info("The plain student, an ordinary Detectron2 model, is in %s", path)
