"""Real runs that are stopped, killed and left alone: one process and two."""

import os
import shlex
import signal
import sys
import time

import pytest
import torch
from builders import REPO, cli
from resume_case import difference, lines
from stop_case import command, forked

from era.engine import processes, trainer
from era.engine.launch import train_net
from era.errors import UserError

STEPS = r"Starting training from iteration"


def endless(tiny_data, output, *opts):
    return cli(tiny_data, output, "SOLVER.MAX_ITER", "100000", "DATASETS.TEST", "()", *opts, config="plain")  # fmt: skip


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("model_*.pth"))


def slow_steps():
    """A step that takes longer than the test."""
    own = trainer.Trainer.run_step

    def run_step(self):
        print("a long step")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.1)
        own(self)

    trainer.Trainer.run_step = run_step


def slow_evaluation():
    def evaluate(cfg, model):
        print("a long evaluation")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.1)

    trainer.evaluate = evaluate


def test_ctrl_c_and_the_command_that_it_tells(tiny_data, tmp_path):
    """Through the command line; a terminal sends the signal to the loader's processes too."""
    args = endless(tiny_data, tmp_path / "run", "DATALOADER.NUM_WORKERS", "1")
    with command([sys.executable, "tools/train_net.py", *args], tmp_path / "log") as run:
        run.until_written(r"iter: \d")
        os.killpg(run.pid, signal.SIGINT)
        assert run.end() == 130
        run.leaves_nothing(1)
        text = run.text
    assert "SIGINT: finishing the step" in text and "Traceback" not in text
    (name,) = checkpoints(tmp_path / "run")
    done = int(name[6:-4]) + 1
    assert f"stopped by SIGINT: {done} of 100000 iterations are done" in text
    again = shlex.split(text[text.index("Go on with:\n") :].splitlines()[1])
    assert again[1:3] == ["tools/train_net.py", "--resume"]
    with forked([*again[2:], "SOLVER.MAX_ITER", done + 1], tmp_path / "again") as run:
        assert run.end() == 0, run.text[-3000:]
        assert f"{STEPS} {done}" in run.text


def test_what_was_stopped_goes_on_exactly(tiny_data, tmp_path):
    """After a step, and out of the evaluation that follows another."""

    def ask_in_step():
        own = trainer.Trainer.run_step

        def run_step(self):
            if self.iter == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            own(self)

        trainer.Trainer.run_step = run_step

    def ask_in_evaluation():
        trainer.evaluate = lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    def run_of(name, *more, prepare=lambda: None):
        opts = ["SOLVER.MAX_ITER", "8", "SEED", "5", "TEST.EVAL_PERIOD", "5"]
        args = [*more, *cli(tiny_data, tmp_path / name, *opts, config="plain")]
        with forked(args, tmp_path / f"{name}.log", prepare) as run:
            return run.end()

    def result_of(name):
        final = torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        return final["model"], final["trainer"]["_trainer"]["optimizer"], lines(tmp_path / name)

    assert run_of("whole") == 0
    for name, step, prepare in (("step", 3, ask_in_step), ("evaluation", 4, ask_in_evaluation)):
        assert run_of(name, prepare=prepare) == 143
        assert checkpoints(tmp_path / name) == [f"model_{step:07d}.pth"]
        assert run_of(name, "--resume") == 0
        assert difference(result_of("whole"), result_of(name)) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_two_processes_stop_after_the_same_step(tiny_data, tmp_path, number):
    """Asked through the launcher, through one worker alone, or all of them at once."""
    args = ["--num-gpus", "2", *endless(tiny_data, tmp_path / "run")]
    with forked(args, tmp_path / "log") as run:
        run.until_written("did step 2")
        run.until(lambda: len(run.workers()) == 2, "second process")
        if number == signal.SIGUSR1:
            os.kill(run.workers()[1], number)
        elif number == signal.SIGTERM:
            os.kill(run.pid, number)
        else:
            os.killpg(run.pid, number)
        assert run.end() == 128 + number
        run.leaves_nothing(1)
        assert run.text.count("Go on with:") == 1 and "Traceback" not in run.text
        (name,) = checkpoints(tmp_path / "run")
        assert f"{int(name[6:-4]) + 1} of 100000 iterations" in run.text
        assert run.text.count(f"did step {int(name[6:-4])}\n") == 2
        assert f"did step {int(name[6:-4]) + 1}\n" not in run.text


