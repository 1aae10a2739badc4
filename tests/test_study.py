"""Studies with several seeds: their runs, and the table worked by hand."""

import json

import pytest
from builders import REPO

from era.errors import UserError
from era.study.cli import STUDIES, choose, equal_time_variant, main, make_runs, markdown, summarise


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Plain and ERA from two seeds, with made-up metrics: 100 and 150 ms a step."""
    monkeypatch.chdir(REPO)
    runs = make_runs(STUDIES["equal_time"], [1, 2], tmp_path, None)
    for run, ap in zip(runs[1:], (10.0, 12.0, 20.0, 23.0), strict=True):
        run.folder.mkdir()
        seconds = 0.1 if run.name.startswith("plain") else 0.15
        lines = [{"iteration": i, "time": seconds} for i in (59, 79, 99)]
        lines.append({"iteration": 99, "bbox/AP": ap, "bbox/AP50": ap, "bbox/AP75": ap})
        (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return runs


def test_runs_depend_on_the_one_teacher(runs, tmp_path):
    assert [r.name for r in runs] == [
        "teacher", "plain_seed1", "plain_seed2", "era_seed1", "era_seed2",
    ]  # fmt: skip
    assert [r.depends_on for r in runs] == [None, None, None, "teacher", "teacher"]
    assert str(tmp_path / "teacher" / "model_final.pth") in runs[3].command
    assert [r.config.SEED for r in runs[1:]] == [1, 2, 1, 2]


def test_means_and_equal_time(runs):
    entries = summarise(STUDIES["equal_time"], [1, 2], runs)
    assert [e["mean"] for e in entries] == [11.0, 21.5]
    assert [e["step_ms"] for e in entries] == pytest.approx([100, 150])
    label, _, opts = equal_time_variant(entries)["plain_equal_time"]
    assert opts == ("SOLVER.MAX_ITER", str(round(entries[1]["iterations"] * 1.5)))
    assert "1.50 times" in label
    table = markdown(entries, [1, 2])
    assert "| 10.0 | 12.0 | 11.0 |" in table and table.count("|\n") == 4


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_has_a_config_that_loads(name, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    for run in make_runs(STUDIES[name], [1], tmp_path, None):
        assert run.config.SOLVER.MAX_ITER == run.iterations > 0


def test_a_teacher_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--teacher"):
        main(["parts", "--teacher", str(tmp_path / "none.pth")], root=REPO)


def test_some_variants():
    assert list(choose("narrow", ["h16_p8", "h16_p32"])) == ["h16_p32", "h16_p8"]
    assert choose("parts", None) == STUDIES["parts"]
    with pytest.raises(UserError, match="--variants names h1: the study narrow has h64_p32"):
        main(["narrow", "--variants", "h1"], root=REPO)
