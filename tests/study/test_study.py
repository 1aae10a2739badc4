"""Studies with several seeds: the tables worked by hand, the interval, and the options."""

import itertools
import json

import numpy as np
import pytest
from builders import REPO

from era.errors import UserError
from era.runs.plan import make_runs
from era.runs.results import make_result
from era.runs.schema import read_plan
from era.study.cli import find_plan, given_teacher, main
from era.study.figures import write_curves
from era.study.interval import LEVEL, bootstrap_interval
from era.study.page import page, size_table, table
from era.study.summary import summarise


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A teacher, plain and ERA from two seeds, with made-up metrics: 100 and 150 ms a step."""
    monkeypatch.chdir(REPO)
    plan = read_plan(REPO / "studies" / "equal_time.yaml")
    runs = make_runs(plan, tmp_path, seeds=[1, 2], only=["era", "plain"])
    results = {}
    for run, ap in zip(runs, (40.0, 10.0, 12.0, 20.0, 23.0), strict=True):
        run.folder.mkdir()
        seconds = 0.1 if run.name.startswith("plain") else 0.15
        lines = [{"iteration": i, "time": seconds} for i in (59, 79, 99)]
        for iteration, value in ((299, ap / 2), (599, ap)):
            names = {"AP": 0, "AP50": 10, "AP75": 5, "APm": 1, "APl": 2}
            lines.append(
                {"iteration": iteration} | {f"bbox/{n}": value + m for n, m in names.items()}
            )
        (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
        results[run.name] = make_result(run, run.name, seconds=90.0, peak=800.0 + ap, commit="")
    return plan, runs, results


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]


def test_means_gains_and_steps(study):
    teacher, plain, era = summarise(*study)
    assert teacher.is_teacher and teacher.gain is None and teacher.mean() == 40.0
    assert (plain.ap(), plain.mean(), plain.gain) == ([10.0, 12.0], 11.0, None)
    assert (era.ap(), era.mean(), era.differences) == ([20.0, 23.0], 21.5, (10.0, 11.0))
    assert era.gain == 10.5 and era.interval is None  # of two seeds there is none
    assert era.spread() == pytest.approx(np.sqrt(4.5)) and teacher.spread() is None
    assert plain.median("step_ms") == 100.0 and era.median("step_ms") == 150.0
    assert era.iterations == 600 and list(era.results) == [1, 2]
    rows = cells(table([teacher, plain, era]))
    assert rows[0][3:] == [
        "AP, seed 1", "AP, seed 2", "AP, mean", "spread", "gain", "95 % interval", "over", "ms a step", "peak MiB",
    ]  # fmt: skip
    assert rows[2] == [
        "teacher",
        "nothing",
        "900",
        "–",
        "–",
        "40.0",
        "–",
        "–",
        "–",
        "",
        "150",
        "840",
    ]
    assert rows[3] == ["plain student", "nothing", "600", "10.0", "12.0", "11.0", "1.4", "–", "–", "", "100", "811"]  # fmt: skip
    assert rows[4] == ["ERA", "nothing", "600", "20.0", "23.0", "21.5", "2.1", "+10.5", "–", "plain student", "150", "822"]  # fmt: skip
    sizes = cells(size_table([teacher, plain, era]))
    assert sizes[0] == ["variant", "AP50", "AP75", "APs", "APm", "APl"]
    assert sizes[2] == ["teacher", "50.0", "45.0", "–", "41.0", "42.0"]
    assert sizes[4] == ["ERA", "31.5 ± 2.1", "26.5 ± 2.1", "–", "22.5 ± 2.1", "23.5 ± 2.1"]


def test_what_is_missing_takes_nothing_else_away(study):
    plan, runs, results = study
    del results["era_seed1"], results["teacher"]
    teacher, _, era = entries = summarise(plan, runs, results)
    assert teacher.mean() is None and era.differences == (11.0,)  # the seed that both have
    text = page(plan, entries, {"era_seed1": "it failed"})
    assert "- Missing: era_seed1: it failed" in text and text.startswith(f"# {plan.title}\n")
    row = next(r for r in cells(text) if r[:1] == ["ERA"])
    assert row[3:8] == ["–", "23.0", "23.0", "–", "+11.0"]
    assert json.loads(json.dumps([entry.as_dict() for entry in entries]))[2]["differences"] == [
        11.0
    ]
    results["plain_seed2"].ap["AP"] = None  # it detected nothing
    assert summarise(plan, runs, results)[2].gain is None
    only = summarise(plan, runs, {})
    assert [entry.mean() for entry in only] == [None] * 3 and "| ERA" in table(only)


# ---- The interval ---------------------------------------------------------------------------------


def every_mean(values) -> np.ndarray:
    """The bootstrap's whole distribution: all n ** n draws, each equally likely."""
    return np.sort(
        [np.mean(sorted(draw)) for draw in itertools.product(values, repeat=len(values))]
    )


