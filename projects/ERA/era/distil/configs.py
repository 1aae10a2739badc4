"""The config of every training, as a file that ``tools/train_net.py`` reads and a person can."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from era.checkpoint.writing import write_text_whole
from era.config import get_era_cfg, student_config, validate_config
from era.deploy.source import class_categories
from era.distil import anchors, choices
from era.distil.annotations import FOLDER, Data, skipping
from era.distil.pretrained import Start, put_start
from era.distil.request import Request
from era.distil.students import FORMS, form_of, head_levels, put_backbone, stock
from era.engine.preflight import check_schedule
from era.errors import UserError
from era.modeling.detectors import family_of
from era.registry import METHOD_REGISTRY

TEACHER, PLAIN, DISTILLED = "teacher", "plain", "distilled"  # trainings, folders and configs
MAX_ITER = "SOLVER.MAX_ITER"
RECIPE = Path(__file__).with_name("recipe.yaml")
ABOUT = """\
# Written by distil. Go on by hand, also with other values: train --config-file {path} --resume (tools/train_net.py).
"""


@dataclass(frozen=True)
class Choices:
    """What was settled for all trainings.

    Attributes:
        fine_tune: whether the teacher's classes are not the data's.
        masks: whether masks are trained.
        anchors: None for a detector without any.
        size: shorter edge in inference and longer at most, pixels.
        batch: pictures a step over all devices.
        iterations, evaluations: by training.
        workers: processes of each data loader.
        start: what the student starts from.
        why: a reason by what was chosen, for people.
    """

    fine_tune: bool
    masks: bool
    anchors: anchors.Anchors | None
    size: tuple[int, int]
    batch: int
    iterations: dict[str, int]
    evaluations: dict[str, int]
    workers: int
    start: Start
    why: dict[str, str]

    @property
    def trainings(self) -> tuple[str, ...]:
        """Names in the order in which they are done."""
        return tuple(self.iterations)


def teacher_classes(cfg: CfgNode) -> list[str] | None:
    """The names of a teacher's classes, by its config's datasets; None where these tell none."""
    try:
        return [category["name"] for category in class_categories(cfg, "")]
    except UserError:
        return None


def settle(
    request: Request,
    data: Data,
    start: Start,
    *,
    memory_gib: float | None,
    workers: int,
    batch: int | None = None,
) -> Choices:
    """Choose everything but what follows from measured times: the iterations are the usual ones.

    Args:
        start: of the student.
        memory_gib: of one GPU; None on the CPU.
        workers: processes of each data loader.
        batch: pictures a step, where it is known what fits.
    """
    cfg = request.teacher_config()
    form, why = form_of(cfg, what="--teacher"), {}
    known, names = teacher_classes(cfg), data.train.classes
    fine_tune = known != names
    why["teacher"] = (
        "its classes are the data's" if not fine_tune
        else "its classes are not known" if known is None
        else f"its {len(known)} classes are not the {len(names)} of the data"
    )  # fmt: skip
    size = choices.input_size(data.train.sides, data.train.boxes.prod(axis=1) ** 0.5, request.device)  # fmt: skip
    boxes = data.train.scaled_boxes(size)
    found = given_anchors(cfg) if form.has_anchors else None
    if found is not None:
        why["anchors"] = f"the teacher's, of mean IoU {anchors.cover(found, boxes):.2f} with the boxes, for it stays as it is"  # fmt: skip
        if fine_tune:
            strides = [2 ** int(level[1:]) for level in head_levels(cfg)]
            found, why["anchors"] = anchors.choose(found, boxes, strides)
    pictures = data.train.with_objects
    batch = batch or choices.batch_size(size, pictures, request.processes, memory_gib)
    plan = {TEACHER: True} if fine_tune else {}
    plan |= {PLAIN: False} if request.baseline else {}
    plan |= {DISTILLED: False}
    iterations = {
        name: int(request.override(MAX_ITER, teacher=teacher) or 0)
        or choices.usual_iterations(
            pictures, batch, from_random=start.is_random, is_teacher=teacher
        )
        for name, teacher in plan.items()
    }
    why["masks"] = "every object has polygons" if data.has_masks else "not every object has polygons"  # fmt: skip
    return Choices(
        fine_tune, bool(cfg.MODEL.MASK_ON and data.has_masks), found, size, batch, iterations,
        dict.fromkeys(iterations, choices.EVALUATIONS[0]), workers, start, why,
    )  # fmt: skip


def make_configs(request: Request, data: Data, chosen: Choices, folder: Path) -> dict[str, CfgNode]:
    """The config of every training, with what was chosen, by name.

    Args:
        folder: that the runs lie in, the data of :func:`~era.distil.annotations.write_data`, and what the student starts from.

    Raises:
        UserError: overrides that do not fit.
    """
    teacher = request.teacher_config()
    base = stock(teacher)
    if chosen.fine_tune and chosen.anchors is not None:
        base.MODEL.ANCHOR_GENERATOR.SIZES = [list(level) for level in chosen.anchors.sizes]
        base.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [list(chosen.anchors.ratios)]
    base.MODEL.MASK_ON = chosen.masks
    key = family_of(student_config(base)).num_classes_key()
    base.merge_from_list([key, len(data.train.classes)])
    base.MODEL.DEVICE = request.device
    found = {}
    for name in chosen.trainings:
        cfg = base.clone()
        if name == TEACHER:
            cfg.MODEL.WEIGHTS = request.teacher_weights
        else:
            put_backbone(cfg, request.student)
            put_start(cfg, chosen.start, folder)
        _put_data(cfg, request, data, chosen, folder)
        _put_schedule(cfg, chosen, name)
        cfg.SEED = request.seed
        cfg.OUTPUT_DIR = str(folder / name)
        if name == DISTILLED:
            _put_distiller(cfg, request, chosen, teacher, folder)
        opts = request.teacher_opts if name == TEACHER else request.opts
        cfg.merge_from_list(list(opts))
        validate_config(cfg)
        check_schedule(cfg)
        found[name] = cfg
    return found


def with_iterations(
    chosen: Choices, iterations: dict[str, int], evaluations: dict[str, int]
) -> Choices:
    """The same choices with another schedule."""
    return replace(chosen, iterations=iterations, evaluations=evaluations)


def write_config(cfg: CfgNode, path: Path) -> None:
    """Write what of a config differs from the defaults, as YAML that ``tools/train_net.py`` reads alike."""
    text = yaml.safe_dump(differences(cfg, get_era_cfg()), sort_keys=False, default_flow_style=None)
    write_text_whole(ABOUT.format(path=path) + text, str(path))


def differences(cfg: CfgNode, default: CfgNode) -> dict[str, Any]:
    """What of a config another one has not, as nested mappings; ``VERSION`` in any case, without which old names are
    looked for."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            if inner := differences(value, default.get(key, CfgNode())):
                found[key] = {k: v for k, v in inner.items() if k != "VERSION"}
        elif key == "VERSION" or key not in default or value != default[key]:
            found[key] = value
    return found


