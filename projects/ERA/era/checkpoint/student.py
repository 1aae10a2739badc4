"""The plain student: an ordinary Detectron2 checkpoint and config."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from torch import nn

from era.checkpoint.finite import check_finite
from era.checkpoint.writing import save_whole
from era.config import student_config


def save_plain_student(student: nn.Module, cfg: CfgNode, folder: str) -> str:
    """Write a plain Detectron2 checkpoint and config: ``model_final.pth`` and ``config.yaml``.

    Stock ``get_cfg().merge_from_file(config.yaml)`` and ``DefaultPredictor`` read them; nothing of this
    project is in either file.

    Args:
        cfg: config of the run; see :func:`era.config.student_config` for what is kept.

    Returns:
        Path of the checkpoint.

    Raises:
        UserError: it cannot be written.
        FloatingPointError: a weight is not finite; nothing is written.
    """
    path = os.path.join(folder, "model_final.pth")
    weights = student.state_dict()
    check_finite(weights, path)
    os.makedirs(folder, exist_ok=True)
    save_whole({"model": weights}, path)
    plain = student_config(cfg)
    plain.MODEL.WEIGHTS = path
    plain.OUTPUT_DIR = folder
    config_path = os.path.join(folder, "config.yaml")
    with open(config_path + ".partial", "w") as f:
        f.write(plain.dump())
    os.replace(config_path + ".partial", config_path)
    return path
