"""A study's figures, read back as SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from study_case import entry

from era.methods.base import Chart
from era.study.figures import COLOURS, looks, write_charts, write_curves
from era.study.page import table

GAP = Chart(
    title="what is left",
    y_label="gap",
    pattern=r"gap_(?P<curve>\d+)",
    curve_name=lambda i: f"step {i}",
    log_scale=True,
    share="left in all",
)


def texts(path) -> list[str]:
    """Texts of a drawing, in the order in which they are drawn."""
    return [e.text for e in ElementTree.parse(path).iter() if e.tag.endswith("}text") and e.text]


def test_of_many_variants_the_best_comes_first(tmp_path):
    ends = [12.0, 30.0, 7.0, 41.0, 22.0, 9.0, 35.0, 28.0, 3.0, 18.0, 25.0, 38.0]
    entries = [entry(f"v{i}", [[100, ap / 2], [200, ap]], [[100, ap], [200, ap]]) for i, ap in enumerate(ends)]  # fmt: skip
    assert write_curves(entries, tmp_path / "curves.svg")
    legend = [t for t in texts(tmp_path / "curves.svg") if " the v" in t]
    best_first = sorted(range(12), key=lambda i: -ends[i])
    assert [t.split() for t in legend] == [[f"{ends[i]:.1f}", "the", f"v{i}"] for i in best_first]
    found = looks(entries)
    assert len({(look["color"], look["linestyle"]) for look in found.values()}) == 12
    # Two panels of twelve lines; single seeds are drawn where there are few alone.
    lines = re.compile(r"opacity: 0\.25").findall
    assert not lines((tmp_path / "curves.svg").read_text())
    assert write_curves(entries[:2], tmp_path / "few.svg")
    assert len(lines((tmp_path / "few.svg").read_text())) == 4


def test_where_charts_end_is_drawn_over_their_curves(tmp_path):
    curve = [[100, 5.0], [200, 10.0]]
    two = [{GAP.title: {"0": 0.5, "1": 0.4}}, {GAP.title: {"0": 0.7, "1": 0.2}}]
    one = [{GAP.title: {"0": 0.6}}]
    entries = [
        entry("plain", curve),
        entry("short", curve, charts=(GAP,), ends=one),
        entry("full", curve, curve, charts=(GAP,), ends=two),
    ]
    assert write_charts(entries, tmp_path / "charts.svg")
    found = texts(tmp_path / "charts.svg")
    assert {"what is left", "step 0", "step 1", "gap, at the end", "the short", "the full"} <= set(found)  # fmt: skip
    assert "the plain" not in found
    assert COLOURS[2].lower() in (tmp_path / "charts.svg").read_text()  # as in the other figure
    assert not write_charts(entries[:1], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_the_share_that_is_left_is_a_column_of_the_table():
    curve = [[100, 5.0], [200, 10.0]]
    two = [{GAP.title: {"0": 0.5, "1": 0.4}}, {GAP.title: {"0": 0.8, "1": 0.2}}]
    full = entry("full", curve, curve, charts=(GAP,), ends=two)
    assert full.ends(GAP) == {"0": pytest.approx(0.65), "1": pytest.approx(0.3)}
    assert full.share("left in all") == pytest.approx((0.8 + 0.25) / 2)
    old = entry("old", curve, charts=(GAP,))  # kept before there were ends
    alone = entry("alone", curve, charts=(GAP,), ends=[{GAP.title: {"0": 0.6}}])
    assert old.share("left in all") is alone.share("left in all") is None and old.ends(GAP) == {}
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table([full, old, alone]).splitlines()]  # fmt: skip
    assert rows[0][-1] == "left in all" and [row[-1] for row in rows[2:]] == ["52.5%", "–", "–"]
    assert "left in all" not in table([old, alone])
    assert full.as_dict()["shares"] == {"left in all": pytest.approx(0.525)}
