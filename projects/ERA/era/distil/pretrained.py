"""What a student starts from: ``--student-weights``, else weights of ImageNet that are public, else random ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from era.addresses import check_address, is_hub, is_remote
from era.checkpoint import hub
from era.checkpoint.fetching import fetch
from era.config import load_config
from era.convert import cli as convert
from era.convert import mmdetection
from era.convert.matching import BOTTOM_UP
from era.convert.source import COUNTER, read_source
from era.distil.request import Request
from era.distil.students import find_student, student_of
from era.engine.preflight import build_for_training
from era.errors import UserError

NONE = "none"  # --student-weights: random ones, whatever is public
FOLDER = "student_weights"  # below --output: the checkpoint as it was converted
# What weights want of their pictures and of the stride; of Detectron2's own names its defaults, unless a config beside them says.
KEYS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1")
# Deviation of ImageNet's pixels, BGR, as torchvision's models divide by; random weights want pictures of unit size.
RANDOM_STD = [57.375, 57.120, 58.395]
OPTION = "--student-weights"


@dataclass(frozen=True)
class Start:
    """Of a student.

    Attributes:
        about: for people.
        weights: file or address in Detectron2's names; "" = random ones, or converted ones.
        keys: of :data:`KEYS` those that differ from Detectron2's defaults.
        conversion: of another library's checkpoint.
    """

    about: str
    weights: str = ""
    keys: dict[str, Any] = field(default_factory=dict)
    conversion: convert.Conversion | None = None

    @property
    def is_random(self) -> bool:
        """Whether nothing is pretrained."""
        return not self.weights and self.conversion is None

    def weights_in(self, folder: Path) -> str:
        """``MODEL.WEIGHTS`` of a training whose converted checkpoint lies below a folder."""
        return self.weights if self.conversion is None else str(folder / FOLDER / convert.WEIGHTS)

    def write(self, folder: Path) -> None:
        """Put the converted checkpoint, if it is one, below a folder."""
        if self.conversion is not None and not (folder / FOLDER).exists():
            self.conversion.write(str(folder / FOLDER))


RANDOM = Start("random weights", keys={"MODEL.PIXEL_STD": RANDOM_STD})


def find_start(request: Request) -> Start:
    """What a request's student starts from; files are read, fetched and converted, nothing is written but the cache of
    downloads.

    Raises:
        UserError: the weights cannot be had or read, or are not of this student.
    """
    student = find_student(request.student)
    given = request.student_weights
    weights = given or student.weights
    cfg = student_of(request.teacher_config(), request.student)
    if weights in ("", NONE):
        return RANDOM
    try:
        path, config = _local(weights)
    except UserError as e:
        if given:
            raise
        raise UserError(
            f"the weights of ImageNet for --student {request.student} cannot be had: {str(e).rstrip('.')}; or give a file with "
            f"{OPTION} FILE, or start from random weights with {OPTION} {NONE}."
        ) from e
    if path.endswith(".pkl"):
        return _of_detectron2(request, cfg, weights, path, config)
    try:
        source = read_source(path)
        if any(name.startswith(BOTTOM_UP) for name in source.weights):
            return _of_detectron2(request, cfg, weights, path, config)
        backbone = _backbone_alone(source.weights)
        left = convert.MAX_LEFT if given else 1.0  # a classifier can be most of a small network
        found = convert.converted(
            replace(source, weights=backbone), cfg, name=weights, max_left=left
        )
    except UserError as e:
        raise UserError(_in_options(str(e), request)) from e
    return Start(_about(found, weights), keys=_keys(found.cfg), conversion=found)


def put_start(cfg: CfgNode, start: Start, folder: Path) -> None:
    """Put into a student's config, in place, what it starts from.

    With weights the first stages and all statistics stay as they are, as Detectron2 has it; without them everything is
    trained.

    Args:
        folder: that a converted checkpoint lies below.
    """
    if start.is_random:
        cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
    cfg.MODEL.WEIGHTS = start.weights_in(folder)
    cfg.merge_from_list([part for pair in start.keys.items() for part in pair])


def _local(weights: str) -> tuple[str, str]:
    """Path of the checkpoint, and of the config that belongs to it, "" if there is none."""
    check_address(weights, what=OPTION)
    if is_hub(weights):
        return tuple(hub.hub_file(weights, name, what=OPTION) for name in (hub.WEIGHTS, hub.CONFIG))
    if is_remote(weights):
        return fetch(weights, what=OPTION), ""
    if not os.path.isfile(weights):
        raise UserError(f"{OPTION} {weights} is not there: expected a file; correct the path.")
    beside = os.path.join(os.path.dirname(weights), convert.CONFIG)
    return weights, beside if os.path.isfile(beside) else ""


def _backbone_alone(weights: dict) -> dict:
    """Of a detector of mmdetection's what is its backbone, for neck and heads are of other classes and anchors."""
    if not mmdetection.is_mmdetection(list(weights)):
        return weights
    return {k: v for k, v in weights.items() if k.startswith(mmdetection.BACKBONE)}


def _of_detectron2(request: Request, cfg: CfgNode, weights: str, path: str, config: str) -> Start:
    """A checkpoint with Detectron2's names, which is checked to fill the backbone."""
    keys = _keys(load_config(config)) if config else {}
    name = weights if is_remote(weights) else os.path.abspath(path)
    start = Start(f"{weights}, in Detectron2's names", name, keys)
    put_start(cfg, start, Path())
    cfg.freeze()
    level = logging.getLogger("era").level
    logging.getLogger("era").setLevel(logging.ERROR)
    try:
        model, wrong = build_for_training(cfg, resume=False)
    except UserError as e:
        raise UserError(_in_options(str(e), request)) from e
    finally:
        logging.getLogger("era").setLevel(level)
    missing, total = (
        [name for name in names if name.startswith(BOTTOM_UP) and not name.endswith(COUNTER)]
        for names in (wrong.missing_keys, model.state_dict())
    )
    if missing:
        raise UserError(
            f"{OPTION} {weights} is not of --student {request.student}: {missing[0]} and {len(missing) - 1} more of the {len(total)} "
            "tensors of its backbone are not in it; name weights of this network, or another student."
        )
    return start


def _keys(cfg: CfgNode) -> dict[str, Any]:
    values = (cfg.INPUT.FORMAT, list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD), cfg.MODEL.RESNETS.STRIDE_IN_1X1)  # fmt: skip
    return dict(zip(KEYS, values, strict=True))


def _about(found: convert.Conversion, weights: str) -> str:
    name = os.path.basename(weights.rstrip("/"))
    return f"{name}, {len(found.matches.places)} tensors {found.matches.how}"


def _in_options(sentence: str, request: Request) -> str:
    """A sentence of the converter in the words of this command line."""
    words: Iterable[tuple[str, str]] = (
        ("--weights", OPTION),
        ("MODEL.WEIGHTS", OPTION),
        ("its config", f"--student {request.student}"),
        ("which the config asks for", f"as --student {request.student} is"),
        ("give the config that it belongs to, or allow more with --max-left", "name the student that it belongs to"),
        ("give the config that it belongs to, or another file", "name that student, or another file"),
        ("give the config of its own network, or another file", "name that student, or another file"),
    )  # fmt: skip
    for old, new in words:
        sentence = sentence.replace(old, new)
    return sentence
