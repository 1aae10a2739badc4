"""Overrides chosen on a split of their own: who is tried with what, and what is trained after it."""

from __future__ import annotations

import json
import shutil

import pytest
from builders import REPO
from detectron2.data import DatasetCatalog
from study_case import two_checkouts

from era.errors import UserError
from era.runs.plan import make_runs
from era.runs.schema import read_plan, with_chosen
from era.study.tuning import Choice, check_split, shared_picture, tries_plan, wanted

PLAN = """
title: Two ways
seeds: [1]
schedules: {short: 6, long: 12}
baseline: plain
results: docs/results/two
tune:
  dataset: era_toy_tune
  seeds: [7, 8]
  iterations: 4
  tries:
    plain: [{}, {SOLVER.BASE_LR: 0.01}]
    distilled: [{MODEL.ERA.FEATURE_WEIGHT: 2.0}, {MODEL.ERA.FEATURE_WEIGHT: 5.0, MODEL.ERA.RESIDUAL_WEIGHT: 3.0}]
runs:
  teacher: {label: Teacher, config: configs/toy/teacher.yaml, role: teacher}
  plain: {label: Plain, config: configs/toy/plain.yaml}
  distilled:
    label: Distilled
    config: configs/toy/era.yaml
    weights: {MODEL.TEACHER.WEIGHTS: teacher}
    overrides: {MODEL.ERA.FEATURE_WEIGHT: 9.0}
  again: {label: Again, evaluate: distilled, overrides: {MODEL.ERA.ALPHA: 1.0, MODEL.ERA.RESIDUAL_WEIGHT: 8.0}}
  pkd: {label: PKD, config: configs/toy/methods/pkd.yaml, weights: {MODEL.TEACHER.WEIGHTS: teacher}}
"""
AP = {
    "teacher": 60.0,
    "plain_try1": 10.0,
    "plain_try2": 10.0,
    "distilled_try1": 20.0,
    "distilled_try2": 30.0,
}
AP |= {f"{name}_{s}": 40.0 for name in ("plain", "distilled", "again", "pkd") for s in ("short", "long")}  # fmt: skip
TRIES = [f"{name}_try{t}_seed{s}" for name in ("plain", "distilled") for t in (1, 2) for s in (7, 8)]  # fmt: skip


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    with two_checkouts(tmp_path, monkeypatch, PLAN, AP) as found:
        yield found


def test_the_best_tries_are_what_the_study_trains(checkouts, capsys):
    here, there = checkouts
    assert here.study() == 0
    shown = capsys.readouterr().out
    assert "first 9 runs to choose from, then 9 to compare" in shown  # the teacher is among both
    started = [name for name in here.started if name != "teacher"]
    assert sorted(started[:8]) == sorted(TRIES) and len(here.started) == 1 + 8 + 8
    for name, run in here.started.items():
        is_try = name in TRIES
        assert (("era_toy_tune",) if is_try else ("era_toy_val",)) == run.config.DATASETS.TEST
        if is_try:
            assert run.iterations == 4 and run.config.TEST.EVAL_PERIOD == 0
    for schedule in ("short", "long"):
        plain, *of_era = (here.started[f"{n}_{schedule}_seed1"].config for n in ("plain", "distilled", "again"))  # fmt: skip
        # Of equals the first; in an evaluation, what is said there comes last.
        assert plain.SOLVER.BASE_LR == 0.03
        weights = [(cfg.MODEL.ERA.FEATURE_WEIGHT, cfg.MODEL.ERA.RESIDUAL_WEIGHT) for cfg in of_era]
        assert weights == [(5.0, 3.0), (5.0, 8.0)]
    assert {p.stem for p in here.results.iterdir()} == {*here.started}

    found = json.loads((here.root / "output/study/two/results.json").read_text())
    plain, distilled = found["tuning"]
    assert (plain["student"], plain["chosen"], distilled["chosen"]) == ("plain", 0, 1)
    assert distilled["tries"] == [
        {"overrides": {"MODEL.ERA.FEATURE_WEIGHT": "2.0"}, "ap": [27.0, 28.0], "mean": 27.5},
        {
            "overrides": {"MODEL.ERA.FEATURE_WEIGHT": "5.0", "MODEL.ERA.RESIDUAL_WEIGHT": "3.0"},
            "ap": [37.0, 38.0],
            "mean": 37.5,
        },
    ]
    text = (here.root / "output/study/two/table.md").read_text()
    assert "Chosen before, 2 tries each, by AP on `era_toy_tune` (mean over the seeds 7, 8)" in text
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["Plain", "as it stands", "chosen", "17.5"] in rows
    assert ["Distilled", "MODEL.ERA.FEATURE_WEIGHT 2.0", "", "27.5"] in rows

    assert here.study() == 0 and not here.started  # goes on, with nothing left to do
    there.results.mkdir(parents=True)
    for path in here.results.iterdir():
        shutil.copy(path, there.results)
    assert there.study() == 0 and not there.started
    assert (there.root / "output/study/two/table.md").read_text() == text

    # Another candidate, which wins: it is tried, and what it is for is trained again.
    there.write(PLAN.replace("FEATURE_WEIGHT: 2.0", "FEATURE_WEIGHT: 4.0"))
    there.ap = AP | {"distilled_try1": 50.0}
    assert there.study("--variants", "again_short") == 0
    expected = ["teacher", "distilled_try1_seed7", "distilled_try1_seed8", "distilled_short_seed1", "again_short_seed1"]  # fmt: skip
    assert sorted(there.started) == sorted(expected)
    assert there.started["again_short_seed1"].config.MODEL.ERA.FEATURE_WEIGHT == 4.0


