"""What is checked before a process is spawned or a file is written."""

from __future__ import annotations

import argparse
import functools
import logging
import operator
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from era.checkpoint.reading import SafeCheckpointer, misfits
from era.checkpoint.settings import settings_of
from era.checkpoint.teacher import TeacherRecord
from era.config import INHERIT_NOTHING, load_config, student_config, validate_config
from era.data.datasets import check_datasets, check_num_classes, register_from_config
from era.data.unlabeled import check_unlabeled
from era.devices import CUDA, MPS, check_mps, is_there, kind_of
from era.engine.best import check_best
from era.engine.ema import AveragingCheckpointer, check_average
from era.engine.room import check_room
from era.engine.schedule import scale_to_world
from era.engine.tracking import check_tracking
from era.errors import UserError
from era.modeling.detectors import check_family, known_family
from era.modeling.distiller import Distiller
from era.modeling.teacher_cache import cache_folder
from era.registry import is_distiller, methods_of

logger = logging.getLogger(__name__)

MOST = sys.float_info.max
# Least and most that training can work with.
RANGES = (
    ("SOLVER.MAX_ITER", 1, MOST),
    ("SOLVER.IMS_PER_BATCH", 1, MOST),
    ("SOLVER.BASE_LR", 0, MOST),
    ("SOLVER.MOMENTUM", 0, 1),
    ("SOLVER.WEIGHT_DECAY", 0, MOST),
    ("SOLVER.GAMMA", 0, MOST),
    ("SOLVER.WARMUP_FACTOR", 0, 1),
    ("SOLVER.WARMUP_ITERS", 0, MOST),
    ("SOLVER.MAX_SECONDS", 0, MOST),  # 0 = as long as it takes
    ("SOLVER.CHECKPOINT_PERIOD", 0, MOST),  # 0 = at the end only
    ("TEST.EVAL_PERIOD", 0, MOST),
    ("DATALOADER.NUM_WORKERS", 0, 1024),
    ("INPUT.MAX_SIZE_TRAIN", 1, MOST),
)
SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")


def setup_config(args: argparse.Namespace) -> CfgNode:
    """The run's config: file, overrides, the device at hand, scaled to the processes at work.

    Raises:
        UserError: see :mod:`era.config` and :func:`era.engine.schedule.scale_to_world`.
    """
    if args.num_gpus < 1 or args.num_machines < 1:
        raise UserError(
            f"--num-gpus is {args.num_gpus} and --num-machines {args.num_machines}: expected at least 1 "
            "each (on a machine without a GPU, --num-gpus counts CPU processes)."
        )
    cfg = load_config(args.config_file, args.opts)
    kind = kind_of(cfg.MODEL.DEVICE)
    if kind == CUDA and not is_there(kind):
        logger.warning("No GPU on this machine: running on the CPU (MODEL.DEVICE cpu).")
        cfg.MODEL.DEVICE = "cpu"
    validate_config(cfg)
    world_size = args.num_gpus * args.num_machines
    if not args.eval_only:
        check_schedule(cfg)
        cfg = scale_to_world(cfg, world_size)
        cfg.defrost()
    if kind == MPS:
        told = check_mps(
            processes=world_size,
            mixed_precision=cfg.SOLVER.AMP.ENABLED,
            deformable=any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE),
        )
        if told:
            logger.warning(told)
    if cfg.MODEL.DEVICE == "cpu" and world_size > 1:
        for key in keys_with_value(cfg, "SyncBN"):
            raise UserError(
                f"{key} is SyncBN, which torch cannot do in {world_size} CPU processes: use BN or GN, or one "
                "process."
            )
    cfg.freeze()
    return cfg


def check_schedule(cfg: CfgNode) -> None:
    """Numbers of ``SOLVER``, ``DATALOADER``, ``MODEL.EMA`` and ``TEST`` that training can work with.

    Raises:
        UserError: the first that is not.
    """
    for key, low, high in RANGES:
        value = functools.reduce(operator.getitem, key.split("."), cfg)
        if not low <= value <= high:  # NaN neither
            upper = f" to {high:g}" if high < MOST else " or more, and finite"
            raise UserError(f"{key} is {value}: expected {low:g}{upper}; set it so.")
    steps = cfg.SOLVER.STEPS
    if any(type(s) is not int or s < 0 for s in steps) or list(steps) != sorted(set(steps)):
        raise UserError(
            f"SOLVER.STEPS is {tuple(steps)}: expected rising numbers of iterations; set it so."
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME not in SCHEDULES:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME is {cfg.SOLVER.LR_SCHEDULER_NAME!r}: expected one of "
            f"{', '.join(SCHEDULES)}."
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR" and cfg.SOLVER.BASE_LR == 0:
        raise UserError(
            "SOLVER.BASE_LR is 0, by which WarmupCosineLR divides: expected a rate above 0; set it so, or choose "
            "WarmupMultiStepLR (SOLVER.LR_SCHEDULER_NAME) to train nothing but statistics."
        )
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if not sizes or any(type(size) is not int or size < 0 for size in sizes):
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes}: expected one or more numbers of pixels; set it so."
        )
    check_average(cfg)
    check_best(cfg)


