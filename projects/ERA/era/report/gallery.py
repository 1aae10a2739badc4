"""The pictures with boxes that can be switched on and off."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from era.demo.compare import MIN_SCORE, Box
from era.report.examples import SHOWN_FROM, Comparison, Picture, rule
from era.report.tables import Scored

TRUTH = "truth"
# Corners of a box at which the runs write their names, so that these do not cover one another.
CORNERS = ("top-left", "bottom-left", "top-right", "bottom-right")


def gallery(
    comparison: Comparison,
    scored: Sequence[Scored],
    classes: Sequence[str],
    *,
    baseline: int,
    compared: int | None,
) -> str:
    """Switches, then the pictures in two groups: those that got better and those that got worse."""
    name = [s.run.label for s in scored]
    first, second = name[baseline], name[compared] if compared is not None else None
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
    parts = [f"<p>{escape(summary)}</p>", controls(scored, shown)]
    for title, pictures in groups.items():
        if pictures:
            heading = f"<h3>{escape(title)}</h3>" if title else ""
            cards = "".join(card(p, scored, classes, second is not None) for p in pictures)
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
    buttons.append(button("names", "", "Names", True))
    return (
        '<div class="controls"><div class="switches" role="group" aria-label="Boxes to show">'
        f"{''.join(buttons)}</div>"
        '<label class="slide" for="threshold">Score from '
        f'<output id="threshold-value" for="threshold">{MIN_SCORE:.2f}</output>'
        f'<input id="threshold" type="range" min="{SHOWN_FROM}" max="0.95" step="0.05" '
        f'value="{MIN_SCORE}"></label>'
        '<p class="key">Solid: right. Dashed: wrong class or place, or found twice. '
        "White: the ground truth.</p></div>"
    )


def card(picture: Picture, scored: Sequence[Scored], classes: Sequence[str], paired: bool) -> str:
    """One picture, its boxes as SVG over it, and how many objects every run found."""
    size = max(picture.width, picture.height) / 26  # of the names, pixels of the image
    shapes = [
        box_shape(b, TRUTH, "truth", classes, size, picture, right=True, corner="bottom-right")
        for b in picture.objects
    ]
    lines = []
    for i, (s, judged) in enumerate(zip(scored, picture.judged, strict=True)):
        corner = CORNERS[i % len(CORNERS)]
        pairs = sorted(zip(judged.boxes, judged.right, strict=True), key=lambda p: p[0].score)
        shapes += [
            box_shape(b, f"m{i}", s.look, classes, size, picture, right=right, corner=corner)
            for b, right in pairs
        ]
        sure = [
            right
            for b, right in zip(judged.boxes, judged.right, strict=True)
            if b.score >= MIN_SCORE
        ]
        found = sum(sure)
        lines.append(
            f'<li class="m{i}" data-count="m{i}"><span class="who">{escape(s.run.label)}</span>'
            f'<span><b class="found">{found}</b> found, <b class="wrong">{len(sure) - found}</b> wrong'
            "</span></li>"
        )
    present = sorted({classes[b.category] for b in picture.objects})
    alt = f"Test image {picture.image_id} with {len(picture.objects)} object(s)"
    alt += f": {', '.join(present)}" if present else ""
    lead = f"F1 {picture.lead:+.2f}".replace("-", "−") if paired else ""
    ratio = f"aspect-ratio:{picture.width}/{picture.height}"
    return (
        f'<li class="card"><figure><div class="photo" style="{ratio}">'
        f'<img src="{picture.data}" alt="{escape(alt, quote=True)}" loading="lazy" '
        f'width="{picture.width}" height="{picture.height}">'
        f'<svg viewBox="0 0 {picture.width} {picture.height}" aria-hidden="true">{"".join(shapes)}</svg></div>'
        f"<figcaption><p><strong>Image {picture.image_id}</strong>, {len(picture.objects)} object(s)"
        f'<span class="lead">{lead}</span></p><ul class="counts">{"".join(lines)}</ul></figcaption>'
        "</figure></li>"
    )


def box_shape(
    box: Box,
    group: str,
    look: str,
    classes: Sequence[str],
    size: float,
    picture: Picture,
    *,
    right: bool,
    corner: str,
) -> str:
    """A box with a dark rim and its name at one corner, kept inside the picture."""
    x0, y0, x1, y1 = box.corners
    x0, x1 = (min(max(0.0, v), picture.width) for v in (x0, x1))
    y0, y1 = (min(max(0.0, v), picture.height) for v in (y0, y1))
    frame = f'x="{x0:.1f}" y="{y0:.1f}" width="{max(0.0, x1 - x0):.1f}" height="{max(0.0, y1 - y0):.1f}"'
    is_truth = group == TRUTH
    text = classes[box.category] + ("" if is_truth else f" {box.score:.2f}")
    width, height = (len(text) * 0.58 + 0.5) * size, 1.25 * size
    x = x0 if corner.endswith("left") else x1 - width
    y = y0 - height if corner.startswith("top") else y1
    x = min(max(0.0, x), max(0.0, picture.width - width))
    y = min(max(0.0, y), max(0.0, picture.height - height))
    kind = "right" if right else "wrong"
    below = " below" if not is_truth and box.score < MIN_SCORE else ""
    return (
        f'<g class="box {group} {kind}{below}" data-score="{box.score:.4f}">'
        f'<rect class="rim" {frame}/><rect class="stroke {look}" {frame}/>'
        f'<g class="tag"><rect class="fill {look}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"/><text x="{x + size * 0.25:.1f}" y="{y + size * 0.93:.1f}" '
        f'font-size="{size:.1f}">{escape(text)}</text></g></g>'
    )