def given_anchors(cfg: CfgNode) -> anchors.Anchors | None:
    """A config's anchors; None where levels differ in their number or ratios, which stay as they are."""
    keys, levels = cfg.MODEL.ANCHOR_GENERATOR, len(head_levels(cfg))
    sizes = [list(level) for level in keys.SIZES]
    sizes = sizes * levels if len(sizes) == 1 else sizes
    if len(keys.ASPECT_RATIOS) != 1 or len({len(level) for level in sizes}) != 1:
        return None
    return anchors.Anchors(tuple(map(tuple, sizes)), tuple(keys.ASPECT_RATIOS[0]))


def dataset_names(request: Request) -> tuple[str, str]:
    """Of training and validation, after the annotation file."""
    stem = re.sub(r"\W+", "_", Path(request.data[0]).stem)
    return f"{stem}_distil_train", f"{stem}_distil_val"


def _put_data(cfg: CfgNode, request: Request, data: Data, chosen: Choices, folder: Path) -> None:
    train, val = dataset_names(request)
    cfg.DATASETS.COCO_FORMAT = [
        [train, str(folder / FOLDER / "train.json"), data.train.images],
        [val, str(folder / FOLDER / "val.json"), data.val.images],
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train,), (val,)
    cfg.DATALOADER.NUM_WORKERS = chosen.workers
    cfg.INPUT.MIN_SIZE_TRAIN = choices.training_sizes(chosen.size[0])
    cfg.INPUT.MIN_SIZE_TEST = chosen.size[0]
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = chosen.size[1]
    skipping(cfg)


