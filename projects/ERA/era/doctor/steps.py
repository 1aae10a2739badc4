"""Training steps that are really taken, in processes of their own, as the run would take them.

The parent writes nothing but a temporary folder: the steps' ``OUTPUT_DIR``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase, default_setup
from detectron2.utils import comm

from era import compat
from era.benchmark.measure import MIB, resident_mib
from era.data.pictures import picture_mapper
from era.devices import CUDA, kind_of, synchronise
from era.doctor.case import OK, SKIPPED, WARNING, WRONG, Case, Finding
from era.doctor.teacher import some_records
from era.engine.launch import argument_parser, launch_processes
from era.engine.preflight import check_data, keys_with_value, setup_config
from era.engine.trainer import Trainer
from era.errors import UserError
from era.modeling.teacher_cache import cache_folder
from era.registry import methods_of

START = "from era.doctor.steps import main; main()"  # functions of an importable module: processes import them
RESULT = "ERA_DOCTOR_RESULT"  # environment: where the main process writes what it measured
STEPS = "ERA_DOCTOR_STEPS"
TEST_PICTURES = 4  # on which the student's inference is timed
LAST_LINES = 15  # of the output of steps that failed


# ---- the parent ----------------------------------------------------------------------------------


def check_one(case: Case) -> Finding:
    """Steps in one process."""
    return _check(case, 1)


def check_two(case: Case) -> Finding:
    """Steps in two processes, that average their gradients."""
    return _check(case, 2)


def _check(case: Case, processes: int) -> Finding:
    on_gpu = case.on_gpu
    note = ""
    if on_gpu and torch.cuda.device_count() < processes:
        on_gpu, note = (
            False,
            ", on the CPU, for there is one GPU: that says whether it works, not how fast",
        )
    if not on_gpu and processes > 1:
        for key in keys_with_value(case.cfg, "SyncBN"):
            return Finding(
                SKIPPED, f"{key} is SyncBN, which torch cannot do in several processes on a CPU"
            )
    measured = take_steps(case, processes, on_gpu=on_gpu)
    if "problem" in measured:
        is_planned = processes == 1 or case.processes > 1
        word = "the run" if is_planned else "a run of several processes"
        return Finding(
            WRONG if is_planned else WARNING,
            f"{word} cannot take a step: {measured['problem']}",
            measured,
            measured["output"],
        )
    case.step_results[processes] = measured
    losses = measured["losses"]
    total = sum(losses.values())
    distilled = tuple(f"loss_{name}_" for name in methods_of(case.cfg))
    zero = [name for name, value in losses.items() if value == 0.0 and name.startswith(distilled)]
    pictures, seconds = measured["pictures"], statistics.median(measured["seconds"])
    lines = "first losses: " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    sentence = (
        f"{measured['steps']} step(s) of {pictures} picture(s) a process{note}: {seconds:.2f} s a step, loss "
        f"{total:.4g}, at most {max(measured['peak_mib']):,.0f} MiB {'of GPU memory' if on_gpu else 'resident'} a process"
    )
    if zero:
        return Finding(WARNING, f"{sentence}; exactly 0: {', '.join(zero)}", measured, lines)
    return Finding(OK, sentence, measured, lines)


def take_steps(case: Case, processes: int, *, on_gpu: bool) -> dict:
    """Take ``--steps`` steps with as many pictures a process as in the run, in a program of its own.

    Returns:
        What :func:`_measure` wrote, or ``problem`` (a phrase) and the last lines of the ``output``.
    """
    cfg, args = case.cfg, case.args
    share = {
        "SOLVER.REFERENCE_WORLD_SIZE": 0,  # it is scaled already
        "SOLVER.IMS_PER_BATCH": cfg.SOLVER.IMS_PER_BATCH // case.processes * processes,
        "SOLVER.UNLABELED_PER_BATCH": cfg.SOLVER.UNLABELED_PER_BATCH // case.processes * processes,
        "SOLVER.BASE_LR": cfg.SOLVER.BASE_LR,
        "SOLVER.WARMUP_ITERS": cfg.SOLVER.WARMUP_ITERS,
        "SOLVER.MAX_ITER": cfg.SOLVER.MAX_ITER,
        "SOLVER.STEPS": tuple(cfg.SOLVER.STEPS),
        "TEST.EXPECTED_RESULTS": [],
        "MODEL.DEVICE": cfg.MODEL.DEVICE if on_gpu or (case.on_mps and processes == 1) else "cpu",
    }
    if cache_folder(cfg) is not None:
        share["MODEL.TEACHER.CACHE"] = "off"  # a folder is the run's to fill
    with tempfile.TemporaryDirectory(prefix="era_doctor_") as folder:
        result = Path(folder) / "result.json"
        opts = [text for key, value in share.items() for text in (key, str(value))]
        opts += ["OUTPUT_DIR", os.path.join(folder, "run")]
        command = [sys.executable, "-W", "ignore", "-c", START, "--num-gpus", str(processes)]
        command += ["--config-file", args.config_file, *args.opts, *opts]
        environment = {**os.environ, RESULT: str(result), STEPS: str(args.steps)}
        if not on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # or processes would meet by NCCL
        status, output = _run(command, environment, args.step_timeout)
        if status == 0 and result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
    lines = output.strip().splitlines()
    return {
        "problem": _why(status, lines, args.step_timeout),
        "output": "\n".join(lines[-LAST_LINES:]),
    }


def _run(command: list[str], environment: dict, seconds: float) -> tuple[int | None, str]:
    """Exit status, None if it took too long, and output; no process of it is left."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a dead launcher left behind
            process.wait()
        output.seek(0)
        return status, output.read()


