"""The charts of the training: losses, AP on the way, and what the methods themselves show."""

from __future__ import annotations

from collections.abc import Sequence

from era.report.charts import Curve, LineChart, line_chart
from era.report.looks import DASHES, ORDERED_LOOKS, TERM_LOOKS
from era.report.scored import Scored
from era.runs.reading import TASKS, scalar_prefix
from era.runs.series import chart_series, method_charts, method_losses, own_losses, series

VALIDATION_LOSS = "validation/total_loss"  # of TEST.LOSS
AP_OF = {"bbox": "Box AP", "segm": "Mask AP"}  # as a heading


def training_charts(scored: Sequence[Scored]) -> list[LineChart]:
    """Charts of all runs, then those of each distilled run."""
    own = [_curve(s, own_losses(s.run.metrics, s.run.methods)) for s in scored if s.run.metrics]
    charts = [
        line_chart(
            "Each model’s own detection loss",
            own,
            y_label="sum of the loss terms of the detector itself",
            ident="chart-own",
            note="The detector’s own loss, whose terms are the same for runs of one detector; what "
            "distillation adds to it is drawn apart.",
        )
    ]
    held_out = [_curve(s, [VALIDATION_LOSS]) for s in scored]
    if any(len(curve.x) > 1 for curve in held_out):
        charts.append(
            line_chart(
                "Each model’s own detection loss on the test pictures",
                held_out,
                y_label="sum of the loss terms of the detector itself",
                ident="chart-validation",
                note="Where it rises while the loss in training falls, a model learns its pictures by heart.",
            )
        )
    for task in TASKS:
        evaluations = [_curve(s, [f"{scalar_prefix(s.run.cfg)}{task}/AP"]) for s in scored]
        if any(len(curve.x) > 1 for curve in evaluations):
            charts.append(
                line_chart(
                    f"{AP_OF[task]} during training",
                    evaluations,
                    y_label="points of 100",
                    ident=f"chart-{task}",
                )
            )
    for index, s in enumerate(scored):
        charts.append(_added(s, f"chart-{index}-added"))
        charts += _of_methods(s, f"chart-{index}")
    return [chart for chart in charts if chart is not None]


def _added(s: Scored, ident: str) -> LineChart | None:
    """What the methods add to the loss, term by term."""
    terms = method_losses(s.run.metrics, s.run.methods)
    curves = []
    for i, (name, label) in enumerate(terms.items()):
        x, y = series(s.run.metrics, [name])
        dash = DASHES[i // len(TERM_LOOKS) % len(DASHES)]
        curves.append(Curve(label, x, y, TERM_LOOKS[i % len(TERM_LOOKS)], dash))
    title = f"{s.run.label}: what distillation adds to the loss"
    return line_chart(title, curves, y_label="weighted loss", ident=ident)


def _of_methods(s: Scored, ident: str) -> list[LineChart | None]:
    """What the run's methods have to show."""
    charts = []
    for number, chart in enumerate(method_charts(s.run.methods)):
        found = chart_series(s.run.metrics, chart)
        curves = []
        for i, (name, x, y) in enumerate(found):
            shade = round(i * (len(ORDERED_LOOKS) - 1) / max(1, len(found) - 1))
            curves.append(Curve(name, x, y, ORDERED_LOOKS[shade], DASHES[i % len(DASHES)]))
        charts.append(
            line_chart(
                f"{s.run.label}: {chart.title}",
                curves,
                y_label=chart.y_label,
                ident=f"{ident}-{number}",
                note=chart.explanation,
                log=chart.log_scale,
            )
        )
    return charts


def _curve(s: Scored, names: Sequence[str]) -> Curve:
    x, y = series(s.run.metrics, names)
    return Curve(s.run.label, x, y, s.look, s.dash)
