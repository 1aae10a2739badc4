"""Studies with several seeds: the table worked by hand, and the options."""

import json

import pytest
from builders import REPO

from era.errors import UserError
from era.runs.plan import make_runs
from era.runs.schema import read_plan
from era.study.cli import find_plan, given_teacher, main, summarise, table


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Plain and ERA from two seeds, with made-up metrics: 100 and 150 ms a step."""
    monkeypatch.chdir(REPO)
    plan = read_plan(REPO / "studies" / "equal_time.yaml")
    runs = make_runs(plan, tmp_path, seeds=[1, 2], only=["era", "plain"])
    for run, ap in zip(runs[1:], (10.0, 12.0, 20.0, 23.0), strict=True):
        run.folder.mkdir()
        seconds = 0.1 if run.name.startswith("plain") else 0.15
        lines = [{"iteration": i, "time": seconds} for i in (59, 79, 99)]
        lines.append({"iteration": 99, "bbox/AP": ap, "bbox/AP50": ap, "bbox/AP75": ap})
        (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return plan, runs


def test_means_gains_and_steps(study):
    plan, runs = study
    plain, era = summarise(plan, runs)
    assert (plain.ap, plain.mean, plain.gain) == ((10.0, 12.0), 11.0, None)
    assert (era.ap, era.mean, era.gain) == ((20.0, 23.0), 21.5, 10.5)
    assert plain.step_ms == pytest.approx(100) and era.step_ms == pytest.approx(150)
    assert era.iterations == 600 and era.seeds == (1, 2)
    rows = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in table(plan, [plain, era]).splitlines()
    ]
    assert rows[0][4:] == ["AP, seed 1", "AP, seed 2", "mean", "gain", "over"]
    assert rows[2] == ["plain student", "nothing", "600", "100", "10.0", "12.0", "11.0", "–", ""]
    assert rows[3] == ["ERA", "nothing", "600", "150", "20.0", "23.0", "21.5", "+10.5", "plain student"]  # fmt: skip


def test_a_study_is_a_name_or_a_path(tmp_path):
    assert find_plan("parts", REPO) == REPO / "studies" / "parts.yaml"
    (tmp_path / "mine.yaml").touch()
    assert find_plan(str(tmp_path / "mine.yaml"), REPO) == tmp_path / "mine.yaml"
    with pytest.raises(UserError, match=r"no study 'part': name one of demo, equal_time, narrow"):
        main(["part"], root=REPO)


def test_a_given_teacher(tmp_path):
    plan = read_plan(REPO / "studies" / "parts.yaml")
    with pytest.raises(UserError, match=r"--teacher .* is no file"):
        main(["parts", "--teacher", str(tmp_path / "none.pth")], root=REPO)
    (tmp_path / "model_final.pth").touch()
    weights = tmp_path / "model_final.pth"
    assert given_teacher(plan, weights) == {"teacher": weights} and given_teacher(plan, None) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--jobs", "0"], "--jobs is 0"),
        (["--seeds", "1", "1"], "--seeds is"),
        (["--variants", "h1"], r"has no run h1: it has teacher, h64_p32"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        main(["narrow", "--output", str(tmp_path / "new"), *options], root=REPO)
    assert not (tmp_path / "new").exists()
