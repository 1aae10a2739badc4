"""``tools/doctor.py``: parse, examine, print, and say whether to start."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from era.doctor import devices, models, pictures, prediction, software, steps, teacher
from era.doctor.case import OK, SKIPPED, WARNING, WRONG, Case, Finding, plural
from era.engine.preflight import check_data, setup_config
from era.environment import machine, versions
from era.errors import UserError

DESCRIPTION = """\
Examines a run before it is started: what training checks itself before its first step, and what takes too long to be
checked every time. Of its training steps nothing is kept; what is written is a journal of the pictures that were found
whole, and data that are made on first use.

  software       versions, and combinations that are known not to work
  devices        GPUs or cores, their memory, shared memory for loader workers
  data           the annotation files of all datasets, their classes and the model's
  models         student, teacher and methods are built, the weights are read
  disk           the folders can be written; free room against all checkpoints that will be there at a time
  pairing        student and teacher side by side: levels, channels, strides, heads, adapters, needs of the methods
  pictures       every picture is opened and decoded (interrupted, it goes on where it was)
  teacher        its AP on a few test pictures: a low one means the wrong teacher, or the wrong classes
  one process    training steps, really taken, as many pictures a process as in the run
  two processes  the same, with gradients averaged
  prediction     memory a GPU and hours of the whole schedule, with what that assumes

Each says ok, warning (it can start, but look at this), wrong (it should not) or not checked, and why.
"""
EPILOG = """\
exit status:  0 start (warnings or not)   1 something is wrong   2 the command line or the config cannot be read

examples:
  before an 8-GPU run:      %(prog)s --config-file configs/era_r101_r50.yaml --num-gpus 8
  on the CPU, at toy size:  %(prog)s --config-file configs/toy/era.yaml
  the quick part:           %(prog)s --config-file ... --skip pictures --skip "two processes" --teacher-images 0
  for a script:             %(prog)s --config-file ... --json checkup.json && python tools/train_net.py ...

Give the very options and KEY VALUE pairs that train_net.py will get: they are what is examined.
"""


EXIT_INTERRUPTED = 130  # as a shell has it
INTERRUPTED = (
    "Pictures that were found whole are noted: the same command does not decode them again."
)


@dataclass(frozen=True)
class Check:
    """One of the checks, and which others it cannot do without."""

    name: str
    function: Callable[[Case], Finding]
    after: tuple[str, ...] = ()


def check_annotations(case: Case) -> Finding:
    """Register and check all datasets, as training does before it starts; raises UserError."""
    with _Warnings() as told:
        check_data(case.cfg, for_training=True)
    cfg = case.cfg.DATASETS
    names = ", ".join(map(str, dict.fromkeys((*cfg.TRAIN, *cfg.TEST, *cfg.UNLABELED))))
    status = WARNING if told.sentences else OK
    words = (
        told.sentences[0]
        if told.sentences
        else "annotation files, classes and folders are as they should be"
    )
    return Finding(
        status, f"{names}: {words}", {"warnings": told.sentences}, "\n".join(told.sentences[1:])
    )


CHECKS = (
    Check("software", software.check),
    Check("devices", devices.check),
    Check("data", check_annotations),
    Check("models", models.check),
    Check("disk", models.check_disk, ("models",)),
    Check("pairing", models.check_pairing, ("models",)),
    Check("pictures", pictures.check, ("data",)),
    Check("teacher", teacher.check, ("data", "models")),
    Check("one process", steps.check_one, ("data", "models")),
    Check("two processes", steps.check_two, ("data", "models")),
    Check("prediction", prediction.check, ("one process",)),
)
NAMES = tuple(check.name for check in CHECKS)


def argument_parser() -> argparse.ArgumentParser:
    """The doctor's options; those of training have its names."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="of the run, as for train_net.py")
    add("--num-gpus", type=int, default=1, help="GPUs of the run on this machine, or processes on a "
        "machine without one (default: %(default)s)")  # fmt: skip
    add(
        "--num-machines",
        type=int,
        default=1,
        help="of the run; only this one is examined (default: %(default)s)",
    )
    add(
        "--resume",
        action="store_true",
        help="the run will be resumed: weights come from its checkpoint",
    )
    add("--skip", action="append", default=[], choices=NAMES, metavar="CHECK", help="leave a check out, and what "
        "cannot be done without it; may be repeated: " + ", ".join(NAMES))  # fmt: skip
    add("--teacher-images", type=int, default=50, metavar="N", help="test pictures on which the teacher is tried; 0 = "
        "none (default: %(default)s)")  # fmt: skip
    add("--least-ap", type=float, default=10.0, metavar="AP", help="a teacher with less AP on them, in points of 100, is "
        "warned of (default: %(default)s)")  # fmt: skip
    add("--steps", type=int, default=3, metavar="N", help="training steps that count, after one that warms up, of which "
        "the prediction takes the median (default: %(default)s)")  # fmt: skip
    add("--step-timeout", type=float, default=900, metavar="SECONDS", help="the steps, with the start of their "
        "processes, may take so long (default: %(default)s)")  # fmt: skip
    add("--journal", metavar="FILE", help="where the pictures that were found whole are noted; runs on the same data may "
        f"share one (default: OUTPUT_DIR/{pictures.JOURNAL})")  # fmt: skip
    add("--json", metavar="FILE", help="write all that was found; - = to standard output, and the words to "
        "standard error")  # fmt: skip
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Examine and print; the exit status.

    Returns:
        0 if nothing is wrong, 1 if something is, 130 after Ctrl-C.

    Raises:
        UserError: an option or the config is wrong; nothing was examined then.
    """
    args = read_options(argv)
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    out = sys.stderr if args.json == "-" else sys.stdout
    with _Warnings() as told:  # what it warns of is said here
        case, found = Case(args, setup_config(args), list(told.sentences)), {}
        for check in CHECKS:
            try:
                found[check.name] = _examine(check, case, found)
            except KeyboardInterrupt:
                print(f"\nInterrupted at: {check.name}. {INTERRUPTED}", file=sys.stderr)
                return EXIT_INTERRUPTED
            print(found[check.name].told(check.name), file=out, flush=True)
    print(f"\n{verdict(found)}", file=out, flush=True)
    start = not any(finding.status == WRONG for finding in found.values())
    if args.json:
        report = {
            "schema": 1,
            "command": shlex.join(["tools/doctor.py", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine(),
            "versions": versions(),
            "start": start,
            "checks": [{"name": name, **asdict(finding)} for name, finding in found.items()],
        }
        text = json.dumps(report, indent=1, default=str) + "\n"
        if args.json == "-":
            print(text, end="")
        else:
            Path(args.json).write_text(text, encoding="utf-8")
    return 0 if start else 1


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with what training's has besides.

    Raises:
        UserError: one sentence about the first wrong option.
    """
    args = argument_parser().parse_args(argv)
    args.eval_only = False
    least = {"teacher_images": 0, "steps": 1, "step_timeout": 1}
    for name, value in least.items():
        if not getattr(args, name) >= value:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: expected at least {value}."
            )
    if not 0 <= args.least_ap <= 100:
        raise UserError(f"--least-ap is {args.least_ap}: expected points of 100, 0 to 100.")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json is {args.json}, whose folder does not exist: make it first.")
    return args


