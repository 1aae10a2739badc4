"""GPUs for runs: who sees which, checked with processes that look at their environment and a made-up machine."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import pytest
from builders import REPO
from runs_case import make_run

from era.errors import UserError
from era.runs import execute as execution
from era.runs.identity import describe
from era.runs.placement import check_gpus, gpus_needed, lend, threads_each, usable_gpus
from era.runs.plan import make_runs
from era.runs.schema import read_plan

NAP = "import os, pathlib, sys, time; time.sleep(0.2); {then}"
SEES = NAP.format(
    then="pathlib.Path(sys.argv[1], 'sees').write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
)


@pytest.mark.parametrize(
    ("count", "setting", "expected"),
    [
        (0, None, ()),
        (3, None, ("0", "1", "2")),
        (2, "5,3", ("5", "3")),
        (2, "GPU-8932f937, GPU-1c", ("GPU-8932f937", "GPU-1c")),
        (1, "2,-1,4", ("2",)),  # torch stops at the first that is none
        (0, "", ()),
    ],
)
def test_the_users_own_choice_of_gpus_holds(count, setting, expected):
    environment = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    assert usable_gpus(count, environment) == expected


@pytest.mark.parametrize(
    ("count", "in_use", "jobs", "expected"),
    [
        (1, "", 3, ("a",)),
        (1, "a", 3, ("b",)),
        (1, "abc", 3, None),
        (2, "b", 3, ("a", "c")),
        (2, "ab", 3, None),
        (3, "a", 3, None),
        (0, "abc", 3, ()),  # a run on the CPU
        (1, "abc", 4, ("a",)),  # more jobs than GPUs share them
        (1, "aabc", 6, ("b",)),
        (3, "abc", 4, ("a", "b", "c")),
        (1, "", 1, ("a",)),
    ],
)
def test_the_idlest_gpus_are_lent(count, in_use, jobs, expected):
    assert lend(count, tuple("abc"), tuple(in_use), jobs) == expected


def test_threads_are_shared_among_all_processes(tmp_path):
    one, four = make_run(tmp_path, "one"), make_run(tmp_path, "four", num_gpus=4)
    assert threads_each(one, jobs=2, cores=8, has_gpus=False) == 4
    assert threads_each(four, jobs=2, cores=16, has_gpus=False) == 2  # eight processes
    assert threads_each(one, jobs=4, cores=16, has_gpus=True) == 4
    assert threads_each(four, jobs=4, cores=16, has_gpus=True) == 4  # one such run at a time
    assert threads_each(four, jobs=1, cores=16, has_gpus=True) == 4
    assert threads_each(four, jobs=2, cores=2, has_gpus=False) == 1


def execute(runs, gpus, jobs):
    """Run processes that sleep; the GPUs that each saw, and those in use at each start, with its own."""
    alive: list[tuple] = []
    starts: dict[str, list[str]] = {}

    def start(run, threads, lent):
        assert threads == max(1, 4 // max(jobs, run.num_gpus))
        starts[run.name] = sorted(
            [*lent, *(gpu for process, held in alive for gpu in held if process.poll() is None)]
        )
        process = execution.start_process(run, threads, lent)
        alive.append((process, lent))
        return process

    execution.execute(
        runs, jobs=jobs, cores=4, gpus=gpus, start=start, stream=io.StringIO(), poll_seconds=0.01
    )
    return {run.name: (run.folder / "sees").read_text() for run in runs}, starts


def sleeper(folder: Path, name: str, **changes):
    command = (sys.executable, "-c", SEES, str(folder / name))
    return make_run(folder, name, command=command, **changes)


def test_each_process_sees_a_gpu_of_its_own_and_gives_it_back(tmp_path):
    runs = [sleeper(tmp_path, name) for name in "pqrstu"]
    sees, starts = execute(runs, ("5", "3"), jobs=2)
    assert sorted(sees.values()) == ["3", "3", "3", "5", "5", "5"]
    assert all(len(set(held)) == len(held) <= 2 for held in starts.values())


def test_a_run_on_several_gpus_waits_for_them_and_is_not_overtaken(tmp_path):
    runs = [
        sleeper(tmp_path, "first", iterations=300),
        sleeper(tmp_path, "wide", iterations=200, num_gpus=3),
        sleeper(tmp_path, "cpu", iterations=150, opts=("MODEL.DEVICE", "cpu")),
        sleeper(tmp_path, "last", iterations=100),
    ]
    sees, starts = execute(runs, ("0", "1", "2"), jobs=3)
    assert sees == {"first": "0", "wide": "0,1,2", "cpu": "", "last": sees["last"]}
    assert list(starts) == ["first", "wide", "cpu", "last"]
    assert starts["wide"] == ["0", "1", "2"]  # first had ended
    assert sees["last"] in "012" and gpus_needed(runs[2]) == 0


def test_more_jobs_than_gpus_share_them(tmp_path):
    runs = [sleeper(tmp_path, name) for name in "pqrs"]
    sees, starts = execute(runs, ("0", "1"), jobs=4)
    assert sorted(sees.values()) == ["0", "0", "1", "1"] and max(map(len, starts.values())) == 4


def test_the_memory_of_several_processes_is_not_that_of_one(tmp_path):
    runs = [sleeper(tmp_path, "one"), sleeper(tmp_path, "two", num_gpus=2)]
    states = execution.execute(
        runs, jobs=2, cores=2, gpus=("0", "1"), stream=io.StringIO(), poll_seconds=0.01
    )
    assert states["two"].peak_mib is None
    if sys.platform == "linux":
        assert states["one"].peak_mib > 1


# ---- In a plan ------------------------------------------------------------------------------------

PLAN = """
title: Two ways
baseline: plain
num_gpus: 8
runs:
  plain: {label: Plain, config: configs/plain_r50.yaml}
  distilled: {label: Distilled, config: configs/era_r101_r50.yaml}
