"""What is checked before a process is spawned or a file is written."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from era.checkpoint.reading import SafeCheckpointer
from era.checkpoint.settings import settings_of
from era.checkpoint.teacher import TeacherRecord
from era.config import INHERIT_NOTHING, load_config, student_config, validate_config
from era.data.datasets import check_datasets, check_num_classes, register_from_config
from era.data.unlabeled import check_unlabeled
from era.engine.schedule import scale_to_world
from era.errors import UserError
from era.modeling.detectors import known_family
from era.modeling.distiller import Distiller
from era.modeling.teacher_cache import cache_folder
from era.registry import is_distiller, methods_of

logger = logging.getLogger(__name__)


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
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No GPU on this machine: running on the CPU (MODEL.DEVICE cpu).")
        cfg.MODEL.DEVICE = "cpu"
    validate_config(cfg)
    world_size = args.num_gpus * args.num_machines
    if not args.eval_only:
        cfg = scale_to_world(cfg, world_size)
        cfg.defrost()
    if cfg.MODEL.DEVICE == "cpu" and world_size > 1:
        for key in keys_with_value(cfg, "SyncBN"):
            raise UserError(
                f"{key} is SyncBN, which torch cannot do in {world_size} CPU processes: use BN or GN, or one "
                "process."
            )
    cfg.freeze()
    return cfg


def keys_with_value(cfg: CfgNode, value: object, prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys that have this value, whoever owns them."""
    for key, found in cfg.items():
        if isinstance(found, CfgNode):
            yield from keys_with_value(found, value, f"{prefix}{key}.")
        elif found == value:
            yield f"{prefix}{key}"


def preflight(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check data, output folder, models and their weights before anything is written.

    The models are built once on the CPU and dropped: seconds, for a clear sentence instead of a traceback
    out of a spawned process an hour later.

    Raises:
        UserError: whatever is wrong first.
    """
    if cfg.MODEL.DEVICE != "cpu" and args.num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus is {args.num_gpus}, this machine has {torch.cuda.device_count()}: ask for at "
            "most that."
        )
    check_data(cfg, for_training=not args.eval_only)
    check_writable(cfg.OUTPUT_DIR)
    settings = settings_of(cfg, processes=args.num_gpus * args.num_machines)
    folder = cache_folder(cfg) if is_distiller(cfg) and not args.eval_only else None
    if folder is not None:
        check_writable(folder, key="MODEL.TEACHER.CACHE", what="the teacher's maps")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    with _quiet("fvcore", "era"):  # the run itself will say all of it again
        if args.eval_only:
            build_for_evaluation(cfg, resume=args.resume)
        else:
            model = build_model(cfg)
            checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, settings=settings)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            if not (args.resume and checkpointer.has_checkpoint()):
                check_start(cfg, model, checkpointer)


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


def check_data(cfg: CfgNode, *, for_training: bool) -> None:
    """Register datasets of one's own and check all that the config names.

    Raises:
        UserError: see :mod:`era.data.datasets` and :mod:`era.data.unlabeled`.
    """
    register_from_config(cfg)
    class_names = check_datasets(cfg, for_training=for_training)
    if for_training:
        check_unlabeled(cfg)
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
    model = build_model(cfg if builds_distiller else student_config(cfg))
    checkpointer = SafeCheckpointer(
        model, cfg.OUTPUT_DIR, save_to_disk=False, **teacher_record(model)
    )
    path = cfg.MODEL.WEIGHTS
    if resume and checkpointer.has_checkpoint():
        path = checkpointer.get_checkpoint_file()
    checkpointer.load(path)
    if teacher_detects and not checkpointer.filled_methods:
        keys = ", ".join(method.alpha_key or name for name, method in teacher_detects.items())
        raise UserError(
            f"MODEL.WEIGHTS {path!r} holds no modules of the method {', '.join(teacher_detects)}, with which "
            f"this config detects ({keys}): name a checkpoint of the distilled run "
            "(OUTPUT_DIR/model_final.pth), or set alpha 0."
        )
    return model


def teacher_record(model: nn.Module) -> dict[str, TeacherRecord]:
    """The teacher's entry for a checkpointer of ``model``; empty for a model without one."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    has_teacher = isinstance(model, Distiller) and model.teacher is not None
    return {"teacher": TeacherRecord(model.teacher)} if has_teacher else {}
