"""``tools/adaptation_cost.py``: read the detectors, measure the costs between them, print and write."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from tqdm import tqdm

from era import environment
from era.checkpoint.reading import load_exactly
from era.config import get_era_cfg, merge_config, student_config
from era.data.datasets import check_datasets, coco_files, register_from_config
from era.data.pictures import PictureMapper, picture_mapper
from era.engine.preflight import check_writable
from era.errors import UserError
from era.methods.checks import check_level_names, check_levels
from era.modeling.detectors import family_of
from era.modeling.teacher import Teacher
from era.runs import tables
from era.study.adaptation import Moments, no_nearer, teacher_order

STUDENT = "student"  # its name in the table
LEVELS = ("p2", "p3", "p4", "p5")  # those of them that all detectors have; p6 is a part of p5
POSITIONS_PER_CHANNEL = 10  # at least, or a map fits because it was fitted
LINE_EVERY = 15.0  # seconds between two lines of progress where the output is no terminal

DESCRIPTION = """\
Measure MTPD's adaptation cost between detectors and order teachers by it, weak to strong.

The cost from A to B is the squared error of the best 1x1 convolution from A's FPN maps to B's over that of the best
constant: 0 if B's maps are a linear image of A's, 1 if A's say nothing of them; a mean over levels. The order is
chosen backwards from the strongest teacher: before each comes the one of the smallest cost to it among those that are
left. Inspired by the paper, whose code for this part is not released.
"""

EPILOG = """\
example, with the detectors of `python tools/study.py mtpd`:
  %(prog)s \\
    --student configs/toy/plain.yaml output/study/mtpd/plain_seed1/model_final.pth \\
    --teacher weak configs/toy/teacher.yaml output/study/mtpd/weak/model_final.pth \\
    --teacher strong configs/toy/teacher_strong.yaml output/study/mtpd/strong/model_final.pth
