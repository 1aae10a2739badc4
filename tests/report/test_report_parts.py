"""The parts of the HTML report: scores, pictures, charts, overlays, sizes of exports."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from report_case import EVIL, make_deployed, make_runs, rle

from era.errors import UserError
from era.report import charts, deployed, examples, page, scored
from era.report.overlay import Mark, outline, place_tags
from era.runs import compare, dataset
from era.runs import reading as runs


def test_ap_is_computed_where_none_was_recorded(tmp_path):
    made = make_runs(tmp_path, masks=True)
    (made["teacher"] / "metrics.json").unlink()  # as --eval-only leaves a folder
    run = runs.read_run(made["teacher"], "t")
    data = dataset.read_dataset(run)
    got = scored.run_scores(run, data)
    # Every object is found exactly; the mistakes of the second class have a lower score.
    boxes = got["bbox"]
    assert boxes["AP"] == boxes["APm"] == boxes["AP-disk"] == boxes[f"AP-{EVIL}"]
    assert boxes["AP"] == pytest.approx(100)
    assert "APs" not in boxes and "APl" not in boxes
    # The masks have a hole of 1/36: IoU 0.97, right at every threshold.
    assert got["segm"]["AP"] == pytest.approx(100)
    assert data.objects == {"disk": 6, EVIL: 6}
    stranger = replace(run, detections=[{**run.detections[0], "image_id": 99}])
    with pytest.raises(UserError, match="image 99"):
        scored.run_scores(stranger, data)
    with pytest.raises(UserError, match="recorded no AP"):
        scored.run_scores(run, None)


def test_an_evaluation_of_the_best_student_stands_for_the_last_of_the_training(tmp_path):
    made = make_runs(tmp_path)
    last = runs.read_run(made["era"], "e")
    best = made["era"] / runs.BEST_FOLDER / runs.RESULTS
    best.parent.mkdir(parents=True)
    best.write_text(json.dumps(runs.read_run(made["teacher"], "t").detections))
    run = runs.read_run(made["era"], "e")
    assert run.detections != last.detections and run.metrics == last.metrics  # the curves stay
    assert scored.run_scores(run, dataset.read_dataset(run))["bbox"]["AP"] == pytest.approx(100)


def test_broken_metrics_are_left_out():
    lines = [3, {"loss": 1.0}, {"iteration": "x"}, {"iteration": 4, "a": math.nan, "b": 2, "c": {}}]
    assert runs.clean_metrics(lines) == [{"iteration": 4, "b": 2}]


def test_pictures_are_small_upright_and_written_anew(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret"  # turned by 90 degrees, and a description
    Image.new("RGB", (1300, 650), "navy").save(tmp_path / "a.jpg", exif=exif)
    uri = examples.data_uri(str(tmp_path / "a.jpg"))
    (tmp_path / "b.jpg").write_bytes(base64.b64decode(uri.split(",")[1]))
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.size == (320, 640) and not image.getexif()
    (tmp_path / "c.jpg").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read"):
        examples.data_uri(str(tmp_path / "c.jpg"))


def curve(name: str, x, y) -> charts.Curve:
    return charts.Curve(name, np.array(x, dtype=float), np.array(y, dtype=float), "c0")


def test_charts_of_long_and_of_odd_curves():
    x = np.arange(1, 5001.0)
    thin = charts.thinned(curve("a", x, 2 * x))
    assert len(thin.x) <= charts.MOST_POINTS and thin.x[0] == 11 and thin.y[0] == 22
    assert charts.line_chart("t", [curve("b", [], [])], y_label="y", ident="i") is None
    zero = charts.line_chart("t", [curve("z", [1, 2], [0, 0.5])], y_label="y", ident="i", log=True)
    assert zero.svg.count("<use ") == 1  # the point that a logarithm can show
    flat = charts.line_chart("t", [curve("f", [5], [0])], y_label="y", ident="i")
    assert "f ends at 0." in flat.svg


@pytest.mark.parametrize(
    ("low", "high"), [(0.3, 0.31), (1, 1), (0.11, 2.3), (0.002, 40), (1e-9, 1e3)]
)
def test_a_logarithmic_axis_has_at_least_two_numbers(low, high):
    chart = charts.line_chart(
        "t", [curve("a", [1, 2], [low, high])], y_label="y", ident="i", log=True
    )
    inside = [float(n) for n in re.findall(r'<text text-anchor="end"[^>]*>([^<]+)<', chart.svg)]
    assert len(inside) >= 2


def test_a_drawing_is_fit_for_a_page():
    chart = charts.line_chart(
        "A <title>", [curve(EVIL, [1, 9000], [1, 20])], y_label='"y" & z', ident="one"
    )
    assert 'aria-label="A &lt;title&gt;. &quot;y&quot; &amp; z, linear scale' in chart.svg
    assert "<style" not in chart.svg and "metadata" not in chart.svg and "xmlns" not in chart.svg
    assert ">2k</text>" in chart.svg and "script>" not in chart.svg
    other = charts.line_chart("A", list(chart.legend), y_label="y", ident="two")
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (chart.svg, other.svg)]
    assert ids[0] and not ids[0] & ids[1]


def test_differences_have_a_sign_and_no_minus_zero():
    assert page.signed(1.5) == ("+1.5", "better") and page.signed(-0.3) == ("−0.3", "worse")
    assert page.signed(-0.04) == ("±0.0", "same")
    assert page.signed(None) == page.signed(math.nan) == ("–", "")


def test_names_stay_inside_and_avoid_one_another():
    box = compare.Box((10.0, 0.0, 60.0, 40.0), 0, 0.9)
    groups = ("truth", "m0", "m1")
    marks = [Mark.of(box, group, "c0", True, "disk 0.90", 160, 120) for group in groups]
    place_tags(marks, 160, 120, first={"m0", "m1"})
    tags = [mark.tag for mark in marks]
    assert len({(x, y) for x, y, _, _ in tags}) == 3
    assert all(x >= 0 and y >= 0 and x + width <= 160 for x, y, width, _ in tags)


def test_outlines_of_masks():
    square = "M10.0 10.0L50.0 10.0L50.0 50.0L10.0 50.0Z"
    assert outline([[10, 10, 50, 10, 50, 50, 10, 50]], 160, 120) == square
    assert outline([[-9, -9, 500, -9, 500, 500]], 160, 120) == "M0.0 0.0L160.0 0.0L160.0 120.0Z"
    ring = outline(rle([10, 10, 36, 36]), 160, 120)
    assert ring.count("M") == ring.count("Z") == 2  # the outer edge and the hole
    numbers = [float(n) for n in re.findall(r"[\d.]+", ring)]
    assert min(numbers) == 10.5 and max(numbers) == 45.5
    with pytest.raises(ValueError, match="its size is"):
        outline(rle([10, 10, 36, 36]), 120, 160)


def test_sizes_count_the_model_and_not_what_lies_beside_it(tmp_path):
    folder = make_deployed(tmp_path / "onnx")
    (model,) = deployed.read_deployed([folder], {str(folder): [1.0, 2.0, 3.0]})
    assert model.megabytes == 2.5 and model.milliseconds == (1.5, 2.0, 2.5)
    assert model.box_difference == 0.004
