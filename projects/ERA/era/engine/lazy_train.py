"""Train by a LazyConfig: its ``model`` is the student, and the YAML config that it names says all the rest."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from era.config import load_config
from era.engine.launch import argument_parser, start
from era.errors import UserError
from era.modeling.lazy_model import is_python, lazy_overrides, read_lazy
from era.registry import LAZY, is_distiller

OPTION = "--config-file"
EXAMPLE = 'frame = dict(config_file="configs/toy/era.yaml", opts=[])'


def lazy_train_net(argv: Sequence[str] | None = None) -> None:
    """As :func:`era.engine.launch.train_net`, with a LazyConfig as ``--config-file``.

    The file has a ``model``, and a ``frame`` with ``config_file``, a YAML config, and if wanted ``opts``, overrides of it.
    Whoever names the file trusts it. Overrides on the command line that are ``model.key=value`` are of the LazyConfig, all
    others KEY VALUE pairs of the YAML config.

    Raises:
        UserError: one sentence for a user's mistake.
        SystemExit: as there.
    """
    parser = argument_parser()
    parser.description = (
        "Train or evaluate a student that a LazyConfig (.py) describes; the file is run as code."
    )
    args = parser.parse_args(argv)
    start(in_yaml(args), parser)


def in_yaml(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of a run of the YAML config whose student the LazyConfig describes.

    Raises:
        UserError: the file cannot be run, or has no model or no frame.
    """
    path = args.config_file
    if not is_python(path):
        raise UserError(
            f"{OPTION} is {path!r}: expected a LazyConfig, a Python file such as configs/lazy/toy_era.py; name one, or "
            "train by a YAML config with tools/train_net.py."
        )
    of_model = [opt for opt in args.opts if opt.startswith("model.") and "=" in opt]
    typed = [opt for opt in args.opts if opt not in of_model]
    found = read_lazy(path, of_model, trusted=True, trust="", what=OPTION)
    frame = found.get("frame")
    if not isinstance(frame, Mapping) or not isinstance(frame.get("config_file"), str):
        raise UserError(
            f"{OPTION} {path} says nothing of data, schedule and methods: expected `{EXAMPLE}` or the like in it; add that."
        )
    opts = [*frame.get("opts", ()), *typed]
    is_distilled = is_distiller(load_config(frame["config_file"], opts))
    key = "MODEL.DISTILLER.STUDENT_META_ARCHITECTURE" if is_distilled else "MODEL.META_ARCHITECTURE"
    opts += [key, LAZY, *lazy_overrides(found, path, of_model, what=OPTION)]
    return argparse.Namespace(**{**vars(args), "config_file": frame["config_file"], "opts": opts})
