"""A teacher's own config: YAML, a name of the model zoo, or a LazyConfig that is trusted."""

from __future__ import annotations

import hashlib

from detectron2.config import CfgNode

from era.config import get_era_cfg, merge_config, student_config
from era.errors import UserError
from era.modeling.lazy_model import dataset_names, is_python, lazy_overrides, read_lazy
from era.registry import LAZY


def settings_of(teacher_cfg: CfgNode) -> str:
    """Hash of all settings of a teacher's model that stock Detectron2 knows, but where it runs."""
    keys = student_config(teacher_cfg).MODEL
    keys.DEVICE = keys.WEIGHTS = ""
    if "LAZY" in keys:  # SHA256 says what the model is
        keys.LAZY.CONFIG_FILE = ""
    return hashlib.sha256(keys.dump().encode()).hexdigest()


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's own config, from the keys under ``MODEL.TEACHER`` of the student's.

    Raises:
        UserError: no such file or name, overrides that do not fit, or Python that is not trusted.
    """
    teacher_cfg = read_teacher_config(cfg.MODEL.TEACHER)
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher_cfg.MODEL.WEIGHTS = ""
    return teacher_cfg


def read_teacher_config(keys: CfgNode) -> CfgNode:
    """As :func:`teacher_config`, as the file has it.

    Args:
        keys: ``MODEL.TEACHER``.
    """
    what, path, opts = "MODEL.TEACHER.CONFIG_FILE", keys.CONFIG_FILE, list(keys.OPTS)
    if not path:
        raise UserError(
            f'{what} is "": expected the path of a config file or a model-zoo name; name the teacher\'s.'
        )
    teacher_cfg = get_era_cfg()  # a teacher that was trained here is described by its own config
    if is_python(path):
        trust = "MODEL.TEACHER.TRUST_PYTHON_CONFIG True"
        found = read_lazy(path, opts, trusted=keys.TRUST_PYTHON_CONFIG, trust=trust, what=what)
        own = lazy_overrides(found, path, opts, what=what)
        teacher_cfg.merge_from_list(["MODEL.META_ARCHITECTURE", LAZY, *own])
        teacher_cfg.DATASETS.TRAIN = dataset_names(found, "train")
        teacher_cfg.DATASETS.TEST = dataset_names(found, "test")
    else:
        merge_config(teacher_cfg, path, opts, what=what, opts_what="MODEL.TEACHER.OPTS")
    return teacher_cfg
