"""Plans of runs: what a study or the demo trains, as a YAML file says it, and the processes that do it.

``studies/demo.yaml`` explains the entries of a plan. :func:`~era.runs.schema.read_plan` checks them, :func:`make_runs` turns
the plan into :class:`Run` s, each one process of ``tools/train_net.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from detectron2.config import CfgNode

from era.config import INHERIT_NOTHING, load_config, validate_config
from era.engine.schedule import scale_to_world
from era.errors import UserError
from era.registry import is_distiller
from era.runs.schema import Plan, Variant

LOG = "train.log"  # what a run would have written to the screen
FINAL = "model_final.pth"  # a training's last checkpoint, in its folder
NOTHING = "nothing"
INHERITED = {"none": NOTHING, "heads": "heads", "fpn_and_heads": "FPN and heads"}


@dataclass(frozen=True)
class Run:
    """One process of a plan: a training, or the evaluation of a trained model."""

    name: str  # also its folder's name
    label: str  # in tables and figures
    config_file: str
    opts: tuple[str, ...]  # KEY, VALUE, KEY, VALUE, ...
    folder: Path
    iterations: int  # optimiser steps, on num_gpus processes; 0 = evaluation only
    variant: str = ""  # its name in the plan
    seed: int | None = None  # None = the config's own
    is_teacher: bool = False  # trained once for all seeds
    is_part: bool = False  # such a one, of a part of a method: it leaves no AP
    methods: tuple[str, ...] = ()  # of distillation; none of a plain detector
    inherited: str = NOTHING  # weights of the teacher that the student started from
    depends_on: tuple[str, ...] = ()  # names of the runs that must be done before
    evaluates: str | None = None  # the name of the run whose model it evaluates
    time_of: tuple[str, ...] = ()  # it is to take as long as these, if a step takes as long as
    step_of: tuple[str, ...] = ()  # one of these; ``iterations`` is then known when they are done
    weights: tuple[tuple[str, str], ...] = ()  # config key of a checkpoint, run that it comes from
    num_gpus: int = 1  # as tools/train_net.py has it: on a CPU, processes
    command: tuple[str, ...] = field(default=(), repr=False)

    @property
    def log(self) -> Path:
        """Where the process's own output goes."""
        return self.folder / LOG

    @cached_property
    def config(self) -> CfgNode:
        """The resolved config, frozen."""
        cfg = load_config(self.config_file, self.opts)
        cfg.freeze()
        return cfg


def make_runs(
    plan: Plan,
    output: Path,
    *,
    opts: Sequence[str] = (),
    seeds: Sequence[int] = (),
    only: Sequence[str] | None = None,
    given: Mapping[str, Path] | None = None,
) -> list[Run]:
    """The runs of a plan, each after those that it depends on, with their configs checked.

    Args:
        output: folder of the plan's runs, absolute.
        opts: overrides for every run, ``[KEY, VALUE, ...]``; they have the last word.
        seeds: instead of the plan's.
        only: names of variants; these alone, and what they depend on.
        given: checkpoints that are there already, by the name of the variant that would be trained.

    Raises:
        UserError: a variant that the plan lacks, or a config that is wrong.
    """
    given = given or {}
    seeds = tuple(seeds) or plan.seeds or (None,)

    def name_of(variant: str, seed: int | None) -> str:
        once = seed is None or plan.variants[variant].is_teacher
        return variant if once else f"{variant}_seed{seed}"

    runs = []
    for variant in plan.choose(only):
        for seed in (None,) if variant.is_teacher else seeds:
            if variant.name in given:
                continue
            name = name_of(variant.name, seed)
            own = ["OUTPUT_DIR", str(output / name)]
            for key, source in variant.weights.items():
                own += [key, str(given.get(source, output / name_of(source, seed) / FINAL))]
            own += [*variant.overrides, *(() if seed is None else ("SEED", str(seed))), *opts]
            cfg = _checked_config(name, variant, own, plan.num_gpus)
            paced = [tuple(name_of(other, s) for s in seeds) for other in variant.pace]
            needed = [name_of(other, seed) for other in variant.needs if other not in given]
            sources = [(k, name_of(v, seed)) for k, v in variant.weights.items() if v not in given]
            distils = is_distiller(cfg)
            mode = ["--eval-only"] if variant.evaluates else []
            mode += ["--num-gpus", str(plan.num_gpus)] if plan.num_gpus > 1 else []
            script = [sys.executable, "-u", "tools/train_net.py", "--config-file", variant.config]
            runs.append(
                Run(
                    name=name,
                    label=variant.label,
                    config_file=variant.config,
                    opts=tuple(own),
                    folder=output / name,
                    iterations=0 if variant.evaluates else cfg.SOLVER.MAX_ITER,
                    variant=variant.name,
                    seed=seed,
                    is_teacher=variant.is_teacher,
                    is_part=variant.is_part,
                    methods=tuple(cfg.MODEL.DISTILLER.METHODS) if distils else (),
                    inherited=INHERITED[cfg.MODEL.DISTILLER.INIT_STUDENT] if distils else NOTHING,
                    depends_on=tuple(dict.fromkeys(sum(paced, tuple(needed)))),
                    evaluates=name_of(variant.evaluates, seed) if variant.evaluates else None,
                    time_of=paced[0] if paced else (),
                    step_of=paced[1] if paced else (),
                    weights=tuple(sources),
                    num_gpus=plan.num_gpus,
                    command=(*script, *mode, *own),
                )
            )
    return runs


def _checked_config(name: str, variant: Variant, opts: Sequence[str], num_gpus: int) -> CfgNode:
    """The config of a run, as the processes at work have it."""
    cfg = load_config(variant.config, opts)
    validate_config(cfg)
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(
            f"DATASETS.TEST of the run {name} has {len(cfg.DATASETS.TEST)} datasets: a plan compares its "
            "runs on exactly one; name one."
        )
    inherited = cfg.MODEL.DISTILLER.INIT_STUDENT if is_distiller(cfg) else INHERIT_NOTHING
    goes_on = "MODEL.WEIGHTS" in variant.weights and not variant.evaluates
    if (
        goes_on and inherited != INHERIT_NOTHING
    ):  # said here, before what it goes on from is trained
        raise UserError(
            f"MODEL.DISTILLER.INIT_STUDENT of the run {name} is {inherited}, which would put the teacher's heads in the "
            f"place of those that {variant.weights['MODEL.WEIGHTS']} trained (MODEL.WEIGHTS): set it to none in the "
            "overrides of that run."
        )
    scaled = cfg if variant.evaluates else scale_to_world(cfg, num_gpus)
    if variant.pace and scaled is not cfg:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE of the run {name} is {cfg.SOLVER.REFERENCE_WORLD_SIZE}, which rescales its "
            f"iterations on {num_gpus} process(es), but they follow from the time of others: set it to 0 for all runs."
        )
    return scaled


def check_overrides(plan: Plan, opts: Sequence[str]) -> None:
    """Check overrides for every run of a plan.

    Raises:
        UserError: they are not pairs, or name a key that the plan sets itself.
    """
    if len(opts) % 2:
        raise UserError(
            f"the overrides {' '.join(opts)!r} are not pairs: give KEY VALUE KEY VALUE ..., options "
            "such as --reuse before them."
        )
    own = {"OUTPUT_DIR": "--output sets it", "SEED": "an option sets it, see --help"}
    for variant in plan.variants.values():
        own |= dict.fromkeys(variant.weights, f"{plan.file} says from which run it comes")
    for key in opts[::2]:
        if key in own:
            raise UserError(f"{key} cannot be overridden for every run: {own[key]}.")
