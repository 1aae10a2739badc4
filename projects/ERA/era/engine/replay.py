"""What ``tools/replay_step.py`` does: take a step again that a run had to stop, and look closely at it.

One process goes through the forward and backward of the kept inputs, with the step's random numbers, under the run's own
config, and says which loss term, which module and which parameter's gradient is the first that is not finite. The update
is repeated only where it was what spoilt the weights. What other processes of the run said (means over processes, SyncBN,
their part of the gradients) is not in the file.
"""

from __future__ import annotations

import argparse
import glob
import math
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from torch import nn

from era.addresses import check_nothing_run
from era.checkpoint.reading import SafeCheckpointer, misfits, peek
from era.config import load_config, validate_config
from era.devices import is_there
from era.engine.bad_step import FOLDER, BadStep, read_bad_step
from era.engine.preflight import build_model_of, teacher_record
from era.engine.retake import Replayed, retake
from era.engine.trainer import inherit, speed_up
from era.errors import UserError

EXIT_BAD_AGAIN = 1
EPILOG = """
example:
  %(prog)s output/bad_step/iter_0001234_rank0.pt

The config is the config.yaml of the run's folder; the weights are those beside the file, or else of the run's last
checkpoint before the step, or else those that the run began with. The output says which.

exit status:
  0  everything is finite and within SOLVER.MAX_LOSS this time
  1  the step fails again
  2  a mistake in the command or the files, told in one sentence
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Take a step again that a run had to stop, and see where its numbers went wrong.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help=f"iter_<iteration>_rank<rank>.pt below OUTPUT_DIR/{FOLDER}")
    parser.add_argument("--config-file", default="", help="default: config.yaml of the run's folder")  # fmt: skip
    parser.add_argument("--weights", default="", help="a checkpoint of the run in the place of the weights that were kept")  # fmt: skip
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config, such as MODEL.DEVICE cpu")  # fmt: skip
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Take the step again and print what was found.

    Returns:
        The exit status.

    Raises:
        UserError: a file or the config is absent or does not fit.
    """
    args = parse(argv)
    step = read_bad_step(args.file)
    run = os.path.dirname(os.path.dirname(os.path.abspath(args.file)))
    cfg = load_config(args.config_file or os.path.join(run, "config.yaml"), args.opts)
    if not args.config_file:
        check_nothing_run(cfg, args.opts, source=os.path.join(run, "config.yaml"))
    if not is_there(cfg.MODEL.DEVICE):
        cfg.MODEL.DEVICE = "cpu"
    validate_config(cfg)
    weights, whence = weights_for(cfg, step, args.file, run, args.weights)
    model, optimizer = build(cfg, step, weights)
    print(
        f"Iteration {step.iteration} of process {step.rank} (of {step.processes}), seed {step.seed}: {_plain(step.reason)}"
    )
    names = [str(item.get("file_name", "?")) for batch in step.batches for item in batch]
    print(f"pictures: {_plain(', '.join(names))}")
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(step.learning_rates)))
    print(f"weights: {whence}; learning rate {rates}")
    found = retake(cfg, model, step, optimizer)
    print(report(step, found))
    if problem := found.problem(cfg.SOLVER.MAX_LOSS, step.iteration):
        alike = bool(step.losses) and all(
            _same(found.losses.get(name, 0.0), value) for name, value in step.losses.items()
        )
        print(f"The step fails again{', with the losses of the run' * alike}: {problem}.")
        return EXIT_BAD_AGAIN
    print("The step is finite this time, and its losses are within SOLVER.MAX_LOSS.")
    return 0


def weights_for(
    cfg: CfgNode, step: BadStep, path: str, run: str, given: str
) -> tuple[str | None, str]:
    """The file with the weights to take the step with, None for those that a run begins with; and which they are, a phrase.

    Args:
        path: of the step's file.
        run: the run's folder.
        given: on the command line, "" if none.
    """
    if given:
        return given, f"{given}, as named"
    exact = "as they were before the step"
    beside = os.path.join(os.path.dirname(path), step.weights)
    if step.weights and os.path.isfile(beside):
        return beside, f"{beside}, {exact}"
    iterations = {}
    for checkpoint in glob.glob(os.path.join(glob.escape(run), "model_*.pth")):
        data = peek(checkpoint) or {}
        if "trainer" in data and isinstance(data.get("iteration"), int):
            iterations[checkpoint] = data["iteration"]
    before = {p: i for p, i in iterations.items() if i < step.iteration}
    why = step.why_no_weights or f"{beside} is absent"
    if not before:
        same = cfg.SEED >= 0 and step.iteration == 0
        words = exact if same else "NOT those of the step"
        return None, f"those that a run of this config begins with, {words} ({why})"
    newest = max(before, key=before.__getitem__)
    same = before[newest] == step.iteration - 1
    words = exact if same else f"NOT those of the step but of iteration {before[newest]}"
    return newest, f"{newest}, {words} ({why})"


def build(cfg: CfgNode, step: BadStep, weights: str | None) -> tuple[nn.Module, dict | None]:
    """The run's model in training mode, with these weights and the step's buffers; and the optimiser's state beside the
    weights, None where there is none.

    Raises:
        UserError: as :func:`~era.engine.preflight.build_model_of`, or the weights or the buffers are of another model, or
            of another teacher's student.
    """
    if cfg.MODEL.DEVICE == "cpu":
        torch.set_flush_denormal(True)  # as in a run
    rank = step.rank if weights else 0  # whose weights all processes begin with
    seed_all_rng(cfg.SEED + rank if cfg.SEED >= 0 else step.seed)
    model = build_model_of(cfg)
    speed_up(cfg, model)
    checkpointer = SafeCheckpointer(model, save_to_disk=False, **teacher_record(model))
    problems, data = [], {}
    if weights is None:
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
        inherit(cfg, model, checkpointer)
    else:
        data = checkpointer.load(weights)
        problems += misfits(checkpointer.incompatible)
    own = model.state_dict()
    problems += [
        f"has the buffer {name}, which the model lacks or has in another shape"
        for name, buffer in step.buffers.items()
        if name not in own or own[name].shape != buffer.shape
    ]
    if problems:
        raise UserError(
            f"{weights} and the step do not fit the model of the config: one of them {problems[0]}; expected the config and "
            "weights of the run; name them with --config-file and --weights."
        )
    model.load_state_dict(step.buffers, strict=False)
    match data.get("trainer"):
        case {"_trainer": {"optimizer": dict(state)}}:
            return model.train(), state
    return model.train(), None


def _plain(text: str) -> str:
    """A text of a file that may come from anybody, for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4) or (math.isnan(a) and math.isnan(b))


def report(step: BadStep, found: Replayed) -> str:
    """The tables and sentences for a reader."""
    names = list(dict.fromkeys([*step.losses, *found.losses]))
    losses = [
        [
            _plain(name),
            *(_number(d.get(name)) for d in (step.losses, found.losses, found.loss_gradients)),
        ]
        for name in names
    ]
    parts = [[n, _number(norm), f"{bad} of {count}"] for n, (norm, bad, count) in found.parts.items()]  # fmt: skip
    lines = []
    if losses:
        lines += [tabulate(losses, ["loss", "in the run", "now", "largest gradient"], disable_numparse=True), ""]  # fmt: skip
    if parts:
        lines += [tabulate(parts, ["gradient of", "norm", "parameters not finite"], disable_numparse=True), ""]  # fmt: skip
    lines.append(f"first module whose output is not finite: {found.first_module or 'none'}")
    lines.append(f"first parameter, going backward, whose gradient is not finite: {found.first_gradient or 'none'}")  # fmt: skip
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
