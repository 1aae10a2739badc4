"""The pictures with boxes that can be switched on and off."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from era.report.examples import SHOWN_FROM, Comparison, Picture, rule
from era.report.overlay import TRUTH, Mark, name, name_size, place_tags, shape
from era.report.tables import Scored
from era.runs.compare import MIN_SCORE

KEY = '<p class="key">Solid: right. Dashed: wrong class or place, or found twice. White: the ground truth.</p>'


def gallery(
    comparison: Comparison,
    scored: Sequence[Scored],
    classes: Sequence[str],
    *,
    baseline: int,
    compared: int | None,
) -> str:
    """Switches, then the pictures in two groups: those that got better and those that got worse."""
    labels = [s.run.label for s in scored]
    first, second = labels[baseline], labels[compared] if compared is not None else None
    groups = {"": comparison.pictures}
    if second is not None:
        total = comparison.ahead + comparison.behind + comparison.equal
        ahead = [p for p in comparison.pictures if p.lead > 0]
        behind = [p for p in comparison.pictures if p.lead < 0]
        equal = [p for p in comparison.pictures if p.lead == 0]
        groups = {
            f"{second} does better than {first}": ahead,
            f"{second} does worse than {first}": behind,
            f"{second} does as well as {first}": equal,
        }
        summary = (
            f"Of all {total:,d} test images, {second} has the higher F1 in {comparison.ahead:,d}, "
            f"{first} in {comparison.behind:,d}; in {comparison.equal:,d} they are equal."
        )
    else:
        summary = "There is one run alone, so these are the images in which it does worst."
    shown = {baseline, compared} if compared is not None else {baseline}
    parts = [f"<p>{escape(summary)}</p>", KEY, controls(scored, shown)]
    for title, pictures in groups.items():
        if pictures:
            heading = f"<h3>{escape(title)}</h3>" if title else ""
            cards = "".join(
                card(p, scored, classes, shown, paired=second is not None) for p in pictures
            )
            parts.append(f'{heading}<ul class="cards">{cards}</ul>')
    hidden = " ".join(f"hide-m{i}" for i in range(len(scored)) if i not in shown)
    how = f"<details><summary>How these were chosen</summary><p>{escape(rule(first, second))}</p></details>"
    return f'<div id="gallery" class="{hidden}">{"".join(parts)}{how}</div>'


def controls(scored: Sequence[Scored], shown: set[int]) -> str:
    """A button for each kind of box, one for their names, and the slider for the score."""

    def button(target: str, look: str, label: str, pressed: bool) -> str:
        mark = (
            f'<svg class="chip" viewBox="0 0 22 14" aria-hidden="true"><rect class="paper" width="22" '
            f'height="14" rx="2"/><rect class="stroke {look}" x="3" y="3" width="16" height="8"/></svg>'
            if look
            else ""
        )
        state = "true" if pressed else "false"
        return (
            f'<button type="button" data-switch="{target}" aria-pressed="{state}">{mark}'
            f"<span>{escape(label)}</span></button>"
        )

    buttons = [button(TRUTH, "truth", "Ground truth", True)]
    buttons += [button(f"m{i}", s.look, s.run.label, i in shown) for i, s in enumerate(scored)]
    return (
        '<div class="controls"><div class="switches" role="group" aria-label="Boxes to show">'
        f"{''.join(buttons)}</div>"
        '<div class="tune"><label class="slide" for="threshold">Score from '
        f'<output id="threshold-value" for="threshold">{MIN_SCORE:.2f}</output>'
        f'<input id="threshold" type="range" min="{SHOWN_FROM}" max="0.95" step="0.05" '
        f'value="{MIN_SCORE}"></label>{button("names", "", "Names", True)}</div></div>'
    )


def card(
    picture: Picture,
    scored: Sequence[Scored],
    classes: Sequence[str],
    shown: set[int],
    *,
    paired: bool,
) -> str:
    """One picture, its boxes as SVG over it, and how many objects every run found."""
    marks = [Mark(box, TRUTH, "truth", True, classes[box.category]) for box in picture.objects]
    lines = []
    for i, (s, judged) in enumerate(zip(scored, picture.judged, strict=True)):
        pairs = sorted(zip(judged.boxes, judged.right, strict=True), key=lambda p: p[0].score)
        marks += [
            Mark(box, f"m{i}", s.look, right, f"{classes[box.category]} {box.score:.2f}")
            for box, right in pairs
        ]
        sure = [right for box, right in pairs if box.score >= MIN_SCORE]
        found = sum(sure)
        lines.append(
            f'<li class="m{i}" data-count="m{i}"><span class="who">{escape(s.run.label)}</span>'
            f'<span><b class="found">{found}</b> found, <b class="wrong">{len(sure) - found}</b> wrong'
            "</span></li>"
        )
    first = {f"m{i}" for i in shown}
    tags = place_tags(marks, picture.width, picture.height, first)
    size = name_size(picture.width, picture.height)
    # Names above all boxes: a box must not strike through another one's name.
    shapes = "".join(shape(mark, picture.width, picture.height) for mark in marks)
    names = "".join(name(mark, tag, size) for mark, tag in zip(marks, tags, strict=True))
    present = sorted({classes[box.category] for box in picture.objects})
    alt = f"Test image {picture.image_id} with {objects_text(len(picture.objects))}"
    alt += f": {', '.join(present)}" if present else ""
    lead = f"F1 {picture.lead:+.2f}".replace("-", "−") if paired else ""
    ratio = f"aspect-ratio:{picture.width}/{picture.height}"
    return (
        f'<li class="card"><figure><div class="photo" style="{ratio}">'
        f'<img src="{picture.data}" alt="{escape(alt, quote=True)}" loading="lazy" '
        f'width="{picture.width}" height="{picture.height}">'
        f'<svg viewBox="0 0 {picture.width} {picture.height}" aria-hidden="true">{shapes}{names}</svg></div>'
        f"<figcaption><p><strong>Image {picture.image_id}</strong>, {objects_text(len(picture.objects))}"
        f'<span class="lead">{lead}</span></p><ul class="counts">{"".join(lines)}</ul></figcaption>'
        "</figure></li>"
    )


def objects_text(count: int) -> str:
    """``1 object``, ``2 objects``."""
    return f"{count} object{'' if count == 1 else 's'}"