def test_of_three_seeds_the_interval_is_the_range():
    # One of 27 draws holds the smallest three times: 3.7 %, more than a tail of 2.5 %.
    assert bootstrap_interval([1.0, 4.0, 2.0]) == (1.0, 4.0)
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_interval([1.0, 4.0]) is None and bootstrap_interval([]) is None


@pytest.mark.parametrize(
    "values", [[0.5, -1.0, 2.0, 7.0], [1.0, 2.0, 3.0, 5.0, 9.0], [4.2, 3.9, 5.0, 4.4, 4.1, 4.0]]
)
def test_the_interval_against_all_draws_there_are(values):
    means = every_mean(values)
    found = bootstrap_interval(values)
    for bound, share in zip(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), strict=True):
        # 10,000 draws find a share to 0.0016 (one standard deviation of a share of 0.025).
        below = (means < bound - 1e-9).mean()
        upto = (means <= bound + 1e-9).mean()
        assert below - 0.007 <= share <= upto + 0.007
    assert bootstrap_interval(values) == found  # the same every time
    assert bootstrap_interval([v + 10 for v in values]) == pytest.approx([b + 10 for b in found])


# ---- The curves -----------------------------------------------------------------------------------


def test_curves_are_means_over_seeds(study, tmp_path):
    teacher, plain, era = summarise(*study)
    assert era.curve.tolist() == [[300.0, 600.0], [10.75, 21.5]]
    era.results[2].curve.pop(0)
    assert era.curve.tolist() == [[600.0], [21.5]]  # where every seed was evaluated
    assert write_curves([teacher, plain, era], tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    assert (
        text.startswith("<?xml") and "plain student" in text and "minutes of training steps" in text
    )
    assert ">teacher<" not in text
    assert not write_curves([teacher], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


# ---- The options ----------------------------------------------------------------------------------


def test_a_study_is_a_name_or_a_path(tmp_path):
    assert find_plan("full", REPO) == REPO / "studies" / "full.yaml"
    (tmp_path / "mine.yaml").touch()
    assert find_plan(str(tmp_path / "mine.yaml"), REPO) == tmp_path / "mine.yaml"
    with pytest.raises(
        UserError, match=r"no study 'part': name one of ablations, cascade, coco, demo"
    ):
        main(["part"], root=REPO)


def test_a_given_teacher(tmp_path):
    plan = read_plan(REPO / "studies" / "full.yaml")
    with pytest.raises(UserError, match=r"--teacher .* is no file"):
        main(["full", "--teacher", str(tmp_path / "none.pth")], root=REPO)
    (tmp_path / "model_final.pth").touch()
    weights = tmp_path / "model_final.pth"
    assert given_teacher(plan, weights) == {"teacher": weights} and given_teacher(plan, None) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--jobs", "0"], "--jobs is 0"),
        (["--seeds", "1", "1"], "--seeds is"),
        (["--variants", "h1"], r"has no run h1: it has teacher, plain"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        main(["full", "--output", str(tmp_path / "new"), *options], root=REPO)
    assert not (tmp_path / "new").exists()
