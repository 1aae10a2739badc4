"""What the demo trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from era.config import load_config, validate_config
from era.errors import UserError
from era.runs.plan import HEADS, NOTHING, Run

RESERVED = {
    "OUTPUT_DIR": "--output",
    "SEED": "--seed",
    "MODEL.WEIGHTS": "nothing: every run starts from scratch",
    "MODEL.TEACHER.WEIGHTS": "nothing: the demo trains its own teacher",
}


def make_runs(
    output: Path,
    opts: Sequence[str] = (),
    *,
    seed: int | None = None,
    configs: str = "configs/toy",
) -> list[Run]:
    """The demo's runs, with their configs checked.

    Args:
        output: the demo's folder, absolute.
        opts: overrides for every run, ``[KEY, VALUE, ...]``.
        seed: of every run; None = the configs' own.
        configs: folder of the five configs, from the current folder.

    Raises:
        UserError: an override that the demo cannot work with, or a config that is wrong.
    """
    for key, instead in RESERVED.items():
        if key in opts[::2]:
            raise UserError(f"the demo sets {key} itself and cannot override it: use {instead}.")
    teacher = ("MODEL.TEACHER.WEIGHTS", str(output / "teacher" / "model_final.pth"))
    alpha1 = ("MODEL.WEIGHTS", str(output / "era" / "model_final.pth"), "MODEL.ERA.ALPHA", "1.0")
    # name, label, config, own overrides, relative cost of a step, inherited, depends on
    table = [
        ("teacher", "Teacher", "teacher", (), 1.6, NOTHING, None),
        ("plain", "Plain student", "plain", (), 1.0, NOTHING, None),
        ("era", "ERA student", "era", teacher, 3.5, NOTHING, "teacher"),
        (
            "era_alpha1",
            "ERA at alpha 1, teacher's heads",
            "era",
            teacher + alpha1,
            0.0,
            NOTHING,
            "era",
        ),
        ("plain_init", "Plain student, inherited", "plain_init", teacher, 1.1, HEADS, "teacher"),
        ("era_init", "ERA student, inherited", "era_init", teacher, 3.5, HEADS, "teacher"),
    ]
    seeding = () if seed is None else ("SEED", str(seed))
    runs = []
    for name, label, config, own, cost, inherited, depends_on in table:
        file = f"{configs}/{config}.yaml"
        folder = output / name
        run_opts = ("OUTPUT_DIR", str(folder), *own, *seeding, *opts)
        cfg = load_config(file, run_opts)
        validate_config(cfg)
        if len(cfg.DATASETS.TEST) != 1:
            raise UserError(
                f"DATASETS.TEST has {len(cfg.DATASETS.TEST)} datasets: the demo's table and pictures "
                "are of exactly one; name one."
            )
        evaluates_only = name == "era_alpha1"
        mode = ("--eval-only",) if evaluates_only else ()
        runs.append(
            Run(
                name=name,
                label=label,
                config_file=file,
                opts=run_opts,
                folder=folder,
                iterations=0 if evaluates_only else cfg.SOLVER.MAX_ITER,
                cost=cost,
                inherited=inherited,
                depends_on=depends_on,
                command=(
                    *(sys.executable, "-u", "tools/train_net.py"),
                    *("--config-file", file, *mode, *run_opts),
                ),
            )
        )
    return runs
