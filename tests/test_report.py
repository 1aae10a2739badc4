"""The HTML report: from hand-made runs to one file, escaped and self-contained. No training happens here."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import yaml
from PIL import Image
from report_case import EVIL, ROOT, Page, full_report, make_deployed, make_run, make_runs, rle

from era.config import load_config
from era.demo import cli as demo_cli
from era.demo import report as report_demo
from era.demo import table as demo_table
from era.errors import UserError
from era.methods import Chart, Method
from era.registry import METHOD_REGISTRY
from era.report import charts, cli, curves, deployed, examples, page, scored, write_report
from era.report.overlay import Mark, outline, place_tags
from era.runs import compare, dataset
from era.runs import plan as demo_runs
from era.runs import reading as runs


@pytest.fixture
def made(tmp_path):
    """The folders of three runs of a box detector."""
    return make_runs(tmp_path)


# ---- The page -----------------------------------------------------------------------------------


def test_a_whole_report(made, tmp_path):
    page = Page(full_report(made, tmp_path / "out" / "report.html"))
    assert {"result", "detail", "training", "pictures", "deployment", "runs"} <= page.ids()
    text = page.text
    for number in ("29.3", "45.4", "+16.1", "56.3", "60 %"):  # 16.1 of 27.0 points
        assert number in text
    assert "Of all 6 test images, era has the higher F1 in 4, plain in 2" in text
    assert "era: what distillation adds to the loss" in text
    # The export: 2.5 MB, half of eager's time.
    assert ">2.50<" in text and ">10.5<" in text and ">0.50<" in text and ">0.004<" in text
    assert len([a for a in page.all("img") if a["alt"].startswith("Test image")]) == 6
    assert len(page.all("caption")) == len(page.all("table")) == 5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html"]


def test_it_loads_nothing_and_runs_its_own_script_alone(made, tmp_path):
    page = Page(full_report(made, tmp_path / "report.html"))
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", page.text)
    for _, attrs in page.found:
        for key in ("src", "href"):
            assert attrs.get(key, "#").startswith(("#", "data:"))
        assert not [key for key in attrs if key.startswith("on")]
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;") and "sha256-" in policy


def test_texts_from_data_are_escaped(made, tmp_path):
    page = Page(full_report(made, tmp_path / "report.html"))
    assert len(page.all("script")) == 1 and EVIL not in page.text
    assert page.text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10


def test_a_hostile_name_is_text_wherever_it_comes_from(made, tmp_path):
    """A run's label, its folder, its methods, and the reason why the test set cannot be read."""
    evil = 'x" onload="alert(1)<b>\'&amp;'
    folder = made["era"].rename(tmp_path / "a<b>&")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("- ERA\n", "- '<i>&'\n", 1))
    for path in (made["plain"], folder):  # the data is gone, and the sentence names its path
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(config.replace("val.json", "<u>.json"))
    out = tmp_path / "r.html"
    page = Page(write_report([made["plain"], folder], out, labels=["p", evil], caution=evil))
    tags = {tag for tag, _ in page.found}
    assert not tags & {"b2", "i2", "u"} and page.text.count("onload=&#34;") > 5
    assert "&lt;i&gt;&amp;" in page.text and "a&lt;b&gt;&amp;" in page.text
    assert "&lt;u&gt;.json" in page.text and 'onload="' not in page.text
    assert "&amp;amp;" in page.text  # not taken for an entity


def test_a_method_that_is_not_known_is_shown_by_its_name(made, tmp_path):
    path = made["era"] / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["MODEL"]["DISTILLER"]["METHODS"] = ["OfAnotherTime"]
    config["MODEL"]["OFANOTHERTIME"] = {"WEIGHT": 1.0}
    path.write_text(yaml.safe_dump(config))
    text = write_report([made["plain"], made["era"]], tmp_path / "report.html").read_text()
    assert "<td>OfAnotherTime</td>" in text and "+16.1" in text
    config["MODEL"]["RESNETS"]["NO_SUCH_KEY"] = 1
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        runs.read_run(made["era"], "era")