def verdict(found: dict[str, Finding]) -> str:
    """Whether to start, in one sentence."""
    by_status = {
        status: [name for name, finding in found.items() if finding.status == status]
        for status in (WRONG, WARNING, SKIPPED)
    }
    rest = [
        f"{plural(len(names), 'warning') if status == WARNING else status} ({', '.join(names)})"
        for status, names in by_status.items()
        if names and status != WRONG
    ]
    wrong = by_status[WRONG]
    first = f"Do not start: {', '.join(wrong)} wrong" if wrong else "It can start"
    return "; ".join([first, *rest]) + "."


def _examine(check: Check, case: Case, found: dict[str, Finding]) -> Finding:
    """What a check finds. Whatever it stumbles over is wrong with the run, and the next one is done all the same."""
    if check.name in case.args.skip:
        return Finding(SKIPPED, "--skip")
    unfit = [name for name in check.after if found[name].status in (WRONG, SKIPPED)]
    if unfit:
        return Finding(SKIPPED, f"it needs {' and '.join(unfit)}, see above")
    try:
        return check.function(case)
    except UserError as e:
        return Finding(WRONG, " ".join(str(e).split()))
    except Exception as e:  # of whatever library; a traceback would end the examination
        reason = " ".join(str(e).split())[:300]
        return Finding(
            WRONG, f"{type(e).__name__}: {reason}", {"traceback": traceback.format_exc()}
        )


class _Warnings(logging.Handler):
    """What the package warns of while this is entered, in place of the log."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.sentences.append(record.getMessage())

    def __enter__(self):
        logger = logging.getLogger("era")
        self._level = logger.level
        logger.setLevel(logging.WARNING)
        logger.addHandler(self)
        self._propagates, logger.propagate = logger.propagate, False
        return self

    def __exit__(self, *error) -> None:
        logger = logging.getLogger("era")
        logger.removeHandler(self)
        logger.setLevel(self._level)
        logger.propagate = self._propagates
