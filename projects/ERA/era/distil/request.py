"""The command line of ``tools/distil.py``, and what can be judged of it by itself."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode

from era.addresses import check_address, is_remote
from era.config import load_config
from era.deploy.formats import FORMATS, check_format
from era.distil.students import LIBRARIES, STUDENTS, find_student, form_of
from era.errors import UserError
from era.registry import METHOD_REGISTRY

DESCRIPTION = """\
From a folder of annotated pictures to a deployed detector: checks the data, chooses all settings, fine-tunes a
teacher, distils a small student, keeps the best, exports it and writes a report. It says first what it will do and how
long that takes, asks nothing, and the same command goes on after any stop.
"""
EPILOG = """\
examples:
  two hours on this machine:   %(prog)s --data my.json photos/ --student r18 --time 2h
  what it would do:            %(prog)s --data my.json photos/ --student r18 --time 2h --dry-run
  a validation set, ONNX:      %(prog)s --data train.json train/ --val val.json val/ --formats onnx
  a teacher of your own:       %(prog)s --data my.json photos/ --teacher output/big/config.yaml \\
                                   --teacher-weights output/big/model_final.pth

students:
STUDENTS

what it leaves in --output:
  distilled/student/           the student of the best evaluation, an ordinary Detectron2 model; best.json says which it is
  deployed/FORMAT/             the student for `predict` (tools/predict.py), each checked against eager
  report.html                  AP by class and size, curves, pictures, exported models, on one page
  data/                        the annotations as they were divided, and split.json
  student_weights/             what the student started from, and what became of every tensor, where it was converted
  teacher.yaml, distilled.yaml each training's config: `train --config-file FILE --resume` (tools/train_net.py) goes on by hand
  teacher/, distilled/         the trainings, each with train.log, metrics.json and checkpoints
  distil.json, time.json       what was asked for and chosen, and the seconds that each step took

--opts and --teacher-opts have the last word over what is chosen; docs/config.md lists the keys, docs/distil.md has more.
"""
TEACHER = "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
OUTPUT = Path("output/distil")
UNITS = {"h": 3600, "m": 60, "min": 60, "s": 1}


@dataclass(frozen=True)
class Request:
    """What is asked for; paths are absolute."""

    data: tuple[str, str]  # annotation file and image folder
    val: tuple[str, str] | None
    teacher: str
    teacher_weights: str
    student: str
    student_weights: str  # "" = public ones where they are known
    methods: tuple[str, ...]  # none = recipe.yaml
    seconds: float | None
    formats: tuple[str, ...]
    baseline: bool
    seed: int
    num_gpus: int  # 0 = on the CPU
    opts: tuple[str, ...]
    teacher_opts: tuple[str, ...]
    output: Path

    def as_dict(self) -> dict[str, Any]:
        """In plain values, without the place of the results."""
        found = {key: value for key, value in asdict(self).items() if key != "output"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return "cuda" if self.num_gpus else "cpu"

    @property
    def processes(self) -> int:
        """Of every training."""
        return max(1, self.num_gpus)

    def override(self, key: str, *, teacher: bool = False) -> str | None:
        """What ``--opts``, or ``--teacher-opts``, says of a key; None if nothing."""
        opts = self.teacher_opts if teacher else self.opts
        return dict(zip(opts[::2], opts[1::2], strict=True)).get(key)

    def teacher_config(self) -> CfgNode:
        """The teacher's config as it was given."""
        return load_config(self.teacher)


