"""Training and evaluation: Detectron2's DefaultTrainer for distillers and plain detectors alike."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections import OrderedDict
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PreciseBN
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from era import compat
from era.checkpoint.reading import SafeCheckpointer
from era.checkpoint.settings import settings_of
from era.config import INHERIT_FPN, INHERIT_NOTHING, student_config
from era.data.datasets import labeled_records
from era.data.keyed import training_mapper
from era.data.loader import labeled_loader
from era.data.pictures import BadTestPictures, WatchedLoader
from era.data.seeds import PRECISE_BN, STEP, derived_seed, seed_all
from era.data.unlabeled import build_mixed_loader
from era.devices import CPU, CUDA, kind_of
from era.engine.bad_step import keep_bad_step
from era.engine.best import Enough, insert_after_best
from era.engine.ema import (
    AveragingCheckpointer,
    UpdateAverage,
    WeightAverage,
    average_of,
    averaged,
)
from era.engine.evaluation import (
    DetectionEvaluator,
    build_test_loader,
    evaluate,
    evaluate_teacher,
)
from era.engine.guard import CheckWeights
from era.engine.hooks import (
    CacheFigures,
    Checkpoints,
    GpuMemory,
    KeepBest,
    SaveStudent,
    best_metric,
    place_of_evaluation,
)
from era.engine.preflight import check_start, teacher_record
from era.engine.resume import (
    MetricsFile,
    check_place,
    limit_histories,
    put_scalars_back,
    scalars_of,
    torchscript_without_history,
)
from era.engine.schedule import Shortened, amp_dtype, scale_to_world
from era.engine.stepping import StepTrainer
from era.engine.stopping import StopAtSignal, interruptible
from era.engine.time_limit import TimeLimit
from era.engine.tracking import TrackingWriter
from era.engine.validation_loss import validation_losses
from era.engine.watch import watch_of
from era.modeling.detectors import Detector, detector_of, known_family
from era.modeling.distiller import Distiller
from era.modeling.roi_align import gather_roi_align
from era.modeling.teacher_cache import build_teacher_cache
from era.registry import is_distiller

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains distillers, teachers and plain baselines by config, on GPUs and on the CPU.

    Unlike DefaultTrainer it works with several CPU processes, accumulates gradients, reads checkpoints
    without running pickled code, evaluates on COCO, and leaves a plain student behind. Resumed from a
    checkpoint it goes on as the run that wrote it would have, to the bit where the hardware's arithmetic allows it:
    every step's random numbers and pictures follow from :attr:`seed` and the iteration.

    Args:
        cfg: config after :func:`era.engine.preflight.setup_config`.

    Attributes:
        seed: ``SEED``; where none is set, one that the processes draw together and checkpoints keep.
        keeps_bad_steps: whether a step that had to be stopped is kept below ``OUTPUT_DIR``.
        average: of the weights, None without ``MODEL.EMA``; every process has its own, equal but for statistics.
    """

    keeps_bad_steps = True
    average: WeightAverage | None = None

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)  # DefaultTrainer's own __init__ cannot do CPU DDP
        cfg = scale_to_world(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        if isinstance(model, Distiller) and model.teacher is not None:
            model.teacher.cache = build_teacher_cache(cfg)
        speed_up(cfg, model)
        device = torch.device(cfg.MODEL.DEVICE)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        watch = watch_of(cfg, model)
        ddp_options = {"device_ids": None} if device.type == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp_options)
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
            amp_dtype=amp_dtype(cfg),
            device_type=device.type,
            max_loss=cfg.SOLVER.MAX_LOSS,
            watch=watch,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.schedule = Shortened.wrap(self.scheduler, cfg.SOLVER.MAX_ITER)
        self.average = average_of(cfg, self.bare_model)
        self.checkpointer = AveragingCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            average=self.average,
            settings=settings_of(cfg, processes=comm.get_world_size()),
            trainer=weakref.proxy(self),
            **teacher_record(model),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._teacher_results: dict | None = None
        self._resumed: dict | None = None  # what the checkpoint says of the place in the run
        self._metrics_file: MetricsFile | None = None  # of the main process, as the checkpoints
        self._checkpoints: Checkpoints | None = None
        self.register_hooks(self.build_hooks())
        self._begin_data_at(0)

    @property
    def bare_model(self) -> nn.Module:
        """The model without DDP around it."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def _detector(self) -> Detector | None:
        """The model, or a distiller's student, as a detector; None if no family knows it."""
        model = self.bare_model
        if isinstance(model, Distiller):
            return model.detector
        return detector_of(model) if known_family(student_config(self.cfg)) else None

    @property
    def is_preparation(self) -> bool:
        """Whether only a part of a method is trained, and the student is of no interest."""
        return isinstance(self.bare_model, Distiller) and self.bare_model.preparing

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer; a fresh start of a distiller may let the student inherit weights."""
        super().resume_or_load(resume)
        resumed = resume and self.checkpointer.has_checkpoint()
        if not resumed:
            inherit(self.cfg, self.bare_model, self.checkpointer)
        if self._resumed is not None:
            self._begin_data_at(self.start_iter)
        elif resumed:
            logger.warning(
                "The checkpoint is of a version that kept no place in the data and no random state: weights, "
                "optimiser and schedule go on exactly, the order of the pictures begins anew."
            )

    def _begin_data_at(self, iteration: int) -> None:
        steps = self.cfg.SOLVER.ACCUMULATION_STEPS
        self._trainer.data_loader.begin_at(self.seed, iteration * steps)
        period, batches = self.cfg.TEST.EVAL_PERIOD, self.cfg.TEST.PRECISE_BN.NUM_ITER
        for hook in self._hooks:
            if isinstance(hook, PreciseBN) and (loader := compat.precise_bn_loader(hook)):
                done = iteration // period if period > 0 else 0
                loader.begin_at(derived_seed(PRECISE_BN, self.seed), done * batches)

    def state_dict(self) -> dict:
        """As DefaultTrainer, and the place in the run, see :mod:`era.engine.resume`."""
        state = super().state_dict()
        state["place"] = {
            "seed": self.seed,
            "scalars": scalars_of(self.storage) if hasattr(self, "storage") else {},
            "metrics_written": self._metrics_file.written if self._metrics_file else -1,
            "checkpoints": self._checkpoints.names if self._checkpoints else [],
            "running": self._detector.running_state() if self._detector else {},
        }
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Inverse of :meth:`state_dict`; a checkpoint of a version without the place in the run is accepted.
        Raises ValueError where the place is of another form."""
        check_place(state_dict)
        super().load_state_dict(state_dict)
        self._resumed = state_dict.get("place")
        if self._resumed is not None and self.cfg.SEED < 0:
            self.seed = self._resumed["seed"]
        if self._resumed is not None and self._detector is not None:
            self._detector.load_running_state(self._resumed.get("running", {}))

    def before_train(self) -> None:
        """Where the run goes on from a checkpoint, the end of its iteration is done first: a checkpoint is written
        before the evaluation and the metrics of its iteration."""
        limit_histories(self.storage)
        super().before_train()
        if self._metrics_file is not None and self.start_iter > 0:
            written = self.start_iter - 1
            self._metrics_file.go_on_after((self._resumed or {}).get("metrics_written", written))
        if self._resumed is None:
            return
        put_scalars_back(self.storage, self._resumed["scalars"])
        if self._checkpoints is not None:
            self._checkpoints.go_on_with(self._resumed["checkpoints"])
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._after_checkpoint():
            hook.after_step()
        if self.schedule.is_shortened and self.start_iter >= self.max_iter:
            raise Enough(is_evaluated=False)
        self.iter = self.start_iter

    def _after_checkpoint(self) -> list[HookBase]:
        """Hooks that come after the one that writes checkpoints; the evaluation is the first."""
        return self._hooks[place_of_evaluation(self._hooks) :]

    def run_step(self) -> None:
        """A step whose random numbers follow from the seed, the iteration and the process alone. Raises Diverged."""
        seed_all(derived_seed(STEP, self.seed, self.iter, comm.get_rank()))
        with self._bad_steps_kept(updated=False):
            super().run_step()

    def after_step(self) -> None:
        """As DefaultTrainer. Raises Diverged where the weights have left every bound, Enough where a shortened schedule is
        at its end."""
        with self._bad_steps_kept(updated=True):
            super().after_step()
        if self.schedule.is_shortened and self.iter + 1 >= self.max_iter:
            raise Enough(is_evaluated=False)

    @contextmanager
    def _bad_steps_kept(self, *, updated: bool):
        try:
            yield
        except FloatingPointError as e:
            folder = self.cfg.OUTPUT_DIR if self.keeps_bad_steps else None
            raise keep_bad_step(e, self._trainer, folder, self.seed, updated=updated) from e

    def after_train(self) -> None:
        """A run that had nothing left to do is where it was; what failed is not evaluated. One that has seen enough is
        complete."""
        error = sys.exc_info()[1]
        if isinstance(error, Enough):
            self.iter = self.max_iter = self.iter + 1
        self.iter = min(self.iter, max(self.max_iter, self.start_iter))
        if error is not None and getattr(error, "is_evaluated", True):
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
        super().after_train()

    def train(self) -> dict | None:
        """As DefaultTrainer; the last evaluation's metrics on the main process. It may end early (``TEST.PATIENCE``,
        ``SOLVER.MAX_SECONDS``)."""
        try:
            with torchscript_without_history(self.cfg.MODEL.DEVICE):
                return super().train()
        except Enough:
            return compat.last_evaluation(self)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks with checkpoints of this project's own, the best weights, the memory of a GPU, the
        figures of the teacher's cache, and the plain student at the end; before all of them a look at the weights."""
        cfg = self.cfg
        ret = super().build_hooks()
        StopAtSignal.insert(ret)
        if self.average is not None:
            ret.insert(0, UpdateAverage(self.average))
        TimeLimit.insert(ret, self.schedule, cfg)
        if kind_of(cfg.MODEL.DEVICE) == CUDA:
            ret.insert(0, GpuMemory())  # before the writers
        teacher = self.bare_model.teacher if isinstance(self.bare_model, Distiller) else None
        if teacher is not None and teacher.cache is not None:
            ret.insert(0, CacheFigures(teacher.cache))
        if comm.is_main_process():
            self._checkpoints = Checkpoints(
                self.checkpointer,
                period=cfg.SOLVER.CHECKPOINT_PERIOD,
                keep=cfg.SOLVER.CHECKPOINTS_KEPT,
            )
            ret = [self._checkpoints if isinstance(h, PeriodicCheckpointer) else h for h in ret]
        best = None
        if comm.is_main_process() and not self.is_preparation:
            if metric := best_metric(cfg):
                best = KeepBest(self.checkpointer, metric, resumed=lambda: self.start_iter > 0)
                ret.insert(-1, best)  # after the evaluation, before the writers
            # Before the evaluation, which may find a picture that ends the run.
            ret.insert(place_of_evaluation(ret), SaveStudent())
        if not self.is_preparation:
            insert_after_best(ret, best, cfg)
        periods = (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
        return [CheckWeights(periods), *ret]

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, of which metrics.json can go on at a checkpoint, and those of ``TRACKING.WRITERS``."""
        cfg, folder = self.cfg, self.cfg.OUTPUT_DIR
        self._metrics_file = MetricsFile(os.path.join(folder, "metrics.json"))
        own = [CommonMetricPrinter(self.max_iter), self._metrics_file, TensorboardXWriter(folder)]
        trackers = [
            TrackingWriter(name, cfg, lambda: self.start_iter > 0) for name in cfg.TRACKING.WRITERS
        ]
        return [*own, *trackers]

    def save_checkpoint(self, iteration: int) -> None:
        """As the periodic checkpoints, out of turn; on the main process."""
        self._checkpoints.write(iteration)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> WatchedLoader:
        """Batches of ``IMS_PER_BATCH / ACCUMULATION_STEPS`` images over all processes; where
        ``DATASETS.UNLABELED`` names sets, ``UNLABELED_PER_BATCH / ACCUMULATION_STEPS`` of them without labels."""
        steps = cfg.SOLVER.ACCUMULATION_STEPS
        total = cfg.SOLVER.IMS_PER_BATCH // steps
        unlabeled = cfg.SOLVER.UNLABELED_PER_BATCH // steps if len(cfg.DATASETS.UNLABELED) else 0
        records = labeled_records(cfg)
        loader = labeled_loader(cfg, records, training_mapper(cfg, records), total - unlabeled)
        return WatchedLoader(build_mixed_loader(cfg, loader, unlabeled) if unlabeled else loader)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """The loader that :func:`era.engine.evaluation.evaluate` uses."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        """COCO evaluation into ``OUTPUT_DIR/inference``."""
        return DetectionEvaluator(
            dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference")
        )

    def test(self, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate on every ``DATASETS.TEST``, with averaged weights where there are any; with ``TEST.EVAL_TEACHER`` the
        teacher too, once. Nothing where only a part of a method is trained. All processes evaluate with the main one's
        buffers, as checkpoints hold them."""
        if self.is_preparation:
            return OrderedDict()
        with (
            averaged(self.average),
            interruptible(),
        ):  # no signal between two weights of an exchange
            return self._test(cfg, model)

    def _test(self, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        if isinstance(self.model, DistributedDataParallel):
            for buffer in self.bare_model.buffers():  # such as BatchNorm's, of each process's own
                dist.broadcast(buffer, 0)
        try:
            results = evaluate(cfg, model)
        except BadTestPictures:  # in every process alike: what was learnt so far stays
            if self._checkpoints and self.iter < self.max_iter:  # else it was saved already
                self._checkpoints.write(self.iter)
            raise
        if cfg.TEST.LOSS:
            results["validation"] = validation_losses(cfg, self.bare_model)
        if cfg.TEST.EVAL_TEACHER and isinstance(self.bare_model, Distiller):
            if self._teacher_results is None:
                self._teacher_results = evaluate_teacher(cfg, self.bare_model)
            results["teacher"] = self._teacher_results
        return results


def speed_up(cfg: CfgNode, model: nn.Module) -> None:
    """On a CPU, ROIAlign of a model that is to train as :func:`~era.modeling.roi_align.gather_roi_align`."""
    if kind_of(cfg.MODEL.DEVICE) != CPU:
        return
    gather_roi_align(model)
    if isinstance(model, Distiller) and model.teacher is not None:  # no submodule
        gather_roi_align(model.teacher.model)


def inherit(cfg: CfgNode, model: nn.Module, checkpointer: SafeCheckpointer) -> None:
    """The student of a fresh start takes over what ``MODEL.DISTILLER.INIT_STUDENT`` says, after a load of ``MODEL.WEIGHTS``.

    Raises:
        UserError: as :func:`~era.engine.preflight.check_start`.
    """
    inherited = cfg.MODEL.DISTILLER.INIT_STUDENT
    if is_distiller(cfg) and inherited != INHERIT_NOTHING:
        check_start(cfg, model, checkpointer)
        model.init_student_from_teacher(fpn=inherited == INHERIT_FPN)
