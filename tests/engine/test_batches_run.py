"""From training to a report with a student that is exported over batches and in one fixed shape."""

from __future__ import annotations

import importlib.util
import json

import pytest
from builders import REPO, cli, run_tool

from era.deploy.evaluate import evaluate_main
from era.deploy.export import export_main
from era.report.cli import report_main
from era_runtime.predict import main as predict_main

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="the extra deploy is not installed",
)
THRESHOLD = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.02"]  # a few steps give low scores


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """OUTPUT_DIR of a distilled Faster R-CNN."""
    folder = tmp_path_factory.mktemp("batches") / "run"
    done = run_tool(
        "train_net.py",
        *cli(tiny_data, folder, "SOLVER.MAX_ITER", "60", "SOLVER.BASE_LR", "0.02", *THRESHOLD),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def table(text: str) -> dict[str, list[str]]:
    """Rows of the printed AP table by their first column."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_trained_evaluated_exported_predicted_and_reported(run, tiny_data, tmp_path, capsys):
    triples = json.loads(tiny_data[1].replace("'", '"'))
    _, annotations, pictures = triples[1]
    with open(run / "metrics.json") as f:
        assert any("bbox/AP" in json.loads(line) for line in f)

    loose, fixed = tmp_path / "of_any_batch", tmp_path / "of_one_shape"
    # pictures of the data: generated ones may show a barely trained detector nothing
    common = ["--run", str(run), "--format", "onnx", "--parity-images", pictures]
    export_main([*common, "--batch", "any", "--output", str(loose)])
    export_main([*common, "--shape", "64x64", "--batch", "2", "--output", str(fixed)])
    told = capsys.readouterr().out
    assert "equal to eager on" in told and "trtexec --onnx=model.onnx" in told

    # AP beside eager proper; these pictures are of the shape, so that even the fixed model sees what eager sees
    arguments = ["--annotations", annotations, "--images", pictures, "--max-drop", "0.01"]
    assert evaluate_main([str(loose), str(fixed), *arguments]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["eager"][0] == rows[str(loose)][0] == rows[str(fixed)][0]

    by_model = {}
    for name, folder, batch in (("any", loose, "3"), ("fixed", fixed, "2"), ("one", loose, "1")):
        out = tmp_path / f"found_{name}"
        arguments = [
            "--model",
            str(folder),
            "--output",
            str(out),
            "--batch",
            batch,
            "--no-pictures",
        ]
        assert predict_main([*arguments, pictures]) == 0
        by_model[name] = json.loads((out / "results.json").read_text())
    scores = {name: [r["score"] for r in found] for name, found in by_model.items()}
    assert len(scores["one"]) > 0
    assert scores["any"] == pytest.approx(scores["one"], abs=1e-4)
    assert scores["fixed"] == pytest.approx(scores["one"], abs=1e-4)

    report_main([str(run), "--output", str(tmp_path / "report.html"), "--pictures", "0",
                 "--deployed", str(loose), str(fixed)])  # fmt: skip
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "of_any_batch" in page and "of_one_shape" in page


def test_the_command_of_the_tools_says_what_is_wrong_in_one_sentence(run, tmp_path):
    done = run_tool(
        "export.py",
        "--run",
        str(run),
        "--format",
        "onnx",
        "--batch",
        "4",
        "--output",
        str(tmp_path / "out"),
    )
    assert done.returncode == 2 and "--batch is 4 without --shape" in done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
    assert (REPO / "tools" / "export.py").is_file()
