"""The best evaluation of a run: training that ends when it finds no better one, and the student that is left."""

from __future__ import annotations

import json
import logging
import os

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from era import compat
from era.checkpoint.reading import SafeCheckpointer, peek
from era.checkpoint.writing import damage, write_text_whole
from era.engine.hooks import BEST, KeepBest, best_metric, write_student
from era.errors import UserError

logger = logging.getLogger(__name__)

BEST_FILE = "best.json"  # beside the plain student: which evaluation it is of


class Enough(BaseException):
    """Training ends here, as it does after its last iteration: no evaluation was better for a while, or its time is over.
    Like KeyboardInterrupt no ``except Exception`` takes it.

    Args:
        is_evaluated: whether the weights were evaluated just now; else that is done at the end.
    """

    def __init__(self, *, is_evaluated: bool = True):
        super().__init__()
        self.is_evaluated = is_evaluated


def check_best(cfg: CfgNode) -> None:
    """``TEST.PATIENCE`` and ``TEST.LEAVE_BEST``, before a training.

    Raises:
        UserError: a number below 0, or there is nothing that they could compare.
    """
    if cfg.TEST.PATIENCE < 0:
        raise UserError(
            f"TEST.PATIENCE is {cfg.TEST.PATIENCE}: expected a number of evaluations, or 0 to train to the end; set it so."
        )
    for key, off in (("PATIENCE", 0), ("LEAVE_BEST", False)):
        if cfg.TEST[key] != off and best_metric(cfg) is None:
            raise UserError(
                f"TEST.{key} is {cfg.TEST[key]}, and no evaluations are compared: expected DATASETS.TEST, TEST.EVAL_PERIOD "
                f"above 0 and TEST.BEST_METRIC; set them, or set TEST.{key} {off}."
            )


class Patience(HookBase):
    """Ends training, in all processes together, after so many evaluations in a row that were not the best.

    How many there were follows from the iteration of the best one, which ``model_best.pth`` tells after a resume.

    Args:
        best: on the main process, the hook that compares them, which comes before this one; None on the others.
        patience: evaluations.
        period: iterations from one to the next.
    """

    def __init__(self, best: KeepBest | None, *, patience: int, period: int):
        self.best, self.patience, self.period = best, patience, period

    def after_step(self) -> None:
        """Raises Enough, with ``model_final.pth`` written; not after the last iteration."""
        done = self.trainer.iter + 1
        if done % self.period or done >= self.trainer.max_iter:
            return
        if not _agreed(self.best is not None and self.waited(done) >= self.patience):
            return
        logger.info(
            "TEST.PATIENCE %d: %d evaluations in a row were not better, so training ends after %d of %d iterations.",
            self.patience, self.patience, done, self.trainer.max_iter,
        )  # fmt: skip
        if comm.is_main_process():
            self.trainer.checkpointer.save("model_final", iteration=self.trainer.iter)
        raise Enough

    def waited(self, done: int) -> int:
        """Evaluations since the best one, when so many iterations are done; 0 before there is a best."""
        iteration = self.best.iteration
        return 0 if iteration is None else done // self.period - (iteration + 1) // self.period


def insert_after_best(hooks: list[HookBase], best: KeepBest | None, cfg: CfgNode) -> None:
    """Into a trainer's hooks what ``TEST.PATIENCE`` and ``TEST.LEAVE_BEST`` ask for.

    Args:
        best: the hook that compares evaluations, among them; None on processes other than the main one.
    """
    place = len(hooks) if best is None else hooks.index(best) + 1
    if cfg.TEST.LEAVE_BEST and best is not None:
        hooks.insert(place, LeaveBest())
    if cfg.TEST.PATIENCE > 0:
        hook = Patience(best, patience=cfg.TEST.PATIENCE, period=cfg.TEST.EVAL_PERIOD)
        hooks.insert(place, hook)


def _agreed(ends: bool) -> bool:
    """Whether any process says so; all ask together."""
    if comm.get_world_size() == 1:
        return ends
    answer = torch.tensor([int(ends)], dtype=torch.int32)
    dist.all_reduce(answer, dist.ReduceOp.MAX, group=compat.cpu_group())
    return bool(answer)


class LeaveBest(HookBase):
    """After complete training, and after its last evaluation, the plain student in ``OUTPUT_DIR/student`` becomes that
    of the best evaluation, and ``best.json`` beside it says of which iteration it is."""

    def after_train(self) -> None:
        """Nothing is written if training stopped before its end. Raises UserError where it cannot be."""
        trainer = self.trainer
        if trainer.iter < trainer.max_iter:
            return
        path = os.path.join(trainer.cfg.OUTPUT_DIR, f"{BEST}.pth")
        data = peek(path)
        problem = "absent or unreadable" if data is None else damage(path)
        match (data or {}).get("best"):
            case {"metric": str(), "value": float(value), "iteration": int(iteration)}:
                pass
            case _:
                problem = problem or "it does not say which evaluation it is of"
        if problem:
            logger.warning(
                "%s cannot be used (%s): the plain student stays the last one.", path, problem
            )
            return
        SafeCheckpointer(trainer.bare_model, save_to_disk=False).load(path, checkpointables=[])
        student = write_student(trainer)
        # The evaluation at the end counts as one after the last iteration.
        about = {
            "metric": data["best"]["metric"],
            "value": value,
            "iterations": min(iteration + 1, trainer.max_iter),
        }
        about["iterations_of_the_run"] = trainer.max_iter
        write_text_whole(
            json.dumps(about, indent=1) + "\n", os.path.join(os.path.dirname(student), BEST_FILE)
        )
        logger.info(
            "The plain student in %s is the best one: %s %.3f after %d of %d iterations.",
            student, about["metric"], value, about["iterations"], trainer.max_iter,
        )  # fmt: skip