def test_a_method_says_itself_what_is_drawn_of_it(tmp_path, monkeypatch):
    class Probe(Method):
        loss_labels: ClassVar = {"loss_probe_b": f"second {EVIL}", "loss_probe_a": "first"}
        charts = (
            Chart(
                title="what is left",
                y_label="distance (pixels)",
                pattern=r"probe/\w+/left(?P<curve>\d+)",
                curve_name=lambda group: f"stage {group}",
                log_scale=True,
                explanation="Lower is nearer.",
            ),
        )

    monkeypatch.setattr(METHOD_REGISTRY, "_obj_map", dict(METHOD_REGISTRY._obj_map))
    METHOD_REGISTRY._do_register("PROBE", Probe)
    scalars = (
        "loss_probe_a",
        "loss_probe_b",
        *(f"probe/p{p}/left{k}" for p in (3, 4) for k in (2, 10)),
    )
    made = make_runs(tmp_path, scalars=scalars)
    config = made["era"] / "config.yaml"
    config.write_text(config.read_text().replace("- ERA\n", "- PROBE\n", 1))
    read = runs.read_run(made["era"], "era")
    found = curves.training_charts([scored.Scored(read, {}, "c0", "")])
    assert [(chart.title, chart.unit, [c.name for c in chart.legend]) for chart in found] == [
        (
            "Each model’s own detection loss",
            "sum of the loss terms of the detector itself",
            ["era"],
        ),
        ("era: what distillation adds to the loss", "weighted loss", [f"second {EVIL}", "first"]),
        ("era: what is left", "distance (pixels), log scale", ["stage 2", "stage 10"]),
    ]
    assert found[2].note == "Lower is nearer."
    own = found[0].legend[0]  # three terms of the detector's own, whatever they are called
    assert own.y == pytest.approx([3 * math.exp(-i / 50) for i in range(19, 100, 20)])
    page = Page(write_report([made["plain"], made["era"]], tmp_path / "report.html"))
    assert "Lower is nearer." in page.text and EVIL not in page.text


def test_masks_have_columns_tables_and_outlines(tmp_path):
    made = make_runs(tmp_path, masks=True)
    page = Page(
        write_report([made["plain"], made["era"]], tmp_path / "r.html", teacher=made["teacher"])
    )
    text = page.text
    for heading in ("Box AP", "Mask AP", "Box AP50"):
        assert f'<th scope="col">{heading}</th>' in text
    assert "<strong>25.3</strong>" in text and "<strong>41.4</strong>" in text  # 4 below the boxes'
    for caption in ("Box AP by class", "Mask AP by class", "Mask AP by object size"):
        assert f"<caption><span>{caption}" in text
    outlines = [a for a in page.all("path") if a.get("class", "").startswith("mask")]
    # Of six pictures: two objects each; plain 3, era 8, teacher 12, and a mistake each.
    assert len(outlines) == 12 + 3 + 8 + 12 + 3 * 6
    assert {a["data-switch"] for a in page.all("button")} == {
        "truth", "m0", "m1", "m2", "masks", "names",
    }  # fmt: skip
    boxes_alone = Page(
        write_report([make_runs(tmp_path / "boxes")["plain"]], tmp_path / "boxes.html")
    )
    assert not [a for a in boxes_alone.all("path") if a.get("class", "").startswith("mask")]
    assert "Mask AP" not in boxes_alone.text


def test_ids_of_a_page_are_all_different(made, tmp_path):
    """Charts with markers define them under ids; those of one chart must not catch another's."""
    for name in ("plain", "era"):
        path = made[name] / "metrics.json"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], lines[1], lines[-1]]))
    page = Page(write_report([made["plain"], made["era"]], tmp_path / "report.html"))
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = [a["href"] for a in page.all("use")]
    assert len(used) > 4 and {href.removeprefix("#") for href in used} <= set(ids)
    drawings = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(drawings) == 2 and all("ends at" in a["aria-label"] for a in drawings)


def test_the_same_input_gives_the_same_bytes(made, tmp_path):
    first, second = (
        write_report([made["plain"], made["era"]], tmp_path / f"{i}.html") for i in range(2)
    )
    assert first.read_bytes() == second.read_bytes()


def test_pictures_show_what_each_run_found(made, tmp_path):
    page = Page(write_report([made["plain"], made["era"]], tmp_path / "r.html", pictures=3))
    # By F1: ahead by 1 in images 1 to 3, behind by 2/3 in 5 and 6; a third of three is one.
    images = re.findall(r"<strong>Image (\d+)</strong>", page.text)
    assert images == ["1", "2", "5"]
    boxes = [a["class"] for a in page.all("g") if a.get("class", "").startswith("box")]
    assert boxes.count("box truth right") == 6
    assert boxes.count("box m1 right") == 4 and boxes.count("box m0 right") == 1
    assert boxes.count("box m0 wrong below") == 3  # at score 0.3, below the slider
    switches = {a["data-switch"]: a["aria-pressed"] for a in page.all("button")}
    assert switches == {"truth": "true", "m0": "true", "m1": "true", "names": "true"}


def test_one_run_alone(made, tmp_path):
    page = Page(write_report([made["era"]], tmp_path / "report.html"))
    assert "those in which" not in page.text and "lowest F1" in page.text
    assert re.findall(r"<strong>Image (\d+)</strong>", page.text)[:2] == ["5", "6"]


def test_without_the_test_set_there_are_no_pictures_but_a_report(made, tmp_path):
    (tmp_path / "data" / "val.json").unlink()
    page = Page(write_report([made["plain"], made["era"]], tmp_path / "report.html"))
    assert "No pictures, because the test set cannot be read" in page.text
    assert "45.4" in page.text and not page.all("button")