def keys_with_value(cfg: CfgNode, value: object, prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys that have this value, whoever owns them."""
    for key, found in cfg.items():
        if isinstance(found, CfgNode):
            yield from keys_with_value(found, value, f"{prefix}{key}.")
        elif found == value:
            yield f"{prefix}{key}"


def preflight(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check data, output folder, models, their weights and the room for checkpoints before anything is written.

    The models are built once on the CPU and dropped: seconds, for a clear sentence instead of a traceback
    out of a spawned process an hour later.

    Raises:
        UserError: whatever is wrong first.
    """
    check_devices(cfg, args.num_gpus)
    check_data(cfg, for_training=not args.eval_only, pictures=True)
    check_folders(cfg, for_training=not args.eval_only)
    if args.eval_only:
        with _quiet("fvcore", "era"):  # the run itself will say all of it again
            build_for_evaluation(_on_cpu(cfg), resume=args.resume)
    else:
        check_tracking(cfg)
        processes = args.num_gpus * args.num_machines
        model, _ = build_for_training(cfg, resume=args.resume, processes=processes)
        check_room(cfg, model)


def check_devices(cfg: CfgNode, num_gpus: int) -> None:
    """This machine has the GPUs.

    Raises:
        UserError: it has fewer.
    """
    if kind_of(cfg.MODEL.DEVICE) == CUDA and num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus is {num_gpus}, this machine has {torch.cuda.device_count()}: ask for at "
            "most that."
        )


def check_folders(cfg: CfgNode, *, for_training: bool) -> None:
    """The folders that a run writes into.

    Raises:
        UserError: one cannot be written.
    """
    check_writable(cfg.OUTPUT_DIR)
    folder = cache_folder(cfg) if is_distiller(cfg) and for_training else None
    if folder is not None:
        check_writable(folder, key="MODEL.TEACHER.CACHE", what="the teacher's maps")


def build_for_training(cfg: CfgNode, *, resume: bool, processes: int = 1) -> tuple[nn.Module, Any]:
    """What a run trains, built on the CPU, with the weights that it starts from or is resumed from.

    Args:
        resume: from the last checkpoint of ``OUTPUT_DIR``, if there is one.
        processes: of the run; what a checkpoint was written with is compared with it.

    Returns:
        The model, and :attr:`SafeCheckpointer.incompatible` of its weights, None where none were read.

    Raises:
        UserError: a key, the teacher, the weights, or the fit of student and teacher is wrong.
    """
    settings = settings_of(cfg, processes=processes)
    cfg = _on_cpu(cfg)
    with _quiet("fvcore", "era"):  # the run itself will say all of it again
        model = build_model_of(cfg)
        checkpointer = AveragingCheckpointer(model, cfg.OUTPUT_DIR, settings=settings, average=None)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        if not (resume and checkpointer.has_checkpoint()):
            check_start(cfg, model, checkpointer)
    return model, checkpointer.incompatible


def _on_cpu(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@contextmanager
def _quiet(*names: str):
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def check_start(cfg: CfgNode, model: nn.Module, checkpointer: SafeCheckpointer) -> None:
    """A student's heads start from one place, after a load of ``MODEL.WEIGHTS``: from that file, or from the teacher.

    A file of a backbone, or of a detector of other classes, leaves weights of the heads as they were built, and what is
    inherited undoes nothing that was learnt for this student.

    Raises:
        UserError: the file brought all of the heads, and ``MODEL.DISTILLER.INIT_STUDENT`` would put the teacher's there.
    """
    inherited = cfg.MODEL.DISTILLER.INIT_STUDENT
    if not is_distiller(cfg) or inherited == INHERIT_NOTHING or checkpointer.incompatible is None:
        return
    heads = model.detector.inheritable(fpn=False)
    if heads.keys().isdisjoint(checkpointer.incompatible.missing_keys):
        raise UserError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r} brings a student with trained heads, and MODEL.DISTILLER.INIT_STUDENT "
            f"{inherited} would put the teacher's in their place: set MODEL.DISTILLER.INIT_STUDENT none to go on from "
            "that student, or name a file of a backbone alone in MODEL.WEIGHTS."
        )


