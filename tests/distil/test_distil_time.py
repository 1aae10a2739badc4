"""``--time``: each training's part of what is left, the time over several calls, and a machine that gets slower."""

import json
import time
from types import SimpleNamespace

import pytest
from distil_case import Forked, make_stranger

from era import compat
from era.distil import cli, clock, timing
from era.distil.clock import Clock, seconds_for
from era.engine import time_limit
from era.errors import UserError

PLANNED = {"teacher": 200.0, "distilled": 600.0, "evaluate": 30.0, "export": 60.0, "report": 10.0}


def test_the_time_that_is_left_is_shared_out_as_it_was_planned():
    # 0.98 * 1000 - 100 for what follows, in parts of 1 : 3
    assert seconds_for("teacher", 1000.0, PLANNED, {"prepare": 40.0}) == pytest.approx(840 / 4)
    used = {"prepare": 40.0, "teacher": 150.0}
    assert seconds_for("distilled", 1000.0, PLANNED, used) == pytest.approx(690)
    # a teacher that was stopped has a quarter of its part left
    assert seconds_for("teacher", 1000.0, PLANNED, used) == pytest.approx(690 * 50 / 650)
    # nothing is left, or a training has had its part
    assert seconds_for("distilled", 1000.0, PLANNED, {"teacher": 900.0}) == 0.0
    assert seconds_for("teacher", 1000.0, PLANNED, {"teacher": 201.0}) == 0.0


@pytest.fixture
def ticks(monkeypatch):
    """Seconds in ``now``."""
    ticks = SimpleNamespace(now=50.0)
    monkeypatch.setattr(clock, "clock", lambda: ticks.now)
    return ticks


def test_time_is_counted_over_all_calls(tmp_path, ticks):
    file = tmp_path / "time.json"
    with Clock(file) as first:
        first.add("prepare", 7.0)
        first.begin("teacher")
        ticks.now += 30.0
        assert first.snapshot() == {"prepare": 7.0, "teacher": 30.0}
        ticks.now += 5.0
    ticks.now += 10_000.0  # of the calendar
    with pytest.raises(KeyboardInterrupt), Clock(file) as second:
        second.begin("teacher")
        ticks.now += 2.0
        second.begin("distilled")
        ticks.now += 3.0
        raise KeyboardInterrupt
    found = json.loads(file.read_text())["seconds"]
    assert found == {"prepare": 7.0, "teacher": 37.0, "distilled": 3.0}


def test_a_command_that_is_killed_has_noted_its_time(tmp_path, ticks, monkeypatch):
    monkeypatch.setattr(clock, "BEAT", 0.01)
    file = tmp_path / "time.json"
    with Clock(file) as running:
        running.begin("teacher")
        ticks.now += 60.0
        for _ in range(1000):
            if json.loads(file.read_text())["seconds"].get("teacher") == 60.0:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("it was not written while it ran")


def test_a_file_that_is_none_is_told(tmp_path):
    (tmp_path / "time.json").write_text('{"seconds": [1]}')
    with pytest.raises(
        UserError, match=r"time.json cannot be read .*remove it to count the time anew"
    ):
        Clock(tmp_path / "time.json")


def test_a_slower_machine_does_not_make_it_late(tmp_path, monkeypatch, capsys):
    """Steps of 1 s when they were tried, and of 3 s on the clock of the training; stopped on the way, and gone on with."""
    stranger = make_stranger(tmp_path, pictures=6)
    args = stranger.args(tmp_path / "out", "--time", "4m")
    args[1] = str(
        stranger.folder / "era_toy" / "annotations" / "train.json"
    )  # the teacher's classes
    first = args.index("--opts")
    args = [*args[:first], *args[first + 6 + 4 :]]  # which would set the schedule
    assert "SOLVER.MAX_ITER" not in args
    monkeypatch.setattr(timing, "take_steps", lambda *_, **__: {"seconds": [1.0], "test_seconds": 0.1})  # fmt: skip
    slow, own = SimpleNamespace(now=0.0), compat.next_batch

    def next_batch(trainer):
        slow.now += 3.0
        return own(trainer)

    monkeypatch.setattr(compat, "next_batch", next_batch)
    monkeypatch.setattr(time_limit, "clock", lambda: slow.now)
    begun = []

    def start(run, threads, gpus):
        begun.append(run)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return Forked(run, threads, gpus)

    monkeypatch.setattr(cli, "go_on_process", start)
    with pytest.raises(SystemExit, match="130"):
        cli.main(args)
    before = json.loads((tmp_path / "out" / "time.json").read_text())["seconds"]
    assert before["prepare"] > 0 and before["distilled"] > 0
    capsys.readouterr()
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    assert [run.name for run in begun] == ["distilled", "distilled_best", "distilled_best"]
    assert (
        begun[0].command[-2] == "SOLVER.MAX_SECONDS"
        and "SOLVER.MAX_SECONDS" not in begun[2].command
    )
    seconds = int(begun[0].command[-1])
    planned = {
        name: s
        for name, _, s in json.loads((tmp_path / "out" / "distil.json").read_text())["steps"]
    }
    assert planned["distilled"] - 15 < seconds < planned["distilled"] + 15
    done, whole = time_limit.read_shortened(tmp_path / "out" / "distilled")
    assert seconds - 6 <= 3 * done <= seconds + 3 and whole > 2.5 * done
    assert f"shortened to {done:,} of {whole:,} steps, to be in time" in said
    assert f"of {done:,} iterations, the best of its evaluations" in said
    after = json.loads((tmp_path / "out" / "time.json").read_text())["seconds"]
    assert (
        after["distilled"] == before["distilled"] and after["evaluate"] > 0 and after["report"] > 0
    )
    assert "of the 4 min of --time" in said
