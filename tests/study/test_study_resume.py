"""A whole study of tiny processes: stopped, mended, and taken to another checkout."""

from __future__ import annotations

import json

import pytest
from study_case import two_checkouts

from era.errors import UserError
from era.study.cli import argument_parser

PLAN = """
title: Two ways
seeds: [1, 2, 3]
baseline: plain
results: docs/results/two
runs:
  teacher: {label: Teacher, config: configs/toy/teacher.yaml, role: teacher}
  plain: {label: Plain, config: configs/toy/plain.yaml}
  distilled: {label: Distilled, config: configs/toy/era.yaml, weights: {MODEL.TEACHER.WEIGHTS: teacher}}
"""
AP = {"teacher": 50.0, "plain": 10.0, "distilled": 20.0}


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    with two_checkouts(tmp_path, monkeypatch, PLAN, AP) as found:
        yield found


ALL = ["teacher", *(f"{v}_seed{s}" for v in ("plain", "distilled") for s in (1, 2, 3))]


def test_a_failure_then_mended_then_elsewhere_then_another_setting(checkouts, capsys):
    here, there = checkouts
    here.failing = {"plain_seed2"}
    assert here.study() == 1
    shown = capsys.readouterr().out
    assert "plain_seed2: disk on fire" in shown and "1 of 7 runs are missing:" in shown
    assert "'plain_seed2' failed (exit status 3)" in shown.split("are missing:")[1]
    assert sorted(here.started) == sorted(ALL)
    assert {p.stem for p in here.results.iterdir()} == {*ALL} - {"plain_seed2"}
    table = (here.root / "output/study/two/table.md").read_text()
    assert "Missing: plain_seed2: the run 'plain_seed2' failed" in table

    here.failing = set()
    assert here.study() == 0 and list(here.started) == ["plain_seed2"]
    found = json.loads((here.root / "output/study/two/results.json").read_text())
    teacher, plain, distilled = found["variants"]
    assert teacher["mean"]["AP"] == 50.0 and plain["ap"]["AP"] == [11.0, 12.0, 13.0]
    assert (distilled["gain"], distilled["interval"]) == (10.0, [10.0, 10.0])
    assert found["missing"] == {} and (here.root / "output/study/two/curves.svg").is_file()
    assert "+10.0 to +10.0" in capsys.readouterr().out

    # Another checkout has the results alone: nothing is trained, the table is the same.
    there.results.mkdir(parents=True)
    for path in here.results.iterdir():
        (there.results / path.name).write_bytes(path.read_bytes())
    assert there.study() == 0 and list(there.started) == []
    assert "7 of 7 results are in docs/results/two" in capsys.readouterr().out
    same = (there.root / "output/study/two/table.md").read_text()
    assert same == (here.root / "output/study/two/table.md").read_text()

    # One result fewer: that student is trained, and for its sake the teacher, whose result stays.
    (there.results / "distilled_seed3.json").unlink()
    before = (there.results / "teacher.json").read_bytes()
    assert there.study() == 0 and list(there.started) == ["teacher", "distilled_seed3"]
    assert (there.results / "teacher.json").read_bytes() == before

    # Another setting of the plain student.
    there.write(PLAN.replace("plain.yaml}", "plain.yaml, overrides: {SOLVER.BASE_LR: 0.5}}"))
    assert there.study() == 0 and list(there.started) == [
        "plain_seed1",
        "plain_seed2",
        "plain_seed3",
    ]
    assert "plain_seed1.json is of other settings" in capsys.readouterr().out


def test_results_that_are_lost_are_written_again_from_the_folder(checkouts, monkeypatch):
    here, _ = checkouts
    monkeypatch.setattr("era.environment.commit", lambda: "the code that ran")
    assert here.study("--seeds", "1") == 0
    before = json.loads((here.results / "plain_seed1.json").read_text())
    assert before["commit"] == "the code that ran"
    monkeypatch.setattr("era.environment.commit", lambda: "the code of today")
    (here.results / "plain_seed1.json").unlink()
    assert here.study("--seeds", "1", "--resume") == 0 and list(here.started) == []
    assert json.loads((here.results / "plain_seed1.json").read_text()) == before
    assert here.study("--seeds", "1", "--fresh", "--variants", "plain") == 0
    assert list(here.started) == ["plain_seed1"]