def test_a_try_that_is_missing_holds_up_its_own_student_alone(checkouts, capsys):
    here, _ = checkouts
    here.failing = {"distilled_try2_seed8"}
    assert here.study() == 1
    shown = capsys.readouterr().out
    assert not {name for name in here.started if name.startswith(("distilled_s", "distilled_l", "again"))}  # fmt: skip
    assert {"plain_short_seed1", "plain_long_seed1", "pkd_long_seed1"} <= {*here.started}
    assert "5 of 17 runs are missing:" in shown
    assert "distilled_short_seed1: skipped, for not all tries of distilled are there" in shown
    assert "again_long_seed1: skipped, for not all tries of distilled are there" in shown
    here.failing = set()
    assert here.study() == 0
    assert len(here.started) == 5 and next(iter(here.started)) == "distilled_try2_seed8"


def test_fresh_trains_the_teacher_once(checkouts):
    here, _ = checkouts
    options = ("--variants", "distilled_short")
    assert here.study(*options) == 0
    first = [*here.started]
    assert here.study(*options, "--fresh") == 0
    assert sorted(here.started) == sorted(first) and first[0] == "teacher" and len(first) == 6


def test_what_is_reported_takes_no_part_in_a_choice(checkouts):
    here, _ = checkouts
    here.write(PLAN.replace("dataset: era_toy_tune", "dataset: era_toy_val"))
    with pytest.raises(
        UserError, match=r"tune.dataset 'era_toy_val' shares .*/val/000000.jpg with 'era_toy_val'"
    ):
        here.study()
    assert not here.started


def test_a_copy_of_a_picture_is_found_under_another_name(tmp_path, monkeypatch):
    found = {}
    pictures = {"one": (b"abcd", b"efgh"), "other": (b"wxyz", b"ijk"), "copies": (b"xx", b"wxyz")}
    for name, contents in pictures.items():
        (tmp_path / name).mkdir()
        for i, content in enumerate(contents):
            (tmp_path / name / f"{name}{i}.jpg").write_bytes(content)
        entries = [{"file_name": str(p)} for p in sorted((tmp_path / name).iterdir())]
        entries.append({"file_name": str(tmp_path / "not_there.jpg")})
        found[name] = entries
    monkeypatch.setattr(DatasetCatalog, "get", found.get)
    assert shared_picture("one", "other") is None
    assert shared_picture("copies", "other") == str(tmp_path / "copies" / "copies1.jpg")
    assert shared_picture("one", "one") == str(tmp_path / "one" / "one0.jpg")


def test_the_best_of_tries():
    candidates = (("A", "1"), ("A", "2"), ("A", "3"), ("A", "4"))
    choice = Choice("s", "S", candidates, ((None, 9.0), (3.0, 4.0), (5.0, 2.0), (1.0, 1.0)))
    assert choice.means == [None, 3.5, 3.5, 1.0]
    assert (choice.best, choice.overrides) == (1, ("A", "2"))
    assert Choice("s", "S", candidates[:2], ((None,), (None,))).best == 0


# ---- The entries ----------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads PLAN with one text replaced."""
    monkeypatch.chdir(REPO)

    def read(old="", new=""):
        assert old in PLAN
        (tmp_path / "plan.yaml").write_text(PLAN.replace(old, new, 1) if old else PLAN)
        return read_plan(tmp_path / "plan.yaml")

    return read


