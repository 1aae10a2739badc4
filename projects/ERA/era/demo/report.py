"""The demo's last step: export the ERA student, time the formats, write ``report.html``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from era.demo.table import Row
from era.errors import UserError
from era.report.deployed import EAGER, measure
from era.report.write import write_report
from era.runs.measure import Measurement
from era.runs.plan import Run, remove

REPORT = "report.html"
DEPLOYED = "deployed"  # folder of the exports, below the demo's
FORMATS = ("torchscript", "onnx", "openvino")
SHOWN = ("plain", "era", "plain_init", "era_init")  # runs, the baseline first
CALLS = 30  # of each format, for its latency


def write_demo_report(
    runs: Sequence[Run],
    rows: Sequence[Row],
    notes: Sequence[str],
    output: Path,
    *,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the report of the demo's runs, with exports of the ERA student where they can be made.

    Args:
        rows: of the demo's table, for parameters and time of the models.
        say: told in a sentence why a format is not in the report.

    Raises:
        UserError: see :func:`era.report.write.write_report`.
    """
    by_name = {run.name: run for run in runs}
    shown = [by_name[name] for name in SHOWN if name in by_name]
    labels = {run.name: run.label for run in shown}
    folders, latency = (
        deploy(by_name["era"], output / DEPLOYED, say) if "era" in labels else ([], {})
    )
    costs = {
        row.label: Measurement(row.parameters, row.image_ms / 1000)
        for row in rows
        if row.parameters is not None and row.image_ms is not None
    }
    cautions = [note for note in notes if note.startswith("SMOKE RUN")]
    return write_report(
        [run.folder for run in shown],
        output / REPORT,
        labels=list(labels.values()),
        teacher=by_name["teacher"].folder if "teacher" in by_name else None,
        deployed=folders,
        latency=latency or None,
        title="ERA demo: distillation on generated pictures",
        notes=[note for note in notes if note not in cautions],
        caution=" ".join(cautions),
        costs=costs,
    )


def deploy(
    run: Run, output: Path, say: Callable[[str], None]
) -> tuple[list[Path], dict[str, list[float]]]:
    """Export a run's student to every format whose runtime is there, and time them beside eager.

    Returns:
        The deployment folders, and milliseconds by folder and for eager; nothing if nothing was made.
    """
    from era.deploy.export import export  # here: the report itself needs none of the runtimes
    from era.deploy.formats import check_format
    from era.deploy.source import load_source

    remove(output)
    try:
        source = load_source(run=str(run.folder))
    except UserError as e:
        say(f"The report has no exported models: {e}")
        return [], {}
    folders = []
    for name in FORMATS:
        try:
            check_format(name, int8=False)
            export(source, name, str(output / name))
        except UserError as e:
            say(f"The report has no {name}: {e}")
        else:
            folders.append(output / name)
    if not folders:
        return [], {}
    try:
        return folders, measure(folders, CALLS, eager=source.predictor())
    except UserError as e:
        say(f"The report has no latencies: {e}")
        return folders, {}


__all__ = ["DEPLOYED", "EAGER", "REPORT", "write_demo_report"]
