"""Configs out of YAML files and overrides, read safely, and the plain student's out of a distiller's."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from era.addresses import check_bases, is_hub, is_remote
from era.config.keys import add_era_config, add_lazy_config
from era.errors import UserError
from era.registry import BACKBONE_KEYS, DETECTOR_FAMILIES, LAZY, is_distiller

with warnings.catch_warnings():  # setuptools is kept below 81 for it
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from detectron2 import model_zoo


def get_era_cfg() -> CfgNode:
    """Detectron2's default config plus this project's keys."""
    cfg = get_cfg()
    add_era_config(cfg)
    return cfg


def load_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """A config from a YAML file and overrides, loaded safely (YAML never runs code).

    Args:
        config_file: path of a config file, a model-zoo name, or "" for the defaults.
        opts: overrides, ``[KEY, VALUE, ...]``.

    Raises:
        UserError: no such file, a file that is no config, an unknown key or an unfit value.
    """
    cfg = get_era_cfg()
    merge_config(cfg, config_file, opts, what="--config-file", opts_what="the command line")
    return cfg


def merge_config(
    cfg: CfgNode, config_file: str, opts: Sequence[str], *, what: str, opts_what: str
) -> None:
    """Merge a config file (path or zoo name) and overrides into ``cfg``, in place.

    Args:
        what, opts_what: how a message names the source of the file and of the overrides.

    Raises:
        UserError: as :func:`load_config`.
    """
    if config_file:
        path = find_config_file(config_file, what=what)
        try:
            check_bases(path, what=what)
            cfg.merge_from_file(path, allow_unsafe=False)
        except UserError:
            raise
        except Exception as e:  # a file of anything can fail in any way
            raise UserError(
                f"{what} {config_file} is not a config that can be read ({_first_line(e)}): expected "
                f"YAML with the keys of Detectron2 and of this project; {_remedy(e)}."
            ) from e
    try:  # .inf is YAML's; a text that is no Python literal stays a text
        cfg.merge_from_list([math.inf if opt == ".inf" else opt for opt in opts])
    except Exception as e:  # so can a text that is read as Python's literals
        raise UserError(
            f"{opts_what} has overrides that do not fit ({_first_line(e)}): expected pairs of an "
            "existing KEY and a VALUE of its type; correct them."
        ) from e
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            f"{what} {config_file} or {opts_what} sets MODEL.LOAD_PROPOSALS True: Detectron2 reads such "
            "proposals as pickles, which can run any code; set it False and let an RPN propose."
        )
    if is_remote(cfg.OUTPUT_DIR):
        raise UserError(
            f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}, an address: expected a folder of this machine; name one."
        )


def find_config_file(config_file: str, *, what: str) -> str:
    """Path of a config file given as a path, as a model-zoo name or as ``hf://...`` (era/checkpoint/hub.py).

    Raises:
        UserError: it is none of them.
    """
    if os.path.isfile(config_file) and not is_remote(config_file):
        return config_file
    if is_hub(config_file):
        return PathManager.get_local_path(config_file)
    try:
        return model_zoo.get_config_file(config_file)
    except RuntimeError as e:
        raise UserError(
            f"{what} is {config_file!r}, which is neither a file (looked for from {os.getcwd()}) nor a "
            "name in Detectron2's model zoo: correct the path or the name."
        ) from e


def student_config(cfg: CfgNode) -> CfgNode:
    """The student alone as a stock Detectron2 config: no key of this project is left in it but those of its family of
    detectors (``Detector.add_config``) and of its backbone, where Detectron2 has none.

    ``MODEL.META_ARCHITECTURE`` becomes the student's own; keys that stock Detectron2 does not know are
    dropped, so ``detectron2.config.get_cfg().merge_from_file`` reads a dump of it unless its family or backbone has such keys.
    """
    stock = get_cfg()
    name = cfg.MODEL.META_ARCHITECTURE
    if is_distiller(cfg):
        name = cfg.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE
    stock.MODEL.META_ARCHITECTURE = name
    if name == LAZY:
        add_lazy_config(stock)
        stock.MODEL.LAZY = cfg.MODEL.LAZY.clone()
    for _, family in DETECTOR_FAMILIES:
        if family.describes(stock):
            family.add_config(stock)
    if cfg.MODEL.BACKBONE.NAME in BACKBONE_KEYS:
        BACKBONE_KEYS[cfg.MODEL.BACKBONE.NAME](stock)
    _copy_known_keys(cfg, stock)
    stock.MODEL.META_ARCHITECTURE = name
    return stock


def _copy_known_keys(source: CfgNode, target: CfgNode) -> None:
    for key in target:
        if key not in source:
            continue
        if isinstance(target[key], CfgNode) and isinstance(source[key], CfgNode):
            _copy_known_keys(source[key], target[key])
        else:
            target[key] = source[key]


def _remedy(error: BaseException) -> str:
    if "python/object" in str(error):
        return (
            "code in it is never run, so write the values out, as configs/retinanet_teacher_r101.yaml does for the model "
            "zoo's RetinaNets"
        )
    return "correct the file"


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
