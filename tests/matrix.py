"""Which methods serve which families of detectors: every cell is tried, and the table in docs/families.md is what came of it.

    python tests/matrix.py              # tries all cells and prints the table
    python tests/matrix.py --write      # puts it between the markers of docs/families.md

A cell is a method with the settings of its toy config on a tiny student and a tiny random teacher, two training steps long.
Families come from their registry, each by its first plain toy config; methods come from theirs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from builders import REPO, TINY, TINY_TEACHER, TOY, batch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage
from matrix_words import column_name, in_words, method_of, replaced

from era.config import load_config, student_config
from era.errors import UserError
from era.modeling import distiller
from era.modeling.detectors import Detector, detector_of, family_of
from era.modeling.detectors.families import DETECTOR_FAMILIES
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY, forget_parts, is_distiller

PAGE = REPO / "docs" / "families.md"
STEPS = 2
WORKS = ""  # what a cell holds instead of a sentence
NAMES = {"RCNN": "Faster R-CNN", "CascadeRCNN": "Cascade R-CNN"}  # in words; others by their class
MASKED = {"Faster R-CNN": "Mask R-CNN"}
# Beyond its toy config: settings by which two steps go through all of a method.
SETTINGS = {"RDD": {"SWITCH_ITER": 1}}
# Further rows, of a method with some of its losses off: by their label, the method's name before the comma, node and keys.
VARIANTS = {
    "ERA, no judges": ("TWI", r"\w+_WEIGHT"),
    "DSKD, maps alone": ("", "KD_WEIGHT|CLASS_WEIGHT"),
}


@dataclass(frozen=True)
class Kind:
    """A family, apart with and without masks.

    Attributes:
        name: for people.
        family: of the registry.
        config: the plain toy config that stands for it.
    """

    name: str
    family: type[Detector]
    config: Path


@dataclass
class Matrix:
    """What came of every cell.

    Attributes:
        columns: student and teacher.
        cells: by row and column, :data:`WORKS` or the sentence of the refusal.
        failures: by row and column, what is neither: an error that is no refusal, or steps that went wrong.
    """

    columns: list[tuple[Kind, Kind]]
    cells: dict[tuple[str, tuple[Kind, Kind]], str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


# ---- what is tried ---------------------------------------------------------------------------------


def kinds() -> list[Kind]:
    """Every registered family by its first plain toy config, and once more where another one has masks.

    Raises:
        LookupError: a family has no plain config directly below configs/toy.
    """
    found: dict[tuple[type, bool], Kind] = {}
    for path in sorted(TOY.glob("*.yaml"), key=lambda path: ("plain" not in path.stem, path.stem)):
        cfg = toy_config(path)
        if is_distiller(cfg):
            continue
        family, masks = family_of(cfg), cfg.MODEL.MASK_ON
        name = NAMES.get(family.__name__, family.__name__)
        name = MASKED.get(name, f"{name} with masks") if masks else name
        found.setdefault((family, masks), Kind(name, family, path))
    absent = {family for _, family in DETECTOR_FAMILIES} - {family for family, _ in found}
    if absent:
        raise LookupError(
            f"no plain config of {', '.join(sorted(a.__name__ for a in absent))} lies below configs/toy: add one, "
            "and the family gets its columns"
        )
    order = [family for _, family in DETECTOR_FAMILIES]
    order.sort(key=lambda family: (family.__name__ not in NAMES, family.__mro__[1] is not Detector))
    return sorted(found.values(), key=lambda kind: (order.index(kind.family), kind.name))


def pairs(known: list[Kind]) -> list[tuple[Kind, Kind]]:
    """Student and teacher: each kind with itself, then each with the next kind of another family."""
    ring = list(itertools.chain(known, known))
    others = [
        (kind, next((k for k in ring[i:] if k.family is not kind.family), None))
        for i, kind in enumerate(known)
    ]
    return [(kind, kind) for kind in known] + [pair for pair in others if pair[1] is not None]


@functools.cache
def toy_config(path: Path) -> CfgNode:
    """A toy config as it is; not to be changed."""
    return load_config(str(path))


@functools.cache
def settings_config(name: str, family: type[Detector]) -> CfgNode:
    """The toy config that says how a method distils into a family: one for that family, else the method's first."""
    paths = sorted(path for path in TOY.rglob("*.yaml") if name.lower() in path.stem)
    own = [cfg for cfg in map(toy_config, paths) if list(cfg.MODEL.DISTILLER.METHODS) == [name]]
    own.sort(key=lambda cfg: family_of(student_config(cfg)) is not family)
    return own[0]


@functools.cache
def tiny(config: Path) -> list:
    """Overrides that shrink a toy config of any family to test size."""
    cfg, opts = toy_config(config), list(TINY)
    for node in (name for name, value in cfg.MODEL.items() if isinstance(value, CfgNode)):
        if "NUM_CONVS" in cfg.MODEL[node]:  # of a dense head's towers
            opts += [f"MODEL.{node}.NUM_CONVS", 1]
        if "NORM" in cfg.MODEL[node] and cfg.MODEL[node].NORM == "GN":  # in 32 groups
            opts += [f"MODEL.{node}.NORM", ""]
    return [*opts, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8]


