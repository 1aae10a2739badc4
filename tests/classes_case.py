"""What the tests of classes by name share: a teacher of other classes than the toy student's eight."""

from __future__ import annotations

from pathlib import Path

import torch
from builders import tiny_cfg, tiny_model
from detectron2.modeling import build_model

from era.config import student_config
from era.modeling.teacher_config import teacher_config

# disk, ring, crescent, square, cross, pentagon, hexagon, star are the student's; three of them the teacher knows.
NAMES = ("Star", "cat", "ring", "dog", "disk")
INDEX = (4, 2, None, None, None, None, None, 0)
SHARED = [0, 1, 7]
ALL = ("star", "hexagon", "cat", "pentagon", "cross", "square", "dog", "crescent", "ring", "disk")
KEYS = {"retinanet": "MODEL.RETINANET.NUM_CLASSES", "fcos": "MODEL.FCOS.NUM_CLASSES"}
BACKGROUND = 8


def names_file(folder: Path, names=NAMES) -> str:
    """A file of class names, one a line."""
    path = folder / "classes.txt"
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
    return str(path)


def options(folder: Path, names=NAMES, config: str = "era") -> tuple[list[str], list]:
    """Overrides that name the teacher's classes, and those of its own config."""
    key = KEYS.get(config.split("_")[0], "MODEL.ROI_HEADS.NUM_CLASSES")
    return ["MODEL.TEACHER.CLASSES", names_file(folder, names)], [key, len(names)]


def distiller(
    folder: Path, *opts, names=NAMES, config: str = "era", teacher: str = "teacher", teacher_opts=()
):
    """A tiny distiller whose teacher has these classes, with class logits that tell something."""
    own, other = options(folder, names, config)
    found = tiny_model(config, *own, *opts, teacher=teacher, teacher_opts=[*other, *teacher_opts])
    return enliven(found)


def enliven(model):
    """Class layers with weights of a size that tells classes apart; what the teacher does not know stays unknown."""
    generator = torch.Generator().manual_seed(5)
    for detector in (model.detector, model.teacher.detector):
        for layer in detector.class_layers().values():
            weight = layer.module.weight
            known = (weight.flatten(1).abs().sum(1, keepdim=True) > 0).view(
                -1, *[1] * (weight.dim() - 1)
            )
            noise = torch.randn(weight.shape, generator=generator)
            weight.data.add_(known * noise * 0.3)
    return model


def raw_teacher(folder: Path, names=NAMES, config: str = "era", teacher: str = "teacher"):
    """The teacher of :func:`distiller` as it is without a map: a plain model of its own classes, from the same seed."""
    own, other = options(folder, names, config)
    cfg = tiny_cfg(config, *own, teacher=teacher, teacher_opts=other)
    return build_model(student_config(teacher_config(cfg)))