"""


@dataclass(frozen=True)
class Source:
    """A detector as the command line names it."""

    name: str
    config: str
    weights: str

    @property
    def option(self) -> str:
        """How a message names it."""
        return f"--{STUDENT}" if self.name == STUDENT else f"--teacher {self.name}"


def argument_parser() -> argparse.ArgumentParser:
    """Options of ``tools/adaptation_cost.py``."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--student", nargs=2, metavar=("CONFIG", "WEIGHTS"), required=True,
                        help="a trained student; its config also says how pictures are resized")  # fmt: skip
    parser.add_argument("--teacher", nargs=3, metavar=("NAME", "CONFIG", "WEIGHTS"), action="append", default=[],
                        help="a candidate, two or more times; the strongest one comes last")  # fmt: skip
    parser.add_argument("--dataset", default="", help="a registered dataset with annotations; default: the first of the "
                        "student's DATASETS.TRAIN")  # fmt: skip
    parser.add_argument("--pictures", type=int, default=100, help="at most so many, evenly over the dataset; default "
                        "%(default)s")  # fmt: skip
    parser.add_argument("--levels", nargs="+", metavar="LEVEL", help=f"default: those of {' '.join(LEVELS)} that all "
                        "detectors have")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("output/adaptation_cost.json"), metavar="FILE",
                        help="default %(default)s")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the costs and the order, write both as JSON; returns the exit status.

    Raises:
        UserError: one sentence for a user's mistake, before anything is measured; too few positions, after it.
    """
    args = argument_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sources = named_sources(args.student, args.teacher)
    if args.pictures < 1:
        raise UserError(f"--pictures is {args.pictures}: expected at least 1.")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: expected the name of a file in it.")
    check_writable(str(args.output.parent), key="the folder of --output", what="the costs")
    cfgs = [read_config(source) for source in sources]
    device = cfgs[0].MODEL.DEVICE if torch.cuda.is_available() else "cpu"
    detectors = [
        read_detector(source, cfg, received=cfgs[0].INPUT.FORMAT, device=device)
        for source, cfg in zip(sources, cfgs, strict=True)
    ]
    levels = common_levels(sources, detectors, args.levels)
    dataset, entries = pictures_of(cfgs[0], args.dataset, args.pictures)
    moments = measure(entries, picture_mapper(cfgs[0], is_train=False), detectors, levels)
    check_positions(moments, detectors, len(entries))
    names = [source.name for source in sources]
    by_level = {level: named(names, found.costs()) for level, found in moments.items()}
    costs = {
        a: {b: sum(found[a][b] for found in by_level.values()) / len(levels) for b in names}
        for a in names
    }
    order = teacher_order({name: costs[name] for name in names[1:]}, names[-1])
    needless = no_nearer(costs, STUDENT, order)
    print(tables.terminal(["from \\ to", *names], [[a, *(f"{costs[a][b]:.3f}" for b in names)] for a in names]))  # fmt: skip
    print(f"\n{in_words(costs, order, needless)}")
    found = {
        "dataset": dataset,
        "pictures": len(entries),
        "positions": {level: each.count for level, each in moments.items()},
        "detectors": {
            source.name: {**detector.source, "sha256": detector.sha256}
            for source, detector in zip(sources, detectors, strict=True)
        },
        "costs": costs,
        "costs_by_level": by_level,
        "order": order,
        "no_nearer_than_the_student": needless,
        "versions": environment.versions(),
        "machine": environment.machine(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"All of it, also by level: {args.output}")
    return 0


def named_sources(student: Sequence[str], teachers: Sequence[Sequence[str]]) -> list[Source]:
    """The student and the teachers, in their order.

    Raises:
        UserError: fewer than two teachers, or a name that is taken.
    """
    if len(teachers) < 2:
        raise UserError(
            f"--teacher is given {len(teachers)} time(s): expected two teachers or more, the strongest last, for "
            "there is nothing to order; add --teacher NAME CONFIG WEIGHTS."
        )
    names = [STUDENT, *(name for name, _, _ in teachers)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--teacher names {name!r}, which another detector is called: give each a name of its own."
            )
    return [Source(STUDENT, *student), *(Source(*teacher) for teacher in teachers)]


def read_config(source: Source) -> CfgNode:
    """A detector's config.

    Raises:
        UserError: no such file, or no config.
    """
    cfg = get_era_cfg()
    merge_config(cfg, source.config, [], what=source.option, opts_what=source.option)
    return cfg


def read_detector(source: Source, cfg: CfgNode, *, received: str, device: str) -> Teacher:
    """A frozen detector with its weights; of a distilled checkpoint the student.

    Args:
        received: channel order of the pictures, BGR or RGB.

    Raises:
        UserError: no known family, or weights that are absent or do not fit.
    """
    if not source.weights:
        raise UserError(
            f'{source.option} has the weights "": expected a checkpoint of {source.config}; name one.'
        )
    cfg.MODEL.DEVICE = device
    stock = student_config(cfg)
    family_of(stock)
    model = build_model(stock)
    load_exactly(model, source.weights, what=source.option)
    return Teacher(
        model=model,
        input_format=cfg.INPUT.FORMAT,
        received_format=received,
        source={"config_file": source.config, "weights": source.weights},
    )


def common_levels(
    sources: Sequence[Source], detectors: Sequence[Teacher], given: Sequence[str] | None
) -> list[str]:
    """The levels to compare.

    Raises:
        UserError: a teacher lacks one of them, or has it at another stride; or there is none.
    """
    student, *teachers = (detector.detector for detector in detectors)
    shapes = [student.feature_shapes, *(teacher.feature_shapes for teacher in teachers)]
    levels = list(given or [level for level in LEVELS if all(level in shape for shape in shapes)])
    check_level_names(levels, "--levels")
    for source, teacher in zip(sources[1:], teachers, strict=True):
        try:
            check_levels(student, teacher, levels, "--levels")
        except UserError as e:
            raise UserError(f"{source.option} does not pair with the student: {e}") from e
    return levels


def pictures_of(cfg: CfgNode, dataset: str, count: int) -> tuple[str, list[dict]]:
    """The dataset's name and entries of its pictures, at most ``count``, evenly spaced.

    Raises:
        UserError: the dataset is unknown, or not as it should be.
    """
    register_from_config(cfg)
    if not dataset and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN of --student is empty: name a dataset with --dataset.")
    name = dataset or cfg.DATASETS.TRAIN[0]
    coco_files("--dataset" if dataset else "DATASETS.TRAIN of --student", name)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    check_datasets(cfg, for_training=True)
    entries = DatasetCatalog.get(name)
    return name, entries[:: max(len(entries) // count, 1)][:count]


@torch.no_grad()
def measure(
    entries: Sequence[dict],
    mapper: PictureMapper,
    detectors: Sequence[Teacher],
    levels: Sequence[str],
) -> dict[str, Moments]:
    """Moments by level of all detectors' maps of the pictures, one picture at a time, with progress.

    Args:
        mapper: reads and resizes a picture for the first detector; the others see the same.
    """
    first, *others = detectors
    shapes = [detector.detector.feature_shapes for detector in detectors]
    moments = {level: Moments([shape[level].channels for shape in shapes]) for level in levels}
    every = 0.5 if sys.stderr.isatty() else LINE_EVERY
    for entry in tqdm(entries, "maps", unit="picture", mininterval=every):
        inputs = [mapper(entry)]
        images = first.preprocess(inputs, *inputs[0]["image"].shape[-2:])
        size = tuple(images.tensor.shape[-2:])
        like = first.maps(inputs, size, images)
        maps = [like, *(other.features(inputs, like, size) for other in others)]
        for level, found in moments.items():
            found.add([each[level] for each in maps])
    return moments


def check_positions(
    moments: Mapping[str, Moments], detectors: Sequence[Teacher], pictures: int
) -> None:
    """There is enough to tell a map that fits from one that was fitted.

    Raises:
        UserError: names a level with too few positions.
    """
    for level, found in moments.items():
        channels = max(d.detector.feature_shapes[level].channels for d in detectors)
        needed = POSITIONS_PER_CHANNEL * channels
        if found.count < needed:
            raise UserError(
                f"{level} has {found.count} positions in {pictures} picture(s), for maps of {channels} channels: expected "
                f"{needed} or more; raise --pictures, or leave the level out of --levels."
            )


def named(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """A matrix by names, from row to column."""
    return {a: dict(zip(names, row, strict=True)) for a, row in zip(names, matrix, strict=True)}


def in_words(
    costs: Mapping[str, Mapping[str, float]], order: Sequence[str], needless: Sequence[str]
) -> str:
    """The sequence with the cost of each step beside the student's own to there, and which teachers shorten no way."""
    steps = [f"{STUDENT} -> {order[0]} ({costs[STUDENT][order[0]]:.3f})"]
    steps += [
        f"{b} ({costs[a][b]:.3f}, from the {STUDENT} {costs[STUDENT][b]:.3f})"
        for a, b in pairwise(order)
    ]
    text = f"order: {' -> '.join(steps)}"
    if needless:
        text += f"\nno nearer to the next one than the {STUDENT} is, by this cost: {', '.join(needless)}"
    return text
