"""Results that stand for runs whose folders are elsewhere."""

from __future__ import annotations

import dataclasses
import json

import pytest
from builders import REPO
from runs_case import make_run, metrics_lines

from era.errors import UserError
from era.runs.results import make_result, read_results, write_result
from era.runs.series import method_charts


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps of 250 ms, evaluated at 10 and then 20 AP; there was no large object."""
    run = make_run(tmp_path / "runs", "student")
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.json").write_text(metrics_lines(20.0, seconds=0.25))
    return run


def test_a_result_is_small_and_what_the_folder_says(tmp_path, run):
    result = make_result(run, "i" * 64, seconds=61.234, peak=512.04, commit="abc")
    assert result.ap == {
        **dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm"), 20.0),
        "APl": None,
    }
    assert result.curve == [[50, 10.0], [100, 20.0]] and result.step_ms == 250.0
    assert (result.iterations, result.seconds, result.peak_mib) == (100, 61.2, 512.0)
    assert result.commit == "abc" and result.machine
    path = write_result(tmp_path / "docs" / "results", result)
    assert path == tmp_path / "docs" / "results" / "student.json" and path.stat().st_size < 700
    assert "NaN" not in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["student.json"]
    assert read_results(path.parent, [run], {"student": "i" * 64}) == ({"student": result}, [])
    assert read_results(path.parent, [run], {"student": "other"}) == ({}, ["student"])
    assert read_results(tmp_path / "none", [run], {"student": "i" * 64}) == ({}, [])


def residuals(iteration: int, *values: float) -> dict:
    """What ERA logs: of e_0, e_1, ... at two levels, one above and one below the value."""
    found = {"iteration": iteration}
    for i, value in enumerate(values):
        found |= {f"era/p3/residual_e{i}": value + 0.1, f"era/p4/residual_e{i}": value - 0.1}
    return found


def test_a_result_keeps_where_the_methods_charts_end_and_the_memory_of_a_gpu(tmp_path, run):
    run = dataclasses.replace(run, methods=("ERA",))
    lines = [residuals(i, 9.0, 9.0) for i in range(3)]
    lines += [residuals(10 + i, 0.5 + 0.1 * i, 1 / 3) for i in range(5)]
    lines += [{"iteration": i, "gpu_memory_mib": mib} for i, mib in ((0, 10.0), (9, 2048.25), (19, 2048.25))]  # fmt: skip
    with open(run.folder / "metrics.json", "a") as file:
        file.write("".join("\n" + json.dumps(line) for line in lines))
    result = make_result(run, "i", seconds=1.0, peak=None, commit="abc")
    ((title, ends),) = result.charts.items()
    assert ends == {"0": 0.7, "1": 0.3333} and title == method_charts(("ERA",))[0].title
    assert result.gpu_mib == 2048.2
    write_result(tmp_path, result)
    assert read_results(tmp_path, [run], {"student": "i"}) == ({"student": result}, [])


def test_a_file_of_an_earlier_version_is_read(tmp_path, run):
    result = make_result(run, "i", seconds=1.0, peak=None, commit="abc")
    path = write_result(tmp_path, result)
    value = json.loads(path.read_text())
    del value["charts"], value["gpu_mib"]
    path.write_text(json.dumps(value))
    assert read_results(tmp_path, [run], {"student": "i"}) == ({"student": result}, [])


def test_the_results_of_the_repository_are_read():
    paths = sorted((REPO / "docs" / "results").glob("*/*.json"))
    for path in paths:
        run = make_run(path.parent, path.stem)
        found, _ = read_results(
            path.parent, [run], {run.name: json.loads(path.read_text())["identity"]}
        )
        assert list(found) == [path.stem]
    assert paths


def test_an_evaluation_is_read_from_its_log(tmp_path):
    run = make_run(tmp_path, "again", iterations=0)
    run.folder.mkdir()
    names, numbers = "AP,AP50,AP75,APs,APm,APl", "31.5,40.0,33.0,nan,30.0,32.0"
    run.log.write_text(f"copypaste: Task: bbox\ncopypaste: {names}\ncopypaste: {numbers}\n")
    result = make_result(run, "", seconds=None, peak=None, commit="abc")
    assert (result.ap["AP"], result.ap["APs"], result.ap["APl"]) == (31.5, None, 32.0)
    assert (result.curve, result.step_ms, result.peak_mib) == ([], None, None)


def test_a_run_without_an_evaluation_has_no_result(run):
    (run.folder / "metrics.json").write_text("")
    with pytest.raises(UserError, match="'student' left no evaluation"):
        make_result(run, "", seconds=1.0, peak=None, commit="abc")


@pytest.mark.parametrize(
    "change",
    [
        lambda value: "<<<<<<< HEAD",
        lambda value: "[]",
        lambda value: json.dumps({**value, "more": 1}),
        lambda value: json.dumps({**value, "identity": None}),
        lambda value: json.dumps({**value, "ap": {"AP": 1.0}}),
        lambda value: json.dumps({**value, "ap": {**value["ap"], "AP": "high"}}),
        lambda value: json.dumps({**value, "ap": 3}),
        lambda value: json.dumps({**value, "curve": [[1, 2, 3]]}),
        lambda value: json.dumps({**value, "curve": 5}),
        lambda value: json.dumps({**value, "charts": {"left": {"0": "much"}}}),
        lambda value: json.dumps({**value, "charts": [1]}),
        lambda value: json.dumps({**value, "gpu_mib": "all"}),
        lambda value: json.dumps({k: v for k, v in value.items() if k != "curve"}),
        lambda value: json.dumps({**value, "step_ms": "fast"}),
    ],
)
def test_a_file_that_is_no_result_is_named_and_kept(tmp_path, run, change):
    path = write_result(tmp_path, make_result(run, "i", seconds=1.0, peak=None, commit="abc"))
    text = change(json.loads(path.read_text()))
    path.write_text(text)
    with pytest.raises(
        UserError, match=r"student\.json is no result of a run: .* restore it"
    ) as error:
        read_results(tmp_path, [run], {"student": "i"})
    assert "\n" not in str(error.value) and path.read_text() == text


def test_a_folder_that_cannot_be_written(tmp_path, run):
    (tmp_path / "docs").write_text("a file")
    with pytest.raises(UserError, match=r"docs/student\.json cannot be written"):
        write_result(tmp_path / "docs", make_result(run, "i", seconds=1.0, peak=None, commit="abc"))