def test_a_run_that_inherited_is_held_against_one_that_did(made, tmp_path):
    triple = load_config(str(made["era"] / "config.yaml")).DATASETS.COCO_FORMAT[0]
    inherited = [
        make_run(tmp_path / name, name, triple, [], ap)
        for name, ap in (("plain_init", 50.0), ("era_init", 52.0))
    ]
    folders = [made["plain"], made["era"], *inherited]
    text = write_report(folders, tmp_path / "report.html").read_text()
    assert "+2.0</span> <small>over plain_init</small>" in text
    assert "+20.7</span> <small>over plain</small>" in text


def test_the_teacher_that_a_distilled_run_evaluated_stands_in(made, tmp_path):
    folder = made["era"]
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    lines[-1]["teacher/bbox/AP"] = 61.2
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "inference" / "teacher").mkdir()
    shutil.copy(made["teacher"] / runs.RESULTS, folder / runs.TEACHER_RESULTS)
    read = runs.read_runs([made["plain"], folder])
    assert [(run.role, run.recorded["bbox"]["AP"]) for run in read] == [
        (runs.BASELINE, 29.3),
        (runs.DISTILLED, 45.4),
        (runs.TEACHER, 61.2),
    ]


# ---- Its parts ----------------------------------------------------------------------------------


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


# ---- Mistakes -----------------------------------------------------------------------------------


def spoil(made: dict[str, Path], what: str) -> list[Path]:
    """Runs of which one lacks something."""
    era = made["era"]
    if what == "folder":
        shutil.rmtree(era)
    elif what == "config":
        (era / "config.yaml").unlink()
    elif what == "metrics":
        (era / "metrics.json").unlink()
        (era / runs.RESULTS).unlink()
    elif what == "results":
        (era / runs.RESULTS).unlink()
    elif what == "json":
        (era / runs.RESULTS).write_text("{")
    elif what == "form":
        (era / runs.RESULTS).write_text('[{"image_id": 1, "bbox": "<b>"}]')
    elif what in ("mask's form", "mask"):
        detections = json.loads((era / runs.RESULTS).read_text())
        counts = "11" if what == "mask" else {"x": 1}  # 2 of 19200 pixels
        detections[0]["segmentation"] = {"size": [120, 160], "counts": counts}
        (era / runs.RESULTS).write_text(json.dumps(detections))
    elif what == "twice":
        return [made["plain"], made["plain"]]
    return [made["plain"], era]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("folder", "is not a folder"),
        ("config", "holds no config.yaml"),
        ("metrics", "holds no metrics.json"),
        ("results", "cannot be read"),
        ("json", "is not JSON"),
        ("form", "entry 0"),
        ("mask's form", "entry 0"),
        ("mask", "do not fill 120 x 160"),
        ("twice", "named twice"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_and_nothing_is_written(made, tmp_path, what, said):
    with pytest.raises(UserError, match=said) as caught:
        write_report(spoil(made, what), tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*report*"))


def test_more_mistakes(made, tmp_path):
    pair = [made["plain"], made["era"]]
    with pytest.raises(UserError, match="--labels has 1"):
        write_report(pair, tmp_path / "r.html", labels=["a"])
    with pytest.raises(UserError, match="is a folder"):
        write_report(pair, tmp_path)
    with pytest.raises(UserError, match="--pictures is -1"):
        write_report(pair, tmp_path / "r.html", pictures=-1)
    with pytest.raises(UserError, match="no deployment folder"):
        write_report(pair, tmp_path / "r.html", deployed=[tmp_path])
    with pytest.raises(UserError, match="cannot be written"):
        write_report(pair, made["plain"] / "config.yaml" / "r.html")
    text = (made["era"] / "config.yaml").read_text()
    (made["era"] / "config.yaml").write_text(
        text.replace(f"- report_{tmp_path.name}\n", "- other\n")
    )
    with pytest.raises(UserError, match="one dataset"):
        write_report(pair, tmp_path / "r.html")
    with pytest.raises(UserError, match="--latency has nothing to time"):
        cli.report_main([str(made["plain"]), "--latency", "3"])


def test_the_tool(made, tmp_path):
    def run(*arguments):
        command = [sys.executable, "tools/report.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    out = tmp_path / "r.html"
    done = run(made["plain"], made["era"], "--labels", "A", "B & C", "--output", out)
    assert done.returncode == 0 and done.stdout.startswith(str(out)), done.stderr
    assert "B &amp; C" in out.read_text()
    done = run(tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the run") and done.stderr.count("\n") == 1


# ---- The demo's report --------------------------------------------------------------------------


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


def test_sizes_count_the_model_and_not_what_lies_beside_it(tmp_path):
    folder = make_deployed(tmp_path / "onnx")
    (model,) = deployed.read_deployed([folder], {str(folder): [1.0, 2.0, 3.0]})
    assert model.megabytes == 2.5 and model.milliseconds == (1.5, 2.0, 2.5)
    assert model.box_difference == 0.004
