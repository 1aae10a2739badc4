"""The soak: what is counted, what counts as growth, and a short real run."""

import json
import os
import subprocess
import sys
import threading

import pytest
from builders import REPO, cli
from detectron2.utils.events import EventStorage

from era.benchmark import soak
from era.benchmark.soak import BOUNDS, Soak, main, watch
from era.benchmark.usage import Usage, drift, members_of, usage_of
from era.engine.resume import LONGEST_WINDOW, limit_histories
from era.errors import UserError

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads Linux's /proc")

# Stands for a run: writes its metrics, and what ``leak`` does before each line stays.
PROGRAM = """
import json, os, subprocess, sys, threading, time
kept = []
def leak(step):
    {leak}
for step in range(20, 201, 20):
    leak(step)
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({{"iteration": step - 1, "total_loss": 1.0}}) + "\\n")
    time.sleep(0.15)
{end}
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Watches :data:`PROGRAM`."""
    monkeypatch.setattr(soak, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(soak, "GRACE_SECONDS", 0.2)

    def start(leak="pass", end=""):
        folder = tmp_path / "run"
        text = PROGRAM.format(leak=leak, end=end)
        return watch(
            "run", (sys.executable, "-S", "-c", text, str(folder / "metrics.json")), folder, 200
        )

    return start


@pytest.mark.parametrize(
    "values, rise",
    [
        ([9, 9, 9, 0, 2, 4, 6, 8], 16.0),  # 2 every 10 of 80, whatever the first half did
        ([0, 0, 0, 0, 5, 5, 900, 5], 0.0),  # a peak
        ([0, 0, 0, 0, 8, 6, 4, 2], -16.0),
        ([0, 0, 3, 3], 0.0),
    ],
)
def test_growth_is_that_of_the_last_half(values, rise):
    places = [10.0 * i for i in range(len(values))]
    assert drift(places, values, 80) == pytest.approx(rise)


def test_three_samples_tell_nothing():
    with pytest.raises(ValueError, match="at least 4"):
        drift([1, 2, 3], [0, 0, 0], 10)


def test_what_a_process_holds_is_counted():
    done = threading.Event()
    before = usage_of([os.getpid()])
    block = bytearray(64 << 20)
    block[::4096] = b"x" * (len(block) // 4096)  # a page is held once it is written to
    thread = threading.Thread(target=done.wait)
    thread.start()
    with open(os.devnull) as one, open(os.devnull) as two:
        during = usage_of([os.getpid(), 2**22 + 1])  # there is no such process
        assert one.fileno() != two.fileno()
    done.set()
    thread.join()
    assert during.memory - before.memory == pytest.approx(64, abs=8) and len(block) > 0
    assert (during.handles - before.handles, during.threads - before.threads) == (2, 1)
    assert during.processes == 1


def test_a_session_is_all_that_was_started_in_it():
    code = "import os, time; os.fork(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
    try:
        found = []
        while len(found) < 2 and process.poll() is None:
            found = members_of(process.pid)
        assert process.pid in found and len(found) == 2
        assert os.getpid() not in found
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    assert process.pid not in members_of(process.pid)


def test_a_program_that_keeps_nothing_is_flat(watched):
    found = watched()
    assert found.faults() == [] and found.status == 0
    assert len(found.samples) >= 4 and max(found.samples) < 200


@pytest.mark.parametrize(
    "leak, told",
    [
        ("kept.append(open(os.devnull))", "handles rises by"),
        ("threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "threads rises by"),
        ("kept.append(bytearray(b'x' * (8 << 20)))", "memory rises by"),
        ("kept.append(subprocess.Popen(['sleep', '2']))", "processes rises by"),
    ],
)
def test_what_grows_is_named(watched, leak, told):
    faults = watched(leak).faults()
    assert any(fault.startswith(told) for fault in faults), faults


def test_what_is_left_behind_is_named_and_ended(watched):
    found = watched(end="subprocess.Popen(['sleep', '60']); sys.exit(3)")
    status, left = found.faults()
    assert status == "exit status 3" and left.startswith("process ") and left.endswith(" is left")
    with pytest.raises(ProcessLookupError):
        while True:  # until it is reaped by whoever adopted it
            os.kill(int(left.split()[1]), 0)


def test_a_short_real_run(tiny_data, tmp_path, monkeypatch, capsys):
    """A run of tools/train_net.py that evaluates and saves as it goes: nothing of it grows but what so few steps cannot tell."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(soak, "POLL_SECONDS", 0.05)
    monkeypatch.setitem(BOUNDS, "memory", 400.0)  # four samples of a process that has just begun
    monkeypatch.setitem(
        BOUNDS, "handles", 400.0
    )  # of batches on their way from a loader: some, as it happens
    _, file, *opts = cli(tiny_data, tmp_path / "not here")
    del opts[opts.index("OUTPUT_DIR") :]
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    flags = [
        "--iterations",
        "81",
        "--iterations-of-two",
        "0",
        "--teacher-iterations",
        "0",
        "--config-file",
        file,
    ]
    flags += ["--output", str(tmp_path / "soak"), "--json", str(tmp_path / "soak.json")]
    status = main([*flags, *opts, "DATALOADER.NUM_WORKERS", "1"])
    shown = capsys.readouterr().out
    assert status == 0, shown
    (run,) = json.loads((tmp_path / "soak.json").read_text())["runs"]
    assert [sample["iterations"] for sample in run["samples"]] == [20, 40, 60, 80]
    assert {sample["processes"] for sample in run["samples"]} == {2}  # with the loader's
    assert (
        run["status"] == 0 and run["faults"] == [] and run["rises"]["handles"] < BOUNDS["handles"]
    )  # may fall
    assert "flat: nothing rises" in shown and "rise over the run" in shown
    folder = tmp_path / "soak" / "one_process"
    assert (folder / "student" / "model_final.pth").is_file()
    log = (folder / "soak.log").read_text()
    assert log.count("copypaste: AP,AP50") == 11 and "model_0000071.pth" in log


def test_growth_in_a_run_is_exit_status_1(tmp_path, monkeypatch, capsys):
    usage = Usage(100.0, 0.0, 5, 1, 1)

    def leaky(name, command, folder, iterations):
        samples = {i: usage._replace(handles=i // 20) for i in range(20, iterations, 20)}
        return Soak(name, iterations, samples=samples)

    monkeypatch.chdir(REPO)
    monkeypatch.setattr(soak, "watch", leaky)
    status = main(
        [
            "--teacher-iterations",
            "0",
            "--output",
            str(tmp_path / "soak"),
            "--iterations-of-two",
            "0",
        ]
    )
    assert status == 1
    assert "one process: handles rises by 100.0 (expected below 1)" in capsys.readouterr().out


@pytest.mark.parametrize("part, faults", [(0.9, 0), (1.5, 1)])
def test_memory_of_all_processes_may_rise_by_so_much(part, faults):
    rise = part * BOUNDS["memory"]
    samples = {i: Usage(rise * i / 200, 0.0, 5, 1, 8) for i in range(20, 200, 20)}
    found = Soak("run", 200, samples=samples).faults()
    assert len(found) == faults
    assert not found or found[0] == "memory rises by 48.0 MiB (expected below 32 MiB)"


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--iterations", "80"], "--iterations is 80: expected at least 81"),
        (["--iterations-of-two", "-1"], "--iterations-of-two is -1"),
        (["--teacher-iterations", "-2"], "--teacher-iterations is -2"),
        (["--output", "docs"], "--output docs is there already"),
        (["--config-file", "configs/toy/plain.yaml"], "names no teacher to train"),
        (["--config-file", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_flags_are_one_sentence(flags, told, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError) as refused:
        main(["--output", str(tmp_path / "soak"), *flags])
    assert told in str(refused.value) and not (tmp_path / "soak").exists()


def test_it_is_called_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"from the repository's root"):
        main([])


def test_a_teacher_that_is_not_trained_is_told(tmp_path, monkeypatch):
    seen = []

    def run(command, **_):
        seen.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.chdir(REPO)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(
        UserError, match=r"configs/toy/teacher.yaml was not trained \(exit status 1\)"
    ):
        main(["--teacher-iterations", "7", "--output", str(tmp_path / "soak")])
    (command,) = seen
    assert command[6:9] == ["configs/toy/teacher.yaml", "SOLVER.MAX_ITER", "7"]


def test_a_long_run_keeps_no_more_values_than_writers_look_at():
    with EventStorage(0) as storage:
        limit_histories(storage)
        for i in range(LONGEST_WINDOW + 500):
            storage.put_scalar("loss", float(i))
            storage.step()
        history = storage.history("loss")
        assert len(history.values()) == LONGEST_WINDOW
        assert (
            history.median(20) == LONGEST_WINDOW + 500 - 10.5
            and history.latest() == LONGEST_WINDOW + 499.0
        )
        assert history.global_avg() == pytest.approx((LONGEST_WINDOW + 499) / 2)