def test_results_of_an_earlier_version_get_their_charts_from_the_folder(checkouts):
    here, there = checkouts
    assert here.study("--seeds", "1") == 0
    kept = here.results / "distilled_seed1.json"
    before = json.loads(kept.read_text())
    assert before["charts"] == {}
    there.results.mkdir(parents=True)
    (there.results / kept.name).write_bytes(kept.read_bytes())
    with open(here.root / "output/study/two/distilled_seed1/metrics.json", "a") as file:
        file.write('\n{"iteration": 99, "era/p3/residual_e0": 0.5, "era/p3/residual_e1": 0.25}\n')
    assert here.study("--seeds", "1") == 0 and not here.started
    after = json.loads(kept.read_text())
    ((_, ends),) = after.pop("charts").items()
    assert ends == {"0": 0.5, "1": 0.25} and after == {k: before[k] for k in after}
    text = (here.root / "output/study/two/table.md").read_text()
    assert "left after the branches" in text and "50.0%" in text
    assert (here.root / "output/study/two/charts.svg").is_file()
    # Where the folder is not, the result stands as it is.
    assert there.study("--seeds", "1") == 0 and "distilled_seed1" not in there.started


def test_on_gpus_there_are_as_many_runs_at_a_time_each_on_its_own(checkouts, capsys, monkeypatch):
    here, _ = checkouts
    assert here.study("--seeds", "1") == 0 and {*here.lent.values()} == {None}
    monkeypatch.setattr("era.study.cli.usable_gpus", lambda: ("4", "6"))
    assert here.study("--fresh") == 0
    assert "2 runs at a time on the GPUs 4, 6" in capsys.readouterr().out
    assert {*here.lent.values()} == {("4",), ("6",)} and len(here.lent) == 7


def test_what_needs_a_failed_teacher_is_skipped_by_name(checkouts, capsys):
    here, _ = checkouts
    here.failing = {"teacher"}
    assert here.study("--seeds", "1") == 1
    assert sorted(here.started) == ["plain_seed1", "teacher"]
    assert "distilled_seed1: skipped, for it needs teacher" in capsys.readouterr().out


def test_a_broken_result_stops_the_study_before_anything_runs(checkouts):
    here, _ = checkouts
    here.results.mkdir(parents=True)
    (here.results / "teacher.json").write_text("<<<<<<< HEAD")
    with pytest.raises(UserError, match=r"teacher\.json is no result of a run"):
        here.study()
    assert list(here.started) == []


def test_help_says_that_it_goes_on():
    text = " ".join(argument_parser().format_help().split())
    assert "The same command goes on after a stop" in text and "the exit status is 1" in text
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["two", "--fresh", "--reuse"])


CHAIN = """
title: A part first
seeds: [1]
baseline: plain
results: docs/results/two
runs:
  teacher: {label: Teacher, config: configs/toy/teacher.yaml, role: teacher}
  head: {label: Head, config: configs/toy/era.yaml, weights: {MODEL.TEACHER.WEIGHTS: teacher}, role: part}
  plain: {label: Plain, config: configs/toy/plain.yaml}
  chained: {label: Chained, config: configs/toy/era.yaml, weights: {MODEL.TEACHER.WEIGHTS: teacher, MODEL.WEIGHTS: head}}
"""


def test_a_part_is_trained_once_for_those_that_need_it_and_has_no_row(checkouts, capsys):
    here, there = checkouts
    for own in checkouts:
        own.ap = {"teacher": 50.0, "plain": 10.0, "chained": 20.0, "head": 0.0}
        own.write(CHAIN)
    here.failing = {"chained_seed1"}
    assert here.study() == 1 and "head" in here.started
    here.failing = set()
    assert here.study() == 0 and list(here.started) == [
        "chained_seed1"
    ]  # it goes on after the part
    found = json.loads((here.root / "output/study/two/results.json").read_text())
    assert [v["name"] for v in found["variants"]] == ["teacher", "plain", "chained"]
    assert {p.stem for p in here.results.iterdir()} == {"teacher", "plain_seed1", "chained_seed1"}

    there.results.mkdir(parents=True)
    for path in here.results.iterdir():
        (there.results / path.name).write_bytes(path.read_bytes())
    capsys.readouterr()
    assert there.study() == 0 and list(there.started) == []
    assert "3 of 3 results" in capsys.readouterr().out
    (there.results / "chained_seed1.json").unlink()
    assert there.study() == 0 and list(there.started) == ["teacher", "head", "chained_seed1"]


def test_a_part_can_be_asked_for_by_itself(checkouts):
    here, _ = checkouts
    here.ap = {"teacher": 50.0, "head": 0.0}
    here.write(CHAIN)
    assert here.study("--variants", "head") == 0 and list(here.started) == ["teacher", "head"]
    assert {p.stem for p in here.results.iterdir()} == {"teacher"}
    assert here.study("--variants", "head") == 0 and list(here.started) == []
