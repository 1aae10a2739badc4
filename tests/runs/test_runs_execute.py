"""Executing a plan's runs: the folder, the order, reuse, failures, progress. Runs are tiny processes."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs_case import SLOW, make_run, training

from era.errors import UserError
from era.runs import execute as execution
from era.runs import folder as folders
from era.runs.metrics import read_metrics, step_seconds, steps_done
from era.runs.plan import Run
from era.runs.process import go_on_command, go_on_process
from era.runs.progress import Progress
from era.runs.remaining import remaining_seconds


def write_metrics(folder: Path, lines: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- The folder ---------------------------------------------------------------------------------


def prepare(output: Path, *, reuse: bool = False):
    runs = [make_run(output, "student")]
    return folders.prepare_folder(output, runs=runs, products=["table.md"], reuse=reuse)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(UserError, match="no earlier call wrote"):
        prepare(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        prepare(tmp_path / "thesis.txt")


def test_earlier_results_are_replaced_but_nothing_else(tmp_path):
    out = tmp_path / "runs"
    prepare(out).close()
    (out / "student").mkdir()
    (out / "table.md").write_text("old")
    (out / "my_notes.txt").write_text("mine")
    prepare(out, reuse=True).close()
    assert (out / "student").exists() and not (out / "table.md").exists()
    prepare(out).close()
    assert {p.name for p in out.iterdir()} == {folders.MARKER, "my_notes.txt"}


def test_two_processes_do_not_share_a_folder(tmp_path):
    with prepare(tmp_path / "runs"), pytest.raises(UserError, match="another process"):
        prepare(tmp_path / "runs")


# ---- Order --------------------------------------------------------------------------------------


def execute(runs: list[Run], **options) -> tuple[dict[str, execution.State], str]:
    out = io.StringIO()
    defaults = {"jobs": 2, "cores": 2, "stream": out, "poll_seconds": 0.01}
    return execution.execute(runs, **{**defaults, **options}), out.getvalue()


def test_dependencies_and_the_longest_way_first(tmp_path):
    runs = [
        make_run(tmp_path, "short", iterations=10),
        make_run(tmp_path, "plain", iterations=200),
        make_run(tmp_path, "teacher", iterations=100),
        make_run(tmp_path, "student", depends_on=("teacher",), iterations=300),
        make_run(tmp_path, "eval", depends_on=("teacher", "student"), iterations=0),
    ]
    order, ended = [], {}

    def start(run, threads, gpus):
        assert threads == 2
        assert all(ended[name] == 0 for name in run.depends_on)
        order.append(run.name)
        process = execution.start_process(run, threads, gpus)
        ended[run.name] = process.wait()
        return process

    states, shown = execute(runs, jobs=1, start=start)
    # The teacher is short, but the student and its evaluation wait for it.
    assert order == ["teacher", "student", "plain", "short", "eval"]
    assert all(state.is_done for state in states.values())
    assert "610/610 steps" in shown and "student: done in" in shown


def test_no_more_than_jobs_run_at_a_time(tmp_path):
    nap = (sys.executable, "-c", "import time; time.sleep(0.3)")
    runs = [make_run(tmp_path, name, command=nap) for name in "abc"]
    alive, most = [], []

    def start(run, threads, gpus):
        process = execution.start_process(run, threads, gpus)
        alive.append(process)
        most.append(sum(p.poll() is None for p in alive))
        return process

    execute(runs, start=start)
    assert max(most) == 2


def test_equal_time_is_counted_in_measured_steps(tmp_path):
    def trains(name, milliseconds, **changes):
        lines = [{"iteration": i, "total_loss": 1.0, "time": milliseconds / 1000} for i in (59, 79)]
        text = "\n".join(map(json.dumps, lines))
        command = (
            sys.executable,
            "-c",
            f"open({str(tmp_path / name / 'metrics.json')!r}, 'w').write({text!r})",
        )
        return make_run(tmp_path, name, command=command, **changes)  # fmt: skip

    longer = make_run(
        tmp_path,
        "longer",
        command=(sys.executable, "-c", "pass", "OPTS"),
        depends_on=("slow1", "slow2", "fast"),
        time_of=("slow1", "slow2"),
        step_of=("fast",),
    )
    runs = [trains("slow1", 160), trains("slow2", 140), trains("fast", 100), longer]
    states, shown = execute(runs)
    # 100 steps of a median of 150 ms take as long as 150 of 100 ms.
    run = states["longer"].run
    assert run.iterations == 150 and "450/450 steps" in shown
    assert run.command[-3:] == ("OPTS", "SOLVER.MAX_ITER", "150")
    assert run.opts[-2:] == ("SOLVER.MAX_ITER", "150")
    (tmp_path / "fast" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"fast wrote no time of a step .* longer needs"):
        execution.with_iterations(longer, states)


# ---- Failures -----------------------------------------------------------------------------------


def test_a_failing_run_stops_the_others_and_is_one_sentence(tmp_path):
    bad = (sys.executable, "-c", "print('disk on fire'); raise SystemExit(3)")
    runs = [
        make_run(tmp_path, "bad", command=bad),
        make_run(tmp_path, "slow", command=SLOW),
        make_run(tmp_path, "after", depends_on=("bad",)),
    ]
    started = {}

    def start(run, threads, gpus):
        started[run.name] = execution.start_process(run, threads, gpus)
        return started[run.name]

    out = io.StringIO()
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"'bad' failed \(exit status 3\)") as error:
        execute(runs, start=start, stream=out)
    assert time.monotonic() - begin < 20
    assert started["slow"].poll() is not None and "after" not in started
    assert str(runs[0].log) in str(error.value) and "\n" not in str(error.value)
    assert "bad: disk on fire" in out.getvalue()
    assert not (runs[0].folder / folders.STAMP).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_children_and_says_how_to_go_on(tmp_path, capsys, request, number):
    runs = [make_run(tmp_path, name, command=SLOW) for name in "ab"]
    started = []

    def start(run, threads, gpus):
        started.append(execution.start_process(run, threads, gpus))
        return started[-1]

    # a shell's background job ignores SIGINT, and so would what it runs
    request.addfinalizer(
        functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    with pytest.raises(SystemExit) as left, execution.interruptible(tmp_path):
        execute(runs, start=start)
    assert left.value.code == 130 and signal.getsignal(signal.SIGTERM) == before
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert "--reuse goes on from there" in capsys.readouterr().err


# ---- Reuse --------------------------------------------------------------------------------------


def test_reuse_keeps_what_is_complete_and_unchanged(tmp_path):
    def trains(name, **changes):
        command = training(tmp_path / name, 1.0)
        return make_run(tmp_path, name, **{"command": command, **changes})

    runs = [trains("teacher"), trains("student", depends_on=("teacher",)), trains("plain")]
    execute(runs)

    def reused(runs):
        states, _ = execute(runs, reuse=True)
        return {name for name, state in states.items() if state.reused}

    assert reused(runs) == {"teacher", "student", "plain"}
    # Another setting: the run is done again, and so is what builds upon it.
    other = dataclasses.replace(runs[0], opts=("SOLVER.BASE_LR", "0.5"))
    assert reused([other, *runs[1:]]) == {"plain"}
    # Complete by its stamp, but its model is gone.
    (tmp_path / "plain" / "student" / "model_final.pth").unlink()
    assert reused([other, *runs[1:]]) == {"teacher", "student"}
    # A stamp that is no stamp.
    (tmp_path / "teacher" / folders.STAMP).write_text("[]")
    assert reused([other, *runs[1:]]) == {"plain"}


def test_a_reused_run_of_equal_time_is_what_it_was(tmp_path):
    slow, fast = (
        make_run(tmp_path, name, command=training(tmp_path / name, 1.0, seconds=seconds))
        for name, seconds in (("slow", 0.3), ("fast", 0.2))
    )
    longer = make_run(
        tmp_path,
        "longer",
        command=training(tmp_path / "longer", 1.0, iterations=150),
        depends_on=("slow", "fast"),
        time_of=("slow",),
        step_of=("fast",),
    )
    made, again = (execute([slow, fast, longer], reuse=True)[0]["longer"] for _ in range(2))
    assert again.reused and not made.reused
    assert again.run == made.run and again.run.iterations == 150
    assert again.run.command[-2:] == ("SOLVER.MAX_ITER", "150")
    assert again.step_seconds == 0.1


# ---- Progress -----------------------------------------------------------------------------------


def test_progress_from_metrics(tmp_path):
    lines = [{"iteration": i, "total_loss": 1.0, "time": 0.25} for i in range(19, 100, 20)]
    lines[0]["time"] = 9.0  # the first steps are slow and do not count
    write_metrics(tmp_path, lines)
    with open(tmp_path / "metrics.json", "a") as f:
        f.write('{"iteration": 119, "total')  # being written
    metrics = read_metrics(tmp_path)
    assert steps_done(metrics) == 100
    assert step_seconds(metrics) == 0.25
    assert step_seconds(metrics[:1]) == 9.0
    assert step_seconds([]) is None and steps_done([]) == 0


def test_a_log_file_gets_a_line_now_and_then_without_control_characters():
    out = io.StringIO()
    progress = Progress(1000, 100, out)
    for done in range(100, 400):
        progress.show(1000, done, 754.2, "student 3/8")
    progress.say("teacher: done in 3 s")
    progress.show(1200, 1200, 754.2, "student evaluating")
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) < 6 and "teacher: done in 3 s" in lines
    assert lines[0].startswith("100/1000 steps [00:00")
    assert lines[-1] == "1200/1200 steps [00:00, about 12:34 left, student evaluating]"
    assert all(line.isprintable() for line in lines)


def test_a_terminal_gets_one_line_that_renews_itself():
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    out = Terminal()
    progress = Progress(1000, 0, out)
    progress.show(1000, 250, None, "teacher 250/900, plain 0/100")
    progress.show(1000, 260, None, "teacher 260/900, plain 0/100")
    progress.close()
    assert out.getvalue().count("\n") == 1 and out.getvalue().count("\r") >= 3
    assert "260/1000" in out.getvalue() and "about ? left, teacher 260/900" in out.getvalue()


def test_the_remaining_time_follows_who_waits_for_whom(tmp_path):
    runs = [
        make_run(tmp_path, "teacher", iterations=1000),
        make_run(tmp_path, "plain", iterations=600),
        make_run(tmp_path, "distilled", depends_on=("teacher",), iterations=600),
        make_run(
            tmp_path,
            "longer",
            depends_on=("plain", "distilled"),
            time_of=("distilled",),
            step_of=("plain",),
        ),
        make_run(tmp_path, "eval", depends_on=("distilled",), iterations=0),
    ]
    states = {run.name: execution.State(run) for run in runs}
    assert remaining_seconds(states, 2) is None

    def runs_at(name, steps, seconds):
        states[name].process, states[name].steps = "running", steps
        states[name].step_seconds = seconds

    runs_at("teacher", 500, 0.4)
    runs_at("plain", 300, 0.2)
    # 500 steps of the teacher, then 600 of the mean of both, 0.3 s, and as long again: 200 + 180 + 180.
    assert remaining_seconds(states, 2) == pytest.approx(560)
    # One at a time: the plain run's other 300 steps come on top.
    assert remaining_seconds(states, 1) == pytest.approx(620)
    states["plain"].seconds = 150.0  # complete: 120 s of steps, and 30 s that others take too
    assert remaining_seconds(states, 2) == pytest.approx(200 + 2 * (30 + 180))
    # What failed, and what is skipped for it, takes no time.
    states["teacher"].problem = states["distilled"].problem = states["longer"].problem = "no"
    states["eval"].problem = "no"
    assert remaining_seconds(states, 2) == 0


def test_a_waiting_run_is_not_shown_and_one_without_steps_left_evaluates(tmp_path):
    state = execution.State(make_run(tmp_path, "student"), steps=40)
    assert state.where == "student 40/100" and not state.is_running
    assert dataclasses.replace(state, steps=100).where == "student evaluating"
    state.process = subprocess.Popen([sys.executable, "-c", "pass"])
    state.process.wait()
    assert state.is_running and not state.is_done


def test_a_run_goes_on_at_its_checkpoint_or_begins_anew(tmp_path):
    """Its folder and log stay where there is a checkpoint to resume from, and go where there is none."""
    tell = "import sys; print('told', *sys.argv[1:])"
    run = make_run(tmp_path, "a", command=(sys.executable, "-c", tell, "--config-file", "c.yaml"))
    for files, expected in (
        ((), "told --config-file c.yaml"),
        (("last_checkpoint",), "told --resume --config-file c.yaml"),
    ):
        run.folder.mkdir(exist_ok=True)
        run.log.write_text("before\n")
        for name in files:
            (run.folder / name).touch()
        assert go_on_process(run, 1).wait() == 0
        text = run.log.read_text()
        assert text.splitlines()[-1] == expected and text.startswith("before") == bool(files)
    evaluation = make_run(tmp_path, "a", iterations=0, evaluates="b", command=run.command)
    assert go_on_command(evaluation) == run.command  # it is done again
