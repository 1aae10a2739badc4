"""The report's tables as HTML. Every text that came from data is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from era.report.charts import swatch
from era.report.deployed import Deployed
from era.report.scores import CLASS, SIZES
from era.runs.measure import Measurement
from era.runs.reading import DISTILLED, TEACHER, ReportRun

NONE = "–"  # where a value is not known
CLEAR = 0.05  # points; a smaller difference is shown as none


@dataclass(frozen=True)
class Scored:
    """A run, its metrics, how it is drawn, and the run that its gain is counted from."""

    run: ReportRun
    scores: Mapping[str, float]  # points
    look: str  # class of the style sheet
    dash: str
    reference: Scored | None = None
    cost: Measurement | None = None

    @property
    def gain(self) -> float | None:
        """AP above the reference, in points; None without one."""
        if self.reference is None:
            return None
        return self.scores.get("AP", math.nan) - self.reference.scores.get("AP", math.nan)

    @property
    def name(self) -> str:
        """The label behind a piece of the run's line, as HTML."""
        return f'{swatch(self.look, self.dash)}<span class="who">{escape(self.run.label)}</span>'


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = ""
) -> str:
    """A table in a box of its own that scrolls; the cells are HTML already.

    Args:
        caption: plain text.
        head: HTML of the column headings; the first column heads the rows.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption, quote=True)}">'
        f'<table class="{kind}"><caption><span>{escape(caption)}</span></caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def number(value: float | None, form: str = ".1f") -> str:
    """A number as text, or a dash."""
    return NONE if value is None or not math.isfinite(value) else format(value, form)


def signed(value: float | None) -> str:
    """A difference in points, with a sign and a colour that says better or worse."""
    if value is None or not math.isfinite(value):
        return NONE
    if abs(value) < CLEAR:
        return '<span class="same">±0.0</span>'
    kind = "better" if value > 0 else "worse"
    return f'<span class="{kind}">{value:+.1f}</span>'.replace("-", "−")


def bar(value: float | None, look: str) -> str:
    """A number from 0 to 100 with a bar."""
    if value is None or not math.isfinite(value):
        return NONE
    return (
        f'<span class="bar"><b>{value:.1f}</b>'
        f'<i class="{look}" style="width:{min(max(value, 0), 100):.1f}%"></i></span>'
    )


def headline(scored: Sequence[Scored]) -> str:
    """One row a run: AP, gain, training and cost."""
    costs = any(s.cost for s in scored)
    head = ["Run", "AP", "Gain", "AP50", "AP75", "Method", "Inherited", "Iterations"]
    head += ["ms per<br>training step", *(("Parameters", "ms per<br>image") if costs else ())]
    rows = []
    for s in scored:
        run, ref = s.run, s.reference
        gain = signed(s.gain)
        if ref is not None:
            gain += f" <small>over {escape(ref.run.label)}</small>"
        methods = ", ".join(run.methods) if run.role != TEACHER else ""
        seconds = run.step_seconds
        row = [s.name, f"<strong>{number(s.scores.get('AP'))}</strong>", gain]
        row += [number(s.scores.get(metric)) for metric in ("AP50", "AP75")]
        row += [escape(methods) or NONE, "heads" if _inherits(run) else NONE]
        row += [number(run.iterations, ",d"), number(seconds and 1000 * seconds, ".0f")]
        if costs:
            cost = s.cost
            row += [number(cost and cost.parameters, ",d")]
            row += [number(cost and 1000 * cost.image_seconds)]
        rows.append(row)
    return table("All runs; AP is COCO box AP in points of 100", head, rows, kind="headline")


def by_size(scored: Sequence[Scored]) -> str:
    """AP by the size of the objects."""
    rows = [
        [escape(size), *(bar(s.scores.get(key), s.look) for s in scored)]
        for key, size in SIZES.items()
    ]
    return table("AP by object size", ["Size", *(s.name for s in scored)], rows, kind="bars")


def by_class(
    scored: Sequence[Scored],
    pair: tuple[Scored, Scored] | None,
    objects: Mapping[str, int] | None,
) -> str:
    """AP by class; with a pair (baseline, compared), the greatest change first.

    Args:
        objects: how many of each class the test set has, if known.
    """
    names = {k[len(CLASS) :] for s in scored for k in s.scores if k.startswith(CLASS)}
    if not names:
        return ""

    def change(name: str) -> float:
        if pair is None:
            return math.nan
        before, after = (s.scores.get(CLASS + name, math.nan) for s in pair)
        return after - before

    def rank(name: str) -> tuple:
        value = change(name)
        return (0, -value, name) if math.isfinite(value) else (1, 0.0, name)

    head = ["Class", *(["Objects"] if objects else []), *(s.name for s in scored)]
    rows = []
    for name in sorted(names, key=rank):
        row = [escape(name), *([number(objects.get(name), ",d")] if objects else [])]
        row += [bar(s.scores.get(CLASS + name), s.look) for s in scored]
        rows.append([*row, signed(change(name))] if pair else row)
    order = ""
    if pair:
        head.append("Change")
        order = f", the greatest change from {pair[0].run.label} to {pair[1].run.label} first"
    return table(f"AP by class{order}", head, rows, kind="bars")


def deployment(models: Sequence[Deployed], eager_ms: tuple[float, float, float] | None) -> str:
    """Size and latency of exported models; eager first if it was timed."""
    timed = eager_ms or next((m.milliseconds for m in models if m.milliseconds), None)
    first = timed[1] if timed else None

    def times(ms: tuple[float, float, float] | None) -> list[str]:
        if ms is None:
            return [NONE, NONE, NONE]
        return [number(ms[1]), f"{ms[0]:.1f} to {ms[2]:.1f}", f"{ms[1] / first:.2f}"]

    head = ["Format", "Precision", "Alpha", "Size, MB", "Median ms", "Quartiles, ms"]
    head += [f"Relative to {'eager' if eager_ms else 'the first'}", "Largest box difference, px"]
    rows = [["eager (PyTorch)", "float32", NONE, NONE, *times(eager_ms), NONE]] if eager_ms else []
    for m in models:
        folder = m.folder.name
        beside = f" <small>{escape(folder)}</small>" if folder != m.format else ""
        row = [escape(m.format) + beside, escape(m.precision)]
        row += [number(m.alpha, "g"), number(m.megabytes, ".2f"), *times(m.milliseconds)]
        rows.append([*row, _difference(m.box_difference)])
    if first is None:  # nothing was timed: no columns of dashes
        drop = range(4, 7)
        head = [h for i, h in enumerate(head) if i not in drop]
        rows = [[c for i, c in enumerate(row) if i not in drop] for row in rows]
    return table("Size and latency of the exported models", head, rows)


def settings(scored: Sequence[Scored]) -> str:
    """How each run was made: its most asked-for settings."""
    head = ["Run", "Folder", "Backbone depth", "FPN channels", "Iterations planned"]
    head += ["Images a step", "Learning rate", "Schedule", "Seed"]
    rows = []
    for s in scored:
        cfg = s.run.cfg
        if s.run.role == TEACHER and not s.run.metrics:  # known from its student's run alone
            rows.append([s.name, escape(s.run.folder.name), *[NONE] * (len(head) - 2)])
            continue
        solver = cfg.SOLVER
        row = [s.run.folder.name, cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.FPN.OUT_CHANNELS]
        row += [f"{solver.MAX_ITER:,d}", solver.IMS_PER_BATCH, f"{solver.BASE_LR:g}"]
        row += [solver.LR_SCHEDULER_NAME, cfg.SEED if cfg.SEED >= 0 else "random"]
        rows.append([s.name, *(escape(str(cell)) for cell in row)])
    return table("Main settings of each run", head, rows)


def _difference(pixels: float | None) -> str:
    """Eager and an exact export differ by rounding: how much of it is no news."""
    if pixels is not None and 0 < pixels < 0.001:
        return "below 0.001"
    return number(pixels, ".2g")


def _inherits(run: ReportRun) -> bool:
    return run.role != TEACHER and run.inherits


def compared_index(scored: Sequence[Scored]) -> int | None:
    """The run to hold against the first: the first distilled one after it, else the second student."""
    students = [i for i, s in enumerate(scored) if i > 0 and s.run.role != TEACHER]
    distilled = [i for i in students if scored[i].run.role == DISTILLED]
    return next(iter(distilled or students), None)
