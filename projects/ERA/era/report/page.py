"""The whole page: sections, navigation, and the rules that keep a browser from loading anything."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from era.demo.figures import DETECTION_LOSSES, ERA_LOSSES, residual_series, series
from era.report import tables
from era.report.charts import Curve, line_chart
from era.report.tables import Scored
from era.runs.reading import TEACHER, ReportRun

EXPLANATION = (
    '<div class="explain"><h3>How to read the curves</h3><ul>'
    "<li>The detection loss is the student’s own, on the same terms for every run; what distillation adds "
    "to it is drawn apart.</li>"
    "<li>e₀ is the student’s feature map brought to the teacher’s channels; each branch of MBRNet adds a "
    "step, so e₁, e₂, … should come closer to the teacher’s features F_T, and all should fall with "
    "training.</li>"
    "<li>A lower residual is not a higher AP: the result above is what counts.</li></ul></div>"
)
TERMS = ("c1", "c4", "c0", "c2", "c3", "c5")  # colours of the loss terms
STEPS = 6  # colours of the residuals, from light to dark


@dataclass(frozen=True)
class Section:
    """One section; ``body`` is HTML, and an empty one is left out."""

    ident: str
    title: str
    lead: str
    body: str


def page(title: str, subtitle: str, sections: Sequence[Section], *, runs: int) -> str:
    """The HTML document, with style and script inside; ``runs`` is how many can be switched."""
    style, script = (_resource(name) for name in ("style.css", "script.js"))
    style += "".join(f".hide-m{i} .m{i} {{ display: none; }}\n" for i in range(runs))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is loaded, and no other script runs, even if a text were to slip through unescaped.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += "; base-uri 'none'; form-action 'none'"
    shown = [section for section in sections if section.body]
    links = "".join(f'<li><a href="#{s.ident}">{escape(s.title)}</a></li>' for s in shown)
    body = "".join(
        f'<section id="{s.ident}" aria-labelledby="{s.ident}-title"><h2 id="{s.ident}-title">'
        f"{escape(s.title)}</h2>{f'<p>{escape(s.lead)}</p>' if s.lead else ''}{s.body}</section>"
        for s in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>{body}</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def result(
    scored: Sequence[Scored], compared: int | None, notes: Sequence[str], caution: str = ""
) -> str:
    """The answer in a sentence and a few large numbers, then the table, then how to read it."""
    parts = [f'<p class="warning">{escape(caution)}</p>'] if caution else []
    if compared is not None:
        parts.append(verdict(scored, compared))
    parts.append(tables.headline(scored))
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(
            f'<details class="notes" open><summary>How to read it</summary><ul>{items}</ul></details>'
        )
    return "".join(parts)


def verdict(scored: Sequence[Scored], compared: int) -> str:
    """Baseline, compared run, gain, and the part of the way to the teacher, as tiles."""
    first, second = scored[0], scored[compared]
    before, after = (s.scores.get("AP", math.nan) for s in (first, second))
    gain = after - before
    tiles = [
        (first.name, tables.number(before), "AP"),
        (second.name, tables.number(after), "AP"),
        ("Gain", tables.signed(gain), "points"),
    ]
    teacher = next((s for s in scored if s.run.role == TEACHER), None)
    if teacher is not None:
        ceiling = teacher.scores.get("AP", math.nan)
        tiles.append((teacher.name, tables.number(ceiling), "AP"))
        if ceiling > before and math.isfinite(gain):
            part = 100 * gain / (ceiling - before)
            text = tables.number(part, ".0f").replace("-", "−")
            tiles.append(("Gap to the teacher closed", f"{text} %", "of the way"))
    cells = "".join(
        f"<div><dt>{name}</dt><dd><b>{value}</b> <span>{unit}</span></dd></div>"
        for name, value, unit in tiles
    )
    unequal = ""
    steps = [s.run.iterations for s in (first, second)]
    if None not in steps and steps[0] != steps[1]:
        unequal = (
            '<p class="warning">Not at equal iterations: '
            f"{escape(first.run.label)} {steps[0]:,d}, {escape(second.run.label)} {steps[1]:,d}.</p>"
        )
    if first.run.inherits != second.run.inherits:
        unequal += (
            '<p class="warning">Only one of the two started from the teacher’s heads, which moves AP by '
            "itself.</p>"
        )
    return f'<dl class="tiles">{cells}</dl>{unequal}'


def training(scored: Sequence[Scored]) -> str:
    """Charts of losses, residuals and, where several evaluations were made, AP."""
    charts = [
        line_chart(
            "Each model’s own detection loss",
            [_curve(s, DETECTION_LOSSES) for s in scored],
            y_label="loss (sum of 4 terms)",
        )
    ]
    evaluations = [_curve(s, [_ap_name(s.run)]) for s in scored]
    if any(len(curve.x) > 1 for curve in evaluations):
        charts.append(line_chart("AP during training", evaluations, y_label="box AP (points)"))
    by_run = [chart for s in scored for chart in (_terms(s), _residuals(s))]
    if any(by_run):
        charts.append(EXPLANATION)
    charts += by_run
    body = "".join(filter(None, charts))
    return f'<div class="charts">{body}</div>' if body else ""


def _terms(s: Scored) -> str:
    """What a method adds to the loss: every other loss that the run recorded."""
    if not s.run.methods:
        return ""
    names = sorted({k for m in s.run.metrics for k in m if k.startswith("loss_")})
    known = [n for n in ERA_LOSSES if n in names]
    others = [n for n in names if n not in (*DETECTION_LOSSES, *ERA_LOSSES)]
    curves = []
    for i, name in enumerate([*known, *others]):
        x, y = series(s.run.metrics, [name])
        label = ERA_LOSSES.get(name, name)
        dash = ("", "7 4", "2 3")[i // len(TERMS) % 3]
        curves.append(Curve(label, x, y, TERMS[i % len(TERMS)], dash))
    return line_chart(
        f"{s.run.label}: what distillation adds to the loss", curves, y_label="weighted loss"
    )


def _residuals(s: Scored) -> str:
    """Distance of every estimate to the teacher's features."""
    found = residual_series(s.run.metrics)
    curves = []
    for i, (x, y) in enumerate(found):
        shade = round(i * (STEPS - 1) / max(1, len(found) - 1))
        name = "e₀ (no branch)" if i == 0 else f"e{str(i).translate(_SUBSCRIPT)}"
        curves.append(Curve(name, x, y, f"r{shade}", ("", "8 3", "3 3")[i % 3]))
    return line_chart(
        f"{s.run.label}: what is left after each branch",
        curves,
        y_label="mean of (F_T − e_i)² over the FPN levels",
        log=True,
    )


_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _curve(s: Scored, names: Sequence[str]) -> Curve:
    x, y = series(s.run.metrics, names)
    return Curve(s.run.label, x, y, s.look, s.dash)


def _ap_name(run: ReportRun) -> str:
    names = run.cfg.DATASETS.TEST
    return "bbox/AP" if len(names) == 1 else f"{run.dataset}/bbox/AP"


def _resource(name: str) -> str:
    return files("era.report").joinpath(name).read_text(encoding="utf-8")
