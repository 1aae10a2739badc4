"""The demo's last step: the exports, and the report about its runs."""

from __future__ import annotations

import pytest
from report_case import make_runs

from era.demo import cli as demo_cli
from era.demo import report as report_demo
from era.demo import table as demo_table
from era.errors import UserError
from era.runs import plan as demo_runs


@pytest.fixture
def made(tmp_path):
    """The folders of three runs of a box detector."""
    return make_runs(tmp_path)


def test_the_demo_ends_with_the_report(made, tmp_path, monkeypatch):
    monkeypatch.setattr(
        report_demo, "deploy", lambda run, output, say: ([], {}) if run.name == "era" else None
    )
    assert demo_cli.report_page is report_demo
    names = {"teacher": "Teacher", "plain": "Plain student", "era": "ERA student"}
    trained = [demo_runs.Run(n, label, "", (), made[n], 100, 1.0) for n, label in names.items()]
    rows = [
        demo_table.Row(n, label, demo_runs.NOTHING, 100, 1.0, 1.0, 1.0, 12345, 250.0, 23.4)
        for n, label in names.items()
    ]
    path = report_demo.write_demo_report(trained, rows, ["SMOKE RUN"], tmp_path)
    text = path.read_text()
    assert path == tmp_path / "report.html" and path.name in demo_runs.PRODUCTS
    assert "SMOKE RUN" in text and text.count(">12,345<") == 3 and text.count(">23.4<") == 3


def test_a_missing_runtime_is_told_and_the_rest_is_exported(tmp_path, monkeypatch):
    import era.deploy.export
    import era.deploy.formats
    import era.deploy.source

    def check(name, *, int8):
        if name == "openvino":
            raise UserError("openvino is not installed.")

    class Source:
        def predictor(self):
            return "eager"

    monkeypatch.setattr(era.deploy.formats, "check_format", check)
    monkeypatch.setattr(era.deploy.source, "load_source", lambda run: Source())
    monkeypatch.setattr(era.deploy.export, "export", lambda *_: None)
    monkeypatch.setattr(report_demo, "measure", lambda folders, calls, eager: {eager: [1.0]})
    (tmp_path / "deployed").mkdir()  # of an earlier demo
    said = []
    run = demo_runs.Run("era", "ERA", "", (), tmp_path, 1, 1.0)
    folders, latency = report_demo.deploy(run, tmp_path / "deployed", said.append)
    assert [f.name for f in folders] == ["torchscript", "onnx"] and latency == {"eager": [1.0]}
    assert said == ["The report has no openvino: openvino is not installed."]
    assert not (tmp_path / "deployed").exists()