def test_one_process_stops_at_the_signal_of_a_scheduler(tiny_data, tmp_path):
    """All of a run's processes get it from SLURM. A checkpoint that is due is written once."""
    opts = ["DATALOADER.NUM_WORKERS", "1", "SOLVER.CHECKPOINT_PERIOD", "1"]
    args = ["--stop-signals", "SIGUSR2", *endless(tiny_data, tmp_path / "run", *opts)]
    with forked(args, tmp_path / "log") as run:
        run.until(lambda: len(checkpoints(tmp_path / "run")) > 1, "checkpoints")
        os.killpg(run.pid, signal.SIGUSR2)
        assert run.end() == 128 + signal.SIGUSR2
        run.leaves_nothing(1)
        last = checkpoints(tmp_path / "run")[-1]
        assert run.text.count(f"{last}\n") == 1 and f"{last}. Go on with:" in run.text


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_ctrl_c_stops_at_once(tiny_data, tmp_path, count):
    args = ["--num-gpus", count, *endless(tiny_data, tmp_path / "run")]
    with forked(args, tmp_path / "log", slow_steps) as run:
        run.until_written("a long step")
        os.kill(run.pid, signal.SIGINT)
        run.until_written("SIGINT: finishing the step")
        os.kill(run.pid, signal.SIGINT)
        begin = time.monotonic()
        assert run.end() == (-signal.SIGINT if count == 1 else 130)
        assert time.monotonic() - begin < 5
        run.leaves_nothing(1)
        assert count == 1 or "stopped at once" in run.text
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_while_evaluating_keeps_the_step_before(tiny_data, tmp_path, count):
    opts = ["TEST.EVAL_PERIOD", "3", "DATASETS.TEST", "('tiny_val',)"]
    args = ["--num-gpus", count, *endless(tiny_data, tmp_path / "run", *opts)]
    with forked(args, tmp_path / "log", slow_evaluation) as run:
        run.until(lambda: run.text.count("a long evaluation") == count, "evaluation")
        os.kill(run.pid, signal.SIGTERM)
        assert run.end() == 143
        run.leaves_nothing(1)
        assert "stopped by SIGTERM: 3 of 100000 iterations are done" in run.text
    assert checkpoints(tmp_path / "run") == ["model_0000002.pth"]


def test_a_killed_worker_is_named_and_ends_the_rest(tiny_data, tmp_path):
    args = ["--num-gpus", "2", *endless(tiny_data, tmp_path / "run")]
    with forked(args, tmp_path / "log") as run:
        run.until_written("did step 2")
        run.until(lambda: len(run.workers()) == 2, "second process")
        os.kill(run.workers()[1], signal.SIGKILL)
        begin = time.monotonic()
        assert run.end() == 1, run.text[-3000:]
        assert time.monotonic() - begin < 30
        run.leaves_nothing(1)
        errors = [line for line in run.text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in run.text, run.text[-3000:]
    assert "(rank 1) was killed by SIGKILL, mostly by the system for want of memory" in errors[0]
    assert "--resume" in run.text


def test_a_killed_process_of_the_data_loader_is_named(tiny_data, tmp_path):
    args = endless(tiny_data, tmp_path / "run", "DATALOADER.NUM_WORKERS", "1")
    with forked(args, tmp_path / "log") as run:
        run.until_written("did step 2")
        (loader,) = [pid for pid, parent in run.processes().items() if parent == run.pid]
        os.kill(loader, signal.SIGKILL)
        assert run.end() == 1, run.text[-3000:]
        assert "data loader of rank 0 was killed by SIGKILL, mostly" in run.text
        assert "Traceback" not in run.text


def test_nothing_outlives_a_launcher_that_was_killed(tiny_data, tmp_path):
    """Started with Ctrl-C ignored, through the command line."""
    output = tmp_path / "run"
    args = ["--num-gpus", "2", *endless(tiny_data, output, "SOLVER.CHECKPOINT_PERIOD", "1")]
    line = [sys.executable, REPO / "tools" / "train_net.py", *args]
    with command(line, tmp_path / "log", ignore_ctrl_c=True) as run:
        run.until(lambda: len(checkpoints(output)) > 1, "checkpoints")
        os.killpg(run.pid, signal.SIGINT)  # ignored, as asked for
        os.kill(run.pid, signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
        run.leaves_nothing(10)
        left = checkpoints(output)
        time.sleep(1)
        assert checkpoints(output) == left


@pytest.mark.parametrize("has_prctl", [True, False])
def test_a_process_ends_with_its_parent(monkeypatch, has_prctl):
    if not has_prctl:
        monkeypatch.setattr(processes, "_killed_with_parent", lambda: False)
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        child = os.fork()
        if child == 0:
            processes.end_with(os.getppid())
            os.write(writer, b"ready")
            time.sleep(60)
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 5) == b"ready"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    begin = time.monotonic()
    assert os.read(reader, 1) == b""  # the child held the other end
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("name", ["SIGKILL", "TERM", "SIG_IGN"])
def test_a_signal_that_cannot_be_noted(tiny_data, tmp_path, name):
    with pytest.raises(UserError, match=f"--stop-signals names '{name}'") as e:
        train_net(["--stop-signals", f"SIGTERM,{name}", *endless(tiny_data, tmp_path)])
    assert "\n" not in str(e.value)