def check_data(cfg: CfgNode, *, for_training: bool, pictures: bool = False) -> None:
    """Register datasets of one's own and check all that the config names.

    Args:
        pictures: open every picture's file as well.

    Raises:
        UserError: see :mod:`era.data.datasets` and :mod:`era.data.unlabeled`.
    """
    register_from_config(cfg)
    class_names = check_datasets(cfg, for_training=for_training, pictures=pictures)
    if for_training:
        check_unlabeled(cfg, opened=pictures)
    student = student_config(cfg)
    family = known_family(student)
    if class_names is not None and family is not None:
        key = family.num_classes_key()
        check_num_classes(class_names, family.num_classes_in(student), f"student's {key}")


def check_writable(folder: str, *, key: str = "OUTPUT_DIR", what: str = "this run's files") -> None:
    """A folder in which files can be made; nothing is left behind.

    Args:
        key, what: the config key that names it and what it is for, in a message.

    Raises:
        UserError: it cannot be written.
    """
    parent = os.path.abspath(folder)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    try:
        if not os.path.isdir(parent):
            raise NotADirectoryError(20, "a file of that name is in the way", parent)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        raise UserError(
            f"{key} {folder} cannot be written ({e.strerror}: {parent}): expected a folder for {what}; "
            f"choose another with {key}."
        ) from e


def build_for_evaluation(cfg: CfgNode, *, resume: bool) -> torch.nn.Module:
    """The model that ``--eval-only`` evaluates, with its weights.

    Where no method detects with the teacher, and without ``TEST.EVAL_TEACHER``, this is the plain student, and no teacher is needed. With
    ``resume`` the last checkpoint of ``OUTPUT_DIR`` is read instead of ``MODEL.WEIGHTS``.

    Raises:
        UserError: weights that cannot be read, or a distiller's checkpoint of another teacher.
    """
    teacher_detects = {
        name: method
        for name, method in methods_of(cfg).items()
        if method.needs(cfg).teacher_at_inference
    }
    builds_distiller = bool(teacher_detects) or (is_distiller(cfg) and cfg.TEST.EVAL_TEACHER)
    model = build_model_of(cfg if builds_distiller else student_config(cfg))
    checkpointer = SafeCheckpointer(
        model, cfg.OUTPUT_DIR, save_to_disk=False, **teacher_record(model)
    )
    path = cfg.MODEL.WEIGHTS
    if resume and checkpointer.has_checkpoint():
        path = checkpointer.get_checkpoint_file()
    if not path:
        raise UserError(
            'MODEL.WEIGHTS is "": --eval-only judges trained weights; name a checkpoint, or add --resume to take the '
            "last one of OUTPUT_DIR."
        )
    checkpointer.load(path)
    problems = student_misfits(checkpointer.incompatible)
    if problems:
        more = f" (and {len(problems) - 1} more keys differ)" if len(problems) > 1 else ""
        raise UserError(
            f"MODEL.WEIGHTS {path!r} does not fit the student of the config: it {problems[0]}{more}; expected weights of "
            "exactly this architecture; give those, or the config that they belong to."
        )
    if teacher_detects and not checkpointer.filled_methods:
        keys = ", ".join(method.alpha_key or name for name, method in teacher_detects.items())
        raise UserError(
            f"MODEL.WEIGHTS {path!r} holds no modules of the method {', '.join(teacher_detects)}, with which "
            f"this config detects ({keys}): name a checkpoint of the distilled run "
            "(OUTPUT_DIR/model_final.pth), or set alpha 0."
        )
    return model


def build_model_of(cfg: CfgNode) -> torch.nn.Module:
    """Detectron2's ``build_model``, whose assertions become a sentence.

    Raises:
        UserError: parts of the config do not fit each other.
    """
    check_family(student_config(cfg))
    try:
        return build_model(cfg)
    except UserError:
        raise
    except Exception as e:  # every part of a model has its own way to refuse a value
        reason = " ".join(str(e).split())[:200] or "an assertion of Detectron2 failed"
        raise UserError(
            f"the model of this config cannot be built ({type(e).__name__}: {reason}): expected values under MODEL that "
            "fit each other; correct them."
        ) from e


def student_misfits(wrong) -> list[str]:
    """:func:`~era.checkpoint.reading.misfits`, but for the modules of methods and what hangs on the teacher: whether a
    file has those is asked apart."""
    return [problem for problem in misfits(wrong) if " methods." not in problem]


def teacher_record(model: nn.Module) -> dict[str, TeacherRecord]:
    """The teacher's entry for a checkpointer of ``model``; empty for a model without one."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    has_teacher = isinstance(model, Distiller) and model.teacher is not None
    return {"teacher": TeacherRecord(model.teacher)} if has_teacher else {}
