"""Hooks of the trainer beside Detectron2's: checkpoints, the best weights, the plain student, figures."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook

from era.checkpoint.reading import SafeCheckpointer, peek
from era.checkpoint.student import save_plain_student
from era.checkpoint.writing import HASH, PARTIAL, damage, remove
from era.engine.ema import averaged
from era.modeling.distiller import Distiller
from era.modeling.teacher_cache import TeacherCache

logger = logging.getLogger(__name__)

STUDENT_FOLDER = "student"  # below OUTPUT_DIR: the plain student at the end of training
GPU_MEMORY = "gpu_memory_mib"  # a scalar: most memory of tensors on the main process's GPU so far
BEST = "model_best"  # the weights of the best evaluation


class Checkpoints(HookBase):
    """Writes ``model_<iteration>.pth`` periodically and ``model_final.pth`` at the end, as Detectron2's hook of that
    kind does, and removes what it wrote itself and is no longer among the last.

    Args:
        checkpointer: writes them.
        period: iterations from one to the next; 0 = at the end only.
        keep: so many of the periodic ones stay; 0 = all.

    Attributes:
        names: of the periodic ones that are there, the oldest first; a part of the checkpoint.
    """

    def __init__(self, checkpointer: SafeCheckpointer, *, period: int, keep: int):
        self.checkpointer, self.period, self.keep = checkpointer, period, keep
        self.names: list[str] = []

    def before_train(self) -> None:
        """What a process that was killed left half written goes."""
        folder = glob.escape(self.checkpointer.save_dir)
        for name in ("*.pth", f"*{HASH}", "last_checkpoint"):
            remove(*glob.glob(os.path.join(folder, name + PARTIAL)))

    def after_step(self) -> None:
        """Raises UserError where a checkpoint cannot be written."""
        iteration = self.trainer.iter
        if self.period > 0 and (iteration + 1) % self.period == 0:
            self.write(iteration)
        if iteration >= self.trainer.max_iter - 1:
            self.checkpointer.save("model_final", iteration=iteration)

    def write(self, iteration: int) -> None:
        """One of the periodic ones, after this iteration, whether it is due or not. Raises UserError where it cannot be
        written."""
        name = f"model_{iteration:07d}"
        self.names = [*(other for other in self.names if other != name), name]
        self.checkpointer.save(name, iteration=iteration)
        self.go_on_with(self.names)

    def go_on_with(self, names: list[str]) -> None:
        """These were written, of which only the last stay. A checkpoint also names those that it replaces."""
        self.names = list(names)
        while 0 < self.keep < len(self.names):
            path = os.path.join(self.checkpointer.save_dir, f"{self.names.pop(0)}.pth")
            remove(path, path + HASH)


class KeepBest(HookBase):
    """Keeps the weights of the best evaluation so far, the first of equal ones, in ``model_best.pth``.

    The file itself says which evaluation that was, so it is known again after a resume.

    Args:
        checkpointer: writes it.
        metric: name of a scalar of the evaluation; more is better.
        resumed: called when training begins, whether the run goes on from a checkpoint.

    Attributes:
        value, iteration: the best one and the iteration of it; None before the first.
    """

    def __init__(self, checkpointer: SafeCheckpointer, metric: str, resumed):
        self.checkpointer, self.metric, self.resumed = checkpointer, metric, resumed
        self.value: float | None = None
        self.iteration: int | None = None
        self._said = False

    def before_train(self) -> None:
        """Look at the file of the run that goes on."""
        path = os.path.join(self.checkpointer.save_dir, f"{BEST}.pth")
        if not self.resumed() or not os.path.isfile(path):
            return
        data = peek(path)
        problem = "unreadable" if data is None else damage(path)
        if problem:
            logger.warning("%s is damaged (%s): the best is looked for anew.", path, problem)
            return
        match data.get("best"):
            case {"metric": self.metric, "value": float(value), "iteration": int(iteration)}:
                self.value, self.iteration = value, iteration

    def after_step(self) -> None:
        """After the hook that evaluates."""
        self._look()

    def after_train(self) -> None:
        """The last evaluation."""
        self._look()

    def _look(self) -> None:
        storage = self.trainer.storage
        latest = storage.latest()
        evaluated = [name for name in latest if name.endswith("/AP")]
        if evaluated and self.metric not in latest and not self._said:
            self._said = True
            logger.warning(
                "TEST.BEST_METRIC means %s, which no evaluation gives, so no best weights are kept: name one such as %s.",
                self.metric, ", ".join(evaluated),
            )  # fmt: skip
        value, iteration = latest.get(self.metric, (float("nan"), -1))
        if iteration != storage.iter:
            return  # of an earlier evaluation
        if value > (float("-inf") if self.value is None else self.value):
            self.value, self.iteration = value, iteration
            best = {"metric": self.metric, "value": value, "iteration": iteration}
            self.checkpointer.save_weights(BEST, best=best)
            logger.info("The best %s so far, %.3f, is kept in %s.pth.", self.metric, value, BEST)


def best_metric(cfg: CfgNode) -> str | None:
    """The scalar that ``TEST.BEST_METRIC`` means; None where nothing is to be kept or compared."""
    name, tested = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if not name or not tested or cfg.TEST.EVAL_PERIOD <= 0:
        return None
    return name if len(tested) == 1 else f"{tested[0]}/{name}"


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
        if self.trainer.iter < self.trainer.max_iter:
            return
        with averaged(self.trainer.average):
            path = write_student(self.trainer)
        logger.info("The plain student, an ordinary Detectron2 model, is in %s", path)


def write_student(trainer) -> str:
    """The plain student out of the weights that a trainer's model holds, into ``OUTPUT_DIR/student``; its path."""
    model = trainer.bare_model
    student = model.student if isinstance(model, Distiller) else model
    folder = os.path.join(trainer.cfg.OUTPUT_DIR, STUDENT_FOLDER)
    return save_plain_student(student, trainer.cfg, folder)


def place_of_evaluation(hooks: Sequence[HookBase]) -> int:
    """Where the evaluation stands among hooks; their number if there is none."""
    found = (i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
    return next(found, len(hooks))