"""


@pytest.fixture
def runs_of(tmp_path, monkeypatch):
    """The runs of PLAN with one text replaced."""
    monkeypatch.chdir(REPO)

    def runs_of(old="", new=""):
        assert old in PLAN
        path = tmp_path / "plan.yaml"
        path.write_text(PLAN.replace(old, new, 1) if old else PLAN)
        return make_runs(read_plan(path), tmp_path / "out")

    return runs_of


def test_a_plan_passes_its_number_of_gpus_to_the_launcher(runs_of):
    for run in runs_of():
        at = run.command.index("--num-gpus")
        assert run.command[at + 1] == "8" and run.num_gpus == 8 and run.iterations == 90_000
    # The recipe is for 8: on 2 GPUs the same pictures are seen in 4 times as many steps of a quarter of the batch.
    assert [run.iterations for run in runs_of("num_gpus: 8", "num_gpus: 2")] == [360_000] * 2
    single = runs_of("num_gpus: 8\n", "")
    assert all("--num-gpus" not in r.command and r.iterations == 720_000 for r in single)


def test_the_number_of_gpus_is_part_of_what_a_result_follows_from(runs_of):
    run = runs_of()[0]
    assert describe(run, {})["num_gpus"] == 8
    assert "num_gpus" not in describe(dataclasses.replace(run, num_gpus=1), {})  # as ever


def test_gpus_that_are_not_there_are_asked_for_in_vain(runs_of):
    runs = runs_of()
    with pytest.raises(
        UserError, match=r"num_gpus is 8, this machine has 2 GPU\(s\) to use \(0, 1\)"
    ):
        check_gpus(runs, ("0", "1"))
    check_gpus(runs, tuple("01234567"))
    check_gpus(runs, ())  # processes on the CPU
    cpu = dataclasses.replace(runs[0], opts=(*runs[0].opts, "MODEL.DEVICE", "cpu"))
    check_gpus([cpu], ("0",))


@pytest.mark.parametrize("value", ["0", "eight", "1.5", "[8]"])
def test_a_number_of_gpus_that_is_none(runs_of, value):
    with pytest.raises(UserError, match=r"num_gpus is .*: expected the number of GPUs of a run"):
        runs_of("num_gpus: 8", f"num_gpus: {value}")


def test_a_schedule_that_is_rescaled_cannot_follow_from_the_time_of_others(runs_of):
    longer = "\n  longer: {label: L, config: configs/plain_r50.yaml, iterations: {time_of: distilled, step_of: plain}}\n"
    assert runs_of("era_r101_r50.yaml}\n", "era_r101_r50.yaml}" + longer)[-1].time_of == (
        "distilled",
    )
    with pytest.raises(
        UserError, match=r"REFERENCE_WORLD_SIZE of the run longer is 8, which rescales"
    ):
        runs_of(
            PLAN[PLAN.index("num_gpus: 8") :],
            PLAN[PLAN.index("num_gpus: 8") :].replace("num_gpus: 8", "num_gpus: 4") + longer,
        )
