"""The demo's last step: export a distilled student, time the formats, write ``report.html``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from era.demo.table import Row
from era.deploy.export import export
from era.deploy.formats import check_format
from era.deploy.source import load_source
from era.errors import UserError
from era.report.deployed import measure
from era.report.write import write_report
from era.runs.folder import remove
from era.runs.measure import Measurement
from era.runs.plan import Run

REPORT = "report.html"
DEPLOYED = "deployed"  # folder of the exports, below the demo's
FORMATS = ("torchscript", "onnx", "openvino")
CALLS = 30  # of each format, for its latency


def write_demo_report(
    runs: Sequence[Run],
    rows: Sequence[Row],
    output: Path,
    *,
    title: str,
    deployed: str,
    notes: Sequence[str] = (),
    caution: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Write the report of the demo's trainings, with exports of one student where they can be made.

    Args:
        runs: the students in the order in which they are shown, the baseline first; evaluations are left
            out.
        rows: of the demo's table, for parameters and time of the models.
        deployed: name of the run whose student is exported.
        caution: what a reader must know before the first number.
        say: told in a sentence why a format is not in the report.

    Raises:
        UserError: see :func:`era.report.write.write_report`.
    """
    by_name = {run.name: run for run in runs}
    students = [run for run in runs if run.iterations and not run.is_teacher]
    teacher = next((run.folder for run in runs if run.is_teacher), None)
    folders, latency = deploy(by_name[deployed], output / DEPLOYED, say)
    costs = {
        row.label: Measurement(row.parameters, row.image_ms / 1000)
        for row in rows
        if row.parameters is not None and row.image_ms is not None
    }
    return write_report(
        [run.folder for run in students],
        output / REPORT,
        labels=[run.label for run in students],
        teacher=teacher,
        deployed=folders,
        latency=latency or None,
        title=title,
        notes=notes,
        caution=caution,
        costs=costs,
    )


def deploy(
    run: Run, output: Path, say: Callable[[str], None]
) -> tuple[list[Path], dict[str, list[float]]]:
    """Export a run's student to every format whose runtime is there, and time them beside eager.

    Returns:
        The deployment folders, and milliseconds by folder and for eager; nothing if nothing was made.
    """
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