def _put_schedule(cfg: CfgNode, chosen: Choices, name: str) -> None:
    iterations, count = chosen.iterations[name], chosen.evaluations[name]
    from_random = name != TEACHER and not cfg.MODEL.WEIGHTS
    solver = cfg.SOLVER
    solver.IMS_PER_BATCH, solver.MAX_ITER = chosen.batch, iterations
    solver.BASE_LR = choices.learning_rate(
        FORMS[cfg.MODEL.META_ARCHITECTURE].rate, chosen.batch,
        from_random=from_random, is_teacher=name == TEACHER,
    )  # fmt: skip
    solver.LR_SCHEDULER_NAME, solver.WARMUP_ITERS = "WarmupCosineLR", choices.warm_up(iterations)
    solver.CLIP_GRADIENTS.ENABLED, solver.CLIP_GRADIENTS.CLIP_TYPE = True, "norm"
    solver.CLIP_GRADIENTS.CLIP_VALUE = 5.0 if from_random else 35.0
    cfg.TEST.EVAL_PERIOD = solver.CHECKPOINT_PERIOD = -(-iterations // count)
    cfg.TEST.PATIENCE = choices.patience(count)
    cfg.TEST.LEAVE_BEST = cfg.TEST.LOSS = cfg.MODEL.EMA.ENABLED = True


def _put_distiller(
    cfg: CfgNode, request: Request, chosen: Choices, teacher: CfgNode, folder: Path
) -> None:
    cfg.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    if request.methods:
        cfg.MODEL.DISTILLER.METHODS, cfg.MODEL.DISTILLER.INIT_STUDENT = request.methods, "heads"
    else:
        cfg.merge_from_file(str(RECIPE), allow_unsafe=False)
    if teacher.MODEL.MASK_ON and not chosen.masks and not chosen.fine_tune:
        cfg.MODEL.DISTILLER.INIT_STUDENT = "none"  # its heads are of another form
    put_levels(cfg, head_levels(teacher))
    keys = cfg.MODEL.TEACHER
    if chosen.fine_tune:
        keys.CONFIG_FILE = str(folder / f"{TEACHER}.yaml")
        keys.WEIGHTS = str(folder / TEACHER / "student" / "model_final.pth")
    else:
        keys.CONFIG_FILE, keys.WEIGHTS = request.teacher, request.teacher_weights
    cfg.TEST.EVAL_TEACHER = True


def put_levels(cfg: CfgNode, levels: Sequence[str]) -> None:
    """Give the methods of a distiller the levels that its heads read, in place, whatever the method's default: all of
    them where that reaches p6, else those up to p5."""
    registered = {name for name, _ in METHOD_REGISTRY}
    for name in cfg.MODEL.DISTILLER.METHODS:
        own = cfg.MODEL.get(name.upper()) if name in registered else None
        if own is not None and "LEVELS" in own:
            up_to = max([*own.LEVELS, "p5"])
            own.LEVELS = [lv for lv in levels if lv <= up_to or up_to == "p6"]


def time_config(cfg: CfgNode, fine_tune: bool) -> CfgNode:
    """A training's config as it can be tried before any training: with a teacher of random weights where the teacher's
    are still to be trained."""
    cfg = cfg.clone()
    if cfg.MODEL.META_ARCHITECTURE == "Distiller" and fine_tune:
        cfg.MODEL.TEACHER.WEIGHTS, cfg.MODEL.TEACHER.ALLOW_RANDOM = "", True
    return cfg
