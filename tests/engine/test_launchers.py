"""Processes that somebody else starts: torchrun, and srun by the environment that it gives them."""

import os
import shlex
import signal
import socket
import subprocess
import sys

import pytest
import torch
from builders import REPO, cli
from stop_case import command, forked

from era.engine.launch import argument_parser, train_net
from era.engine.launchers import Place, command_line, first_host, place_of, take_place
from era.errors import UserError

SCRIPT = "tools/train_net.py"
LENGTH = ["SOLVER.MAX_ITER", "3", "DATASETS.TEST", "()", "SEED", "5"]
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1", "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "n[07-08]",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def srun_of_two(port: int) -> list[dict[str, str]]:
    """Environments of the two tasks of a job step on one machine."""
    step = {
        **SRUN,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    return [{**step, "SLURM_LOCALID": str(i), "MASTER_PORT": str(port)} for i in (0, 1)]


def start(args, env) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, args)], cwd=REPO, text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_all_launchers_train_the_same_weights(tiny_data, tmp_path):
    """Detectron2's own, torchrun and two tasks of srun: the same two processes."""
    folders = [tmp_path / name for name in ("own", "torchrun", "srun")]
    own, by_torchrun, by_srun = (cli(tiny_data, f, *LENGTH, config="plain") for f in folders)
    with forked(["--num-gpus", "2", *own], tmp_path / "log") as run:
        assert run.end() == 0, run.text[-2000:]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, *by_torchrun],
        cwd=REPO, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tasks = [start(by_srun, env) for env in srun_of_two(free_port())]
    for task in tasks:
        _, errors = task.communicate(timeout=300)
        assert task.returncode == 0, errors[-2000:]
    expected, *others = map(weights, folders)
    for other in others:
        assert other.keys() == expected.keys()
        assert all(torch.equal(other[key], value) for key, value in expected.items())


def test_a_mistake_is_told_once_by_torchrun_and_nothing_is_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT,
         "--config-file", "configs/toy/plain.yaml", "OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", "0"],
        cwd=REPO, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: SOLVER.MAX_ITER is 0") == 1
    assert not (tmp_path / "run").exists()


def test_torchrun_is_asked_to_stop(tiny_data, tmp_path):
    """It hands SIGTERM on; the step is finished and kept, and the command that goes on is torchrun's."""
    args = cli(tiny_data, tmp_path / "run", "SOLVER.MAX_ITER", "100000", "DATASETS.TEST", "()", config="plain")  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with command([*start, SCRIPT, *args], tmp_path / "log") as run:
        run.until_written(r"iter: \d")
        os.kill(run.pid, signal.SIGTERM)
        run.end()
        assert "stopped by SIGTERM" in run.text
        assert "torch.distributed.run --nproc-per-node=2" in run.text and "--resume" in run.text
    assert list((tmp_path / "run").glob("model_*.pth"))


def test_a_task_that_is_killed_ends_the_others(tiny_data, tmp_path):
    """In one sentence, though no launcher of this program's looks after them."""
    args = cli(tiny_data, tmp_path / "run", "SOLVER.MAX_ITER", "100000", "DATASETS.TEST", "()", config="plain")  # fmt: skip
    first, second = (start(args, env) for env in srun_of_two(free_port()))
    try:
        for line in first.stdout:
            if "iter: " in line:
                break
        second.kill()
        _, errors = first.communicate(timeout=30)
    finally:
        for task in (first, second):
            task.kill()
            task.communicate()
    assert first.returncode == 1, errors[-2000:]
    assert (
        "error: rank 0 ends, because another process of the run has ended: srun tells which"
        in errors
    )
    assert "Traceback" not in errors


def test_places():
    assert place_of({}) is None
    assert place_of({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert place_of(TORCHRUN) == Place("torchrun", 1, 4, 2, 1, "env://")
    assert place_of(TORCHRUN).rank == 5
    assert place_of({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}).is_restart
    found = place_of(SRUN)
    assert found[:5] == ("srun", 3, 4, 2, 1) and found.rank == 7 and not found.is_restart
    assert found.url == f"tcp://n07:{20_000 + 7 * 31 + 2}"
    assert place_of({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}).url == "tcp://head:1234"
    # the script of sbatch itself, which has the variables of its job but is no step of it
    assert (
        place_of(
            {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
        )
        is None
    )
    assert place_of({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize("nodes, host", [
    ("n[07-09,12],m3", "n07"), ("n07", "n07"), ("gpu-3.site.org,b", "gpu-3.site.org"), ("a[2,5]-ib", "a2-ib"), ("", ""),
])  # fmt: skip
def test_first_hosts(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("env, message", [
    ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4,2"}, r"srun shares the processes out as 4,2 .*as many on each"),
    ({**SRUN, "SLURM_LOCALID": "one"}, r"SLURM_LOCALID of the environment is 'one': expected a whole number"),
    ({**SRUN, "SLURM_STEP_NODELIST": ""}, r"names no machine that can be read .*set MASTER_ADDR"),
    ({**TORCHRUN, "WORLD_SIZE": "7"}, r"torchrun starts 7 processes, 4 of them on this machine"),
])  # fmt: skip
def test_places_that_cannot_be(env, message):
    with pytest.raises(UserError, match=message):
        place_of(env)


def only(monkeypatch, env):
    """The environment has nothing of a launcher but this."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_"))]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def test_flags_follow_the_launcher_or_contradict_it(monkeypatch):
    only(monkeypatch, {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"})
    parser = argument_parser()
    args = parser.parse_args([])
    take_place(args, parser)
    assert (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url) == (
        4,
        2,
        1,
        "env://",
    )
    assert args.resume  # or it would train from the start again
    args = parser.parse_args(["--num-gpus", "4", "--eval-only", "--dist-url", "tcp://a:1"])
    assert take_place(args, parser).url == "tcp://a:1" and not args.resume
    with pytest.raises(
        UserError, match=r"--num-gpus is 8, but torchrun .* by which it is 4: leave --num-gpus out"
    ):
        train_net(["--num-gpus", "8"])


@pytest.mark.parametrize("env, start", [
    ({}, [sys.executable, "run.py"]),
    ({**SRUN}, ["srun", "--nodes=2", "--ntasks-per-node=4", sys.executable, "run.py"]),
    ({**TORCHRUN, "WORLD_SIZE": "4", "RANK": "1"},
     [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "run.py"]),
    (TORCHRUN, [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--nnodes=2", "...", "run.py"]),
])  # fmt: skip
def test_the_command_that_goes_on(env, start, monkeypatch):
    only(monkeypatch, env)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert shlex.split(command_line(["--resume", "A B"])) == [*start, "--resume", "A B"]