def pair_config(student: Kind, teacher: Kind) -> CfgNode:
    """A distiller of two tiny models, without a method yet."""
    cfg = load_config(str(student.config), tiny(student.config))
    own = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE = own
    cfg.MODEL.TEACHER.CONFIG_FILE = str(teacher.config)
    cfg.MODEL.TEACHER.OPTS = [*tiny(teacher.config), *TINY_TEACHER]
    cfg.MODEL.TEACHER.ALLOW_RANDOM = True
    return cfg


def common_levels(student: Detector, teacher: Detector) -> list[str]:
    """FPN levels that both models have at equal strides."""
    own, other = student.feature_shapes, teacher.feature_shapes
    return sorted(
        level for level in own if level in other and own[level].stride == other[level].stride
    )


def cell_config(row: str, family: type[Detector], pair: CfgNode, common: list[str]) -> CfgNode:
    """The pair with a row's method and its settings for the student's family, at those of its levels that are common."""
    cfg, name = pair.clone(), method_of(row)
    cfg.MODEL.DISTILLER.METHODS = [name]
    keys = settings_config(name, family).MODEL[name.upper()].clone()
    if "LEVELS" in keys:
        keys.LEVELS = [level for level in keys.LEVELS if level in common] or common
    keys.update(SETTINGS.get(name, {}))
    if row in VARIANTS:
        node, off = VARIANTS[row]
        node = keys[node] if node else keys
        node.update({key: 0.0 for key in node if re.fullmatch(off, key)})
    cfg.MODEL[name.upper()] = keys
    forget_parts(cfg)
    return cfg


# ---- trying ----------------------------------------------------------------------------------------


def masked_batch(seed: int) -> list[dict]:
    """Two pictures with an object and its mask each, for any family."""
    inputs = batch((1, 1), seed=seed)
    for item in inputs:
        height, width = item["image"].shape[1:]
        masks = torch.zeros(len(item["instances"]), height, width)
        for mask, box in zip(masks, item["instances"].gt_boxes.tensor.int().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        item["instances"].gt_masks = BitMasks(masks)
    return inputs


def train(name: str, model: torch.nn.Module) -> None:
    """:data:`STEPS` optimiser steps.

    Raises:
        AssertionError: the method has no loss, a loss is not finite, or nothing of the method's reaches the student.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    student = [p for p in model.student.backbone.parameters() if p.requires_grad]
    reached = False
    with EventStorage(0) as storage:
        for step in range(STEPS):
            losses = model(masked_batch(step))
            own = [
                value for key, value in losses.items() if key.startswith(f"loss_{name.lower()}_")
            ]
            assert own, f"no loss of its own among {sorted(losses)}"
            for key, value in losses.items():
                assert math.isfinite(value.item()), f"{key} is {value.item()}"
            optimizer.zero_grad()
            sum(own).backward(retain_graph=True)
            reached = reached or any(p.grad is not None and p.grad.any() for p in student)
            sum(value for value in losses.values() if all(value is not x for x in own)).backward()
            optimizer.step()
            storage.step()
    assert reached, "no gradient of it reaches the student's backbone"


def try_cell(cfg: CfgNode) -> str:
    """:data:`WORKS`, or the sentence with which the config's method is refused before it trains."""
    torch.manual_seed(0)
    try:
        model = build_model(cfg)
    except UserError as e:
        return str(e).replace(f"{REPO}/", "")
    train(cfg.MODEL.DISTILLER.METHODS[0], model)
    return WORKS


@contextmanager
def one_teacher(cfg: CfgNode) -> Iterator[Teacher]:
    """Inside, the distillers of this config share their teacher, which is frozen: building it takes longer than a step."""
    torch.manual_seed(1)
    teacher = Teacher(cfg)
    with mock.patch.object(distiller, "Teacher", lambda _: teacher):
        yield teacher


def try_all(rows: list[str], known: list[Kind]) -> Matrix:
    """Every row with every pair."""
    matrix = Matrix(pairs(known))
    for student, teacher in matrix.columns:
        pair = pair_config(student, teacher)
        own = detector_of(build_model(student_config(pair)))
        with one_teacher(pair) as built:
            common = common_levels(own, built.detector)
            for row in rows:
                where = f"{row}, {column_name(student, teacher)}"
                try:
                    found = try_cell(cell_config(row, student.family, pair, common))
                except Exception as e:  # whatever a method does where nobody tried it
                    matrix.failures.append(f"{where}: {type(e).__name__}: {e}")
                    continue
                if "\n" in found or (found and not found.endswith(".")):
                    matrix.failures.append(f"{where}: refused by what is not one sentence: {found}")
                matrix.cells[row, (student, teacher)] = found
    return matrix


def all_rows() -> list[str]:
    """All registered methods and :data:`VARIANTS`, by name."""
    return sorted([*(name for name, _ in METHOD_REGISTRY), *VARIANTS], key=str.lower)


# ---- the command ----------------------------------------------------------------------------------


def main() -> int:
    """The command; returns its exit status, 1 if a cell neither works nor is refused."""
    parser = argparse.ArgumentParser(
        description="Try every method with every family of detectors.",
        epilog=f"--write puts the table into {PAGE.relative_to(REPO)}.",
    )
    parser.add_argument("--write", action="store_true", help="write the page")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    rows = all_rows()
    matrix = try_all(rows, kinds())
    if matrix.failures:
        print("\n".join(["neither works nor is refused:", *matrix.failures]), file=sys.stderr)
        return 1
    text = in_words(matrix, rows)
    if args.write:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