def argument_parser() -> argparse.ArgumentParser:
    """Options of ``tools/distil.py``."""
    known = {name: student.about for name, student in STUDENTS.items()}
    known |= {f"{library}:NAME": about for library, about in LIBRARIES.items()}
    students = "\n".join(f"  {name:<28} {about}" for name, about in known.items())
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG.replace("STUDENTS", students),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, pair = parser.add_argument, ("FILE", "DIR")
    add("--data", nargs=2, required=True, metavar=pair, help="annotations in COCO format, and the folder of their pictures")  # fmt: skip
    add("--val", nargs=2, metavar=pair, help="a validation set; default: a part of --data, drawn by --seed and written down")  # fmt: skip
    add("--teacher", default=TEACHER, metavar="CONFIG", help="a name in Detectron2's model zoo, or a config file "
        "(default: %(default)s)")  # fmt: skip
    add("--teacher-weights", default="", metavar="FILE", help="of a teacher that is a config file")
    add("--student", default="r18", metavar="NAME", help=f"{', '.join(STUDENTS)}, torchvision:NAME or timm:NAME, see below "
        "(default: %(default)s)")  # fmt: skip
    add("--student-weights", default="", metavar="FILE", help="that the student's backbone starts from, a file or address of "
        "torchvision, timm, mmdetection or Detectron2; none = random ones (default: of ImageNet, where the list below says so)")  # fmt: skip
    add("--method", nargs="+", default=[], metavar="NAME", help="methods of distillation with their default settings, see "
        "train --list-methods (default: the ERA of era/distil/recipe.yaml)")  # fmt: skip
    add("--time", metavar="TIME", help="for everything, such as 2h, 90m or 1h30m; trainings that run behind are shortened; "
        "default: what the size of the data asks for")  # fmt: skip
    add("--formats", nargs="+", metavar="NAME", help=f"to export to: {', '.join(FORMATS)}; none for none (default: those "
        "of torchscript, onnx and openvino whose packages are installed)")  # fmt: skip
    add("--baseline", action="store_true", help="also train the student without a teacher, to compare with")  # fmt: skip
    add("--output", type=Path, default=OUTPUT, metavar="DIR", help="for everything; the same command goes on there (default: %(default)s)")  # fmt: skip
    add("--num-gpus", type=int, metavar="N", help="default: all that there are; 0 = the CPU")
    add("--seed", type=int, default=1, metavar="S", help="of the split and the trainings (default: %(default)s)")  # fmt: skip
    add("--dry-run", action="store_true", help="say what would be done and how long it would take, and write nothing")  # fmt: skip
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config overrides of the students' trainings")  # fmt: skip
    add("--teacher-opts", nargs="+", default=[], metavar="KEY VALUE", help="config overrides of the teacher's fine-tuning")  # fmt: skip
    return parser


def read_request(args: argparse.Namespace) -> Request:
    """The request, as far as it can be judged without reading the data or building a model.

    Raises:
        UserError: one sentence about the first thing that is wrong.
    """
    data = _pair("--data", args.data)
    val = _pair("--val", args.val) if args.val else None
    weights = _teacher_weights(args.teacher, args.teacher_weights)
    find_student(args.student)
    seconds = None if args.time is None else read_time(args.time)
    known = [name for name, _ in METHOD_REGISTRY]
    for name in args.method:
        if name not in known:
            raise UserError(
                f"--method is {name!r}: expected names of {', '.join(known)}; name others."
            )
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}: expected 0 or more.")
    for option, opts in (("--opts", args.opts), ("--teacher-opts", args.teacher_opts)):
        if len(opts) % 2:
            raise UserError(
                f"{option} {' '.join(opts)!r} are not pairs: expected KEY VALUE KEY VALUE ...; correct them."
            )
        _check_overrides(option, opts)
        for key in ("SOLVER.MAX_ITER", "SOLVER.MAX_SECONDS"):
            if seconds is not None and key in opts[::2]:
                raise UserError(
                    f"--time and {key} of {option} both set the schedule: expected one of them; leave the other out."
                )
    return Request(
        data=data,
        val=val,
        teacher=args.teacher if _is_zoo_name(args.teacher) else os.path.abspath(args.teacher),
        teacher_weights=weights,
        student=args.student,
        student_weights=_student_weights(args.student_weights),
        methods=tuple(args.method),
        seconds=seconds,
        formats=read_formats(args.formats),
        baseline=args.baseline,
        seed=args.seed,
        num_gpus=_gpus(args.num_gpus),
        opts=tuple(args.opts),
        teacher_opts=tuple(args.teacher_opts),
        output=args.output.expanduser().absolute(),
    )


def read_time(text: str) -> float:
    """Seconds of a duration such as ``2h``, ``1h30m``, ``90 min`` or ``1.5h``.

    Raises:
        UserError: it is none.
    """
    part = rf"(\d+(?:\.\d+)?)\s*({'|'.join(sorted(UNITS, key=len, reverse=True))})\s*"
    seconds = sum(float(n) * UNITS[unit] for n, unit in re.findall(part, text))
    if not re.fullmatch(f"(?:{part})+", text.strip()) or not seconds > 0:
        raise UserError(
            f"--time is {text!r}: expected a duration such as 2h, 90m or 1h30m; write it so."
        )
    return seconds