def test_a_choice_is_added_as_the_plan_was_read(read):
    plan = read()
    plan.file.write_text("edited meanwhile")
    chosen = with_chosen(plan, {"distilled": ("MODEL.ERA.FEATURE_WEIGHT", "5.0")})
    own = ("MODEL.ERA.FEATURE_WEIGHT", "9.0", "MODEL.ERA.FEATURE_WEIGHT", "5.0")
    assert chosen.variants["distilled_long"].overrides == (*own, "SOLVER.MAX_ITER", "12")
    assert chosen.variants["again_short"].overrides[:4] == own
    assert chosen.variants["pkd_short"] == plan.variants["pkd_short"]


def test_a_run_on_other_data_takes_a_choice_over(read, tmp_path):
    own = "  more: {label: More, config: configs/toy/era.yaml, weights: {MODEL.TEACHER.WEIGHTS: teacher}, tuned_as: distilled}\n"
    plan = read("  again:", f"{own}  again:")
    assert len(wanted(plan, ["more_long"])) == 2 and len(wanted(plan, None)) == 4
    chosen = with_chosen(plan, {"distilled": ("MODEL.ERA.FEATURE_WEIGHT", "5.0")})
    assert chosen.variants["more_long"].overrides[:2] == ("MODEL.ERA.FEATURE_WEIGHT", "5.0")
    with pytest.raises(
        UserError, match=r"runs\.more\.tuned_as is 'other': expected one of teacher"
    ):
        read("  again:", own.replace("as: distilled", "as: other") + "  again:")


def test_a_part_is_there_for_the_tries_too(read, tmp_path):
    plan = read(
        "  distilled:\n    label: Distilled\n    config: configs/toy/era.yaml\n    weights: {MODEL",
        "  part: {label: Part, config: configs/toy/methods/sskd_head.yaml, weights: {MODEL.TEACHER.WEIGHTS: teacher}, "
        "role: part}\n  distilled:\n    label: Distilled\n    config: configs/toy/methods/sskd.yaml\n"
        "    weights: {MODEL.SSKD.HEAD_WEIGHTS: part, MODEL",
    )
    runs = make_runs(tries_plan(plan), tmp_path, only=["distilled_try1"])
    assert [run.name for run in runs][:2] == ["teacher", "part"]


def test_only_what_is_asked_for_is_tried(read, tmp_path):
    plan = read()
    assert wanted(plan, ["pkd_short"]) == [] and len(wanted(plan, None)) == 4
    assert wanted(plan, ["again_long"]) == ["distilled_try1", "distilled_try2"]
    runs = make_runs(tries_plan(plan), tmp_path, only=wanted(plan, ["plain_long"]))
    assert [run.name for run in runs] == TRIES[:4]
    check_split(plan, make_runs(plan, tmp_path, only=["teacher"]))  # which is not compared


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("plain: [{}, {SOLVER.BASE_LR: 0.01}]", "plain: [{}, {}, {}]", "tries.distilled is 'a list of 2': expected 3 as plain has, for every run gets the same"),
        ("plain: [{}, {SOLVER.BASE_LR: 0.01}]", "plain: [{}]", r"tune.tries.plain is \[\{\}\]: expected a list of two or more"),
        ("plain: [{}, ", "teacher: [{}, ", "a name in tune.tries is 'teacher': expected one of plain, distilled, pkd"),
        ("plain: [{}, ", "again: [{}, ", "a name in tune.tries is 'again': expected one of plain"),
        ("{SOLVER.BASE_LR: 0.01}", "{SOLVER.MAX_ITER: 9}", "a key of tune.tries.plain is 'SOLVER.MAX_ITER': expected others"),
        ("{SOLVER.BASE_LR: 0.01}", "{DATASETS.TEST: [a]}", "a key of tune.tries.plain is 'DATASETS.TEST'"),
        ("{SOLVER.BASE_LR: 0.01}", "5", "tune.tries.plain is 5: expected a mapping"),
        ("seeds: [7, 8]", "seeds: []", "tune.seeds is missing: expected a list of different numbers"),
        ("seeds: [7, 8]", "seeds: [7, 7]", r"tune.seeds is \[7, 7\]"),
        ("iterations: 4", "iterations: 0", "tune.iterations is 0: expected a number of iterations"),
        ("  dataset: era_toy_tune\n", "", "tune.dataset is missing"),
        ("  dataset:", "  data:", "an entry of tune is 'data'"),
        ("{MODEL.TEACHER.WEIGHTS: teacher}\n", "{MODEL.WEIGHTS: plain}\n", "tune.tries.distilled is 'distilled': expected a run whose weights come from a teacher"),
        ("short: 6", "try1: 6", "the name of a run is 'plain_try1': expected another"),
    ],
)  # fmt: skip
def test_entries_that_do_not_fit(read, old, new, said):
    with pytest.raises(UserError, match=said) as error:
        read(old, new)
    assert "\n" not in str(error.value)