def _why(status: int | None, lines: list[str], seconds: float) -> str:
    if status is None:
        return f"it was not done after {seconds:g} s (--step-timeout)"
    told = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    if told:
        return told[-1]
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}{' (often because memory ran out)' * (name == 'SIGKILL')}"
    return (lines or ["it ended without a word"])[-1].strip()[:300]


# ---- the processes that take the steps -----------------------------------------------------------


class StepsAlone(Trainer):
    """A trainer that takes steps and writes nothing."""

    keeps_bad_steps = False

    def build_hooks(self) -> list[HookBase]:
        """A stopwatch alone."""
        self.watch = Stopwatch(torch.device(self.cfg.MODEL.DEVICE))
        return [self.watch]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> LargestFirst:
        """The run's batches, after one of its largest size."""
        largest = cfg.clone()
        largest.defrost()
        largest.INPUT.MIN_SIZE_TRAIN = (max(cfg.INPUT.MIN_SIZE_TRAIN),)
        largest.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
        largest.DATALOADER.NUM_WORKERS = 0
        return LargestFirst(super().build_train_loader(largest), super().build_train_loader(cfg))


class LargestFirst:
    """The first batch of one loader, then those of another, which is in all else what this is."""

    def __init__(self, largest, usual):
        self.largest, self.usual = largest, usual

    def __iter__(self) -> Iterator[list[dict]]:
        yield next(iter(self.largest))
        yield from self.usual

    def __getattr__(self, name: str):
        if name in ("largest", "usual"):  # while it is built
            raise AttributeError(name)
        return getattr(self.usual, name)


class Stopwatch(HookBase):
    """Seconds of every step, data loading included, and the losses of the first."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []
        self.losses: dict[str, float] = {}

    def before_step(self) -> None:
        """Starts."""
        synchronise(self.device)
        self._start = time.perf_counter()

    def after_step(self) -> None:
        """Stops."""
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - self._start)
        if not self.losses and comm.is_main_process():
            latest = self.trainer.storage.latest()
            # Detectron2 notes a loss that is the only one as the total alone.
            losses = {n: v for n, (v, _) in latest.items() if n.startswith("loss_")}
            self.losses = losses or {"total_loss": latest["total_loss"][0]}


def main() -> None:
    """Of the program that takes steps: the command line of ``tools/train_net.py``."""
    args = argument_parser().parse_args()
    args.dist_url = "auto"
    launch_processes(run_process, args)


def run_process(args: argparse.Namespace) -> None:
    """One process of it; a reason to stop is one sentence on standard error."""
    try:
        measured = _measure(args)
    except (UserError, FloatingPointError, torch.OutOfMemoryError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1)
    if comm.is_main_process():
        Path(os.environ[RESULT]).write_text(json.dumps(measured), encoding="utf-8")
    if dist.is_initialized():
        compat.leave_process_group()


def _measure(args: argparse.Namespace) -> dict:
    cfg = setup_config(args)
    check_data(cfg, for_training=True)
    if cfg.MODEL.DEVICE == "cpu":
        torch.set_flush_denormal(True)  # as in a run
    default_setup(cfg, args)
    trainer = StepsAlone(cfg)
    trainer.resume_or_load(resume=False)
    steps = int(os.environ[STEPS])
    trainer.max_iter = steps + 1  # the first one warms up
    trainer.train()
    on_gpu = kind_of(cfg.MODEL.DEVICE) == CUDA
    peak = torch.cuda.max_memory_reserved() / MIB if on_gpu else resident_mib("VmHWM")
    peaks = comm.gather(peak)
    return {
        "processes": comm.get_world_size(),
        "on_gpu": on_gpu,
        "steps": steps,
        "pictures": cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        "warm_up_seconds": trainer.watch.seconds[0],
        "seconds": trainer.watch.seconds[1:],
        "losses": trainer.watch.losses,
        "peak_mib": peaks,
        "gpu_mib": torch.cuda.get_device_properties(0).total_memory / MIB if on_gpu else None,
        "outside_mib": _outside_torch() if on_gpu else None,
        "test_seconds": _time_inference(cfg, trainer) if comm.get_world_size() == 1 else None,
    }


def _outside_torch() -> float:
    """MiB of the GPU that are taken and not torch's: CUDA's context, libraries, and other programs."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / MIB


@torch.no_grad()
def _time_inference(cfg: CfgNode, trainer: Trainer) -> float | None:
    """Seconds a test picture, the median; None without a test set."""
    if not cfg.DATASETS.TEST or trainer.is_preparation:
        return None
    model = trainer.bare_model.eval()
    mapper = picture_mapper(cfg, is_train=False)
    device, times = torch.device(cfg.MODEL.DEVICE), []
    for record in some_records(cfg.DATASETS.TEST[0], TEST_PICTURES):
        start = time.perf_counter()
        model([mapper(record)])
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