def read_formats(names: Sequence[str] | None) -> tuple[str, ...]:
    """Formats to export to, each with its packages installed.

    Args:
        names: as they were given; None = whichever of the formats for other programs can be written here.

    Raises:
        UserError: one is unknown, or lacks a package.
    """
    if names is None:
        return tuple(name for name in FORMATS if name != "detectron2" and _can_write(name))
    if list(names) == ["none"]:
        return ()
    for name in names:
        try:
            check_format(name, int8=False)
        except UserError as e:
            raise UserError(f"--formats: {e}") from e
    return tuple(dict.fromkeys(names))


def _can_write(name: str) -> bool:
    try:
        check_format(name, int8=False)
    except UserError:
        return False
    return True


def _pair(option: str, paths: Sequence[str]) -> tuple[str, str]:
    file, folder = (Path(path).expanduser().absolute() for path in paths)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "not there"
        raise UserError(
            f"{option} {paths[0]} is {what}: expected a file of annotations in COCO format, then the folder of its pictures; "
            "correct the path."
        )
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise UserError(
            f"{option} {paths[1]} is {what}: expected the folder of the pictures, after the file of annotations; correct "
            "the path."
        )
    return str(file), str(folder)


def _is_zoo_name(config: str) -> bool:
    if os.path.isfile(config):
        return False
    try:
        model_zoo.get_config_file(config)
    except RuntimeError:
        return False
    return True


def _teacher_weights(config: str, weights: str) -> str:
    """Of the zoo its own, unless others are named; a local file is there."""
    if is_remote(config) or not (os.path.isfile(config) or _is_zoo_name(config)):
        raise UserError(
            f"--teacher is {config!r}, neither a file nor a name in Detectron2's model zoo: name one, such as {TEACHER}."
        )
    try:
        form_of(load_config(config), what=f"--teacher {config}")
    except UserError as e:
        raise UserError(str(e).replace("--config-file", "--teacher")) from e
    if not weights and _is_zoo_name(config):
        try:
            return model_zoo.get_checkpoint_url(config)
        except RuntimeError as e:
            raise UserError(
                f"--teacher {config} has no weights in Detectron2's model zoo: name another, or a file with --teacher-weights."
            ) from e
    if not weights:
        raise UserError(
            f"--teacher-weights is missing: expected the checkpoint that belongs to {config}; name it."
        )
    check_address(weights, what="--teacher-weights")
    if is_remote(weights):
        return weights
    if not os.path.isfile(weights):
        raise UserError(f"--teacher-weights {weights} is not there: expected a file; correct the path.")  # fmt: skip
    return os.path.abspath(weights)


def _student_weights(weights: str) -> str:
    """An address or ``none`` as it is, of a file its whole path."""
    if weights in ("", "none") or is_remote(weights):
        check_address(weights, what="--student-weights")
        return weights
    if not os.path.isfile(weights):
        raise UserError(
            f"--student-weights {weights} is not there: expected a file, an address, or none for random weights; correct it."
        )
    return os.path.abspath(weights)


def _check_overrides(option: str, opts: Sequence[str]) -> None:
    """Known keys and fit values, none of which this command sets itself."""
    own = ("OUTPUT_DIR", "SEED", "MODEL.META_ARCHITECTURE", "MODEL.DEVICE", "MODEL.WEIGHTS")
    for key in opts[::2]:
        if key in own or key.startswith(("DATASETS.", "MODEL.TEACHER.CONFIG", "MODEL.TEACHER.WEI")):
            raise UserError(f"{option} sets {key}: that follows from other options; leave it out.")
    try:
        load_config("", opts)
    except UserError as e:
        raise UserError(str(e).replace("the command line", option)) from e


def _gpus(asked: int | None) -> int:
    there = torch.cuda.device_count()
    if asked is not None and not 0 <= asked <= there:
        raise UserError(
            f"--num-gpus is {asked}: expected 0 to {there}, as many as this machine has; set it so."
        )
    return there if asked is None else asked
