"""Runs that fail or are killed: the others go on, and a later call goes on from what is complete."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import runs_case
from runs_case import FAIL, PASS, make_run, training

from era.errors import UserError
from era.runs import folder as folders
from era.runs.execute import execute, unfinished
from era.runs.process import peak_memory, start_process, stop


def run_all(runs, **options):
    out = io.StringIO()
    defaults = {"jobs": 2, "cores": 2, "stream": out, "poll_seconds": 0.01, "go_on": True}
    return execute(runs, **{**defaults, **options}), out.getvalue()


def test_a_failing_run_leaves_the_others_going_and_what_needs_it_is_skipped(tmp_path):
    runs = [
        make_run(tmp_path, "bad", command=FAIL),
        make_run(tmp_path, "after", depends_on=("bad",)),
        make_run(tmp_path, "after_that", depends_on=("after",)),
        make_run(tmp_path, "other"),
        make_run(tmp_path, "last", depends_on=("other",)),
    ]
    states, shown = run_all(runs, jobs=1)
    assert {name for name, state in states.items() if state.is_done} == {"other", "last"}
    assert "'bad' failed (exit status 3)" in states["bad"].problem
    assert str(runs[0].log) in states["bad"].problem
    assert states["after"].problem == "skipped, for it needs bad"
    assert states["after_that"].problem == "skipped, for it needs after"
    assert "  bad: disk on fire" in shown and "after: skipped, for it needs bad" in shown
    assert "200/200 steps" in shown  # the lost ones are not waited for
    assert not runs[1].folder.exists()
    assert not (runs[0].folder / folders.STAMP).exists()


def test_all_that_is_left_after_a_failure_is_done_by_the_next_call(tmp_path):
    good = [make_run(tmp_path, name, command=training(tmp_path / name, 1.0)) for name in "ab"]
    bad = make_run(tmp_path, "bad", command=FAIL)
    after = make_run(
        tmp_path, "after", command=training(tmp_path / "after", 1.0), depends_on=("bad",)
    )
    run_all([good[0], bad, after, good[1]])
    mended = make_run(tmp_path, "bad", command=training(tmp_path / "bad", 1.0))
    states, _ = run_all([good[0], mended, after, good[1]], reuse=True)
    assert [name for name, state in states.items() if state.reused] == ["a", "b"]
    assert all(state.is_done for state in states.values())
    assert states["a"].seconds is not None  # of the earlier call


def test_a_run_without_a_result_has_failed(tmp_path):
    def finished(state):
        if state.run.name == "odd":
            raise UserError("the run 'odd' left no evaluation.")

    runs = [make_run(tmp_path, "odd"), make_run(tmp_path, "even")]
    states, shown = run_all(runs, on_finished=finished)
    assert states["odd"].problem == "the run 'odd' left no evaluation." and "odd: done" not in shown
    assert states["even"].is_done and not (runs[0].folder / folders.STAMP).exists()
    with pytest.raises(UserError, match="left no evaluation"):
        run_all(runs, on_finished=finished, go_on=False)


def test_equal_time_that_cannot_be_measured_is_a_failure_too(tmp_path):
    runs = [make_run(tmp_path, name) for name in ("slow", "fast")]
    names = {"time_of": ("slow",), "step_of": ("fast",), "depends_on": ("slow", "fast")}
    states, _ = run_all([*runs, make_run(tmp_path, "longer", **names), make_run(tmp_path, "more")])
    assert "slow wrote no time of a step" in states["longer"].problem
    assert states["more"].is_done


# ---- What is still to be done ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "known", "left"),
    [
        ("", "", "teacher a b evaluation"),
        ("teacher a b evaluation", "", ""),
        ("teacher", "", "a b evaluation"),
        # Results alone are enough where nobody needs a folder, ...
        ("", "teacher a b evaluation", ""),
        # ... but a missing student needs its teacher; the other one stays, for its result is known.
        ("", "teacher a evaluation", "teacher b"),
        # A student that is here follows from a teacher that is trained anew: so it is too, ...
        ("a b evaluation", "", "teacher a b evaluation"),
        # ... unless its result is known.
        ("a", "a", "teacher b evaluation a"),
        ("a", "a evaluation", "teacher b"),
        # An evaluation needs the folders of its training and of the teacher.
        ("b", "teacher a b", "teacher a evaluation"),
    ],
)
def test_what_is_left(tmp_path, here, known, left):
    runs = [
        make_run(tmp_path, "teacher"),
        make_run(tmp_path, "a", depends_on=("teacher",)),
        make_run(tmp_path, "b", depends_on=("teacher",)),
        make_run(tmp_path, "evaluation", depends_on=("teacher", "a")),
    ]
    assert unfinished(runs, here.split(), known.split()) == set(left.split())


def test_a_known_run_is_not_run_and_counts_with_its_iterations(tmp_path):
    runs = [make_run(tmp_path, "known", command=FAIL, iterations=7), make_run(tmp_path, "new")]
    finished = []
    states, shown = run_all(
        runs, known={"known": 7}, on_finished=lambda state: finished.append(state.run.name)
    )
    assert states["known"].reused and states["new"].is_done and "107/107 steps" in shown
    assert finished == ["new"] and not runs[0].folder.exists()


# ---- Kills ----------------------------------------------------------------------------------------

KILLED = """\
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from runs_case import SLOW, make_run, training
from era.runs.execute import execute
out = Path(sys.argv[1])
runs = [make_run(out, "done", command=training(out / "done", 1.0)), make_run(out, "slow", command=SLOW)]
execute(runs, jobs=1, cores=1, poll_seconds=0.05, go_on=True, reuse=True)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="a child ends with its parent on Linux alone")
def test_a_killed_call_leaves_no_process_behind_and_the_next_one_goes_on(tmp_path):
    script = (sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED))
    here = str(Path(runs_case.__file__).parent)  # where the script finds it
    call = subprocess.Popen((*script, str(tmp_path), here), stdout=subprocess.PIPE, text=True)
    log = tmp_path / "slow" / "train.log"
    deadline = time.monotonic() + 60
    while not log.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    children = Path(f"/proc/{call.pid}/task/{call.pid}/children").read_text().split()
    assert len(children) == 1 and alive(int(children[0]))
    call.send_signal(signal.SIGKILL)
    call.wait()
    call.stdout.close()
    deadline = time.monotonic() + 10
    while alive(int(children[0])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(children[0]))
    runs = [
        make_run(tmp_path, "done", command=FAIL),
        make_run(tmp_path, "slow", command=training(tmp_path / "slow", 2.0)),
    ]
    states, _ = run_all(runs, reuse=True)
    assert states["done"].reused and states["slow"].is_done and not states["slow"].reused


# ---- Memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_peak_memory_is_the_childs_own(tmp_path):
    """Not what this process, which started it and holds far more, has."""
    nap = "import time; b = bytearray({}); time.sleep(60)"
    runs = [
        make_run(tmp_path, name, command=(sys.executable, "-S", "-c", nap.format(size)))
        for name, size in (("small", 0), ("large", 90 << 20))
    ]
    processes = [start_process(run, 1) for run in runs]
    try:
        deadline = time.monotonic() + 20
        small = large = 0.0
        while large - small < 88 and time.monotonic() < deadline:  # it is still filling its memory
            time.sleep(0.05)
            small, large = (peak_memory(process.pid) or 0.0 for process in processes)
    finally:
        stop(processes)
    assert small < 50 and 85 < large - small < 95
    assert peak_memory(processes[0].pid) is None  # it has ended


def test_the_runs_own_command_is_what_the_log_begins_with(tmp_path):
    run = make_run(tmp_path, "run", command=PASS)
    assert start_process(run, 1).wait() == 0
    assert run.log.read_text() == f"$ {' '.join(PASS)}\n"
