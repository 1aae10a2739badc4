"""The HTML report: from hand-made runs to one file, escaped and self-contained. No training happens here."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from report_case import EVIL, ROOT, Page, found, full_report, make_dataset, make_run, make_runs

from era.config import load_config
from era.errors import UserError
from era.methods import Chart, Method
from era.registry import METHOD_REGISTRY
from era.report import cli, curves, scored, write_report
from era.report.write import settings
from era.runs import reading as runs


@pytest.fixture
def made(tmp_path):
    """The folders of three runs of a box detector."""
    return make_runs(tmp_path)


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
    assert page.text.count("onload=&#34;") > 5 and not page.all("u")
    assert "<b>'" not in page.text and "<b>&" not in page.text
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
    METHOD_REGISTRY.register(Probe)
    scalars = (
        "loss_probe_a",
        "loss_probe_b",
        *(f"probe/p{p}/left{k}" for p in (3, 4) for k in (2, 10)),
    )
    made = make_runs(tmp_path, scalars=scalars)
    config = made["era"] / "config.yaml"
    config.write_text(config.read_text().replace("- ERA\n", "- Probe\n", 1))
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


def test_runs_of_a_dense_family(tmp_path):
    """RetinaNet: its own losses, which have some of an R-CNN's names, and what distillation adds to them."""
    data, opts = tmp_path / "data", ("MODEL.RETINANET.NUM_CLASSES", 2)
    triple = make_dataset(data, f"report_{tmp_path.name}")
    folders = [
        make_run(tmp_path / name, f"retinanet_{name}", triple, found(data, count), ap, opts)
        for name, count, ap in (("plain", lambda i: 1, 29.3), ("era", lambda i: 2, 45.4))
    ]
    assert runs.read_run(folders[1], "era").cfg.MODEL.RETINANET.NUM_CLASSES == 2
    text = write_report(folders, tmp_path / "r.html").read_text()
    assert "+16.1" in text and "era: what distillation adds to the loss" in text
    assert "Each model’s own detection loss" in text
    assert "Of all 6 test images, era has the higher F1 in 6, plain in 0" in text


def test_losses_on_the_test_pictures_are_drawn_where_a_run_has_them(made, tmp_path):
    heading = "Each model’s own detection loss on the test pictures"
    folders = [made["plain"], made["era"]]
    assert heading not in write_report(folders, tmp_path / "without.html").read_text()
    path = made["era"] / "metrics.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[:2]:
        line["validation/total_loss"] = 2.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert heading in write_report(folders, tmp_path / "with.html").read_text()


@pytest.mark.parametrize(
    "config, title",
    [
        ("plain", "Faster R-CNN"),
        ("mask_era", "Mask R-CNN"),
        ("cascade_era", "Cascade R-CNN"),
        ("retinanet_plain", "RetinaNet"),
        ("fcos_era", "FCOS"),
    ],
)
def test_a_detector_is_called_as_people_call_it(config, title, tmp_path):
    triple = make_dataset(tmp_path / "data", f"report_{tmp_path.name}")
    detections = found(tmp_path / "data", lambda i: 1)
    run = runs.read_run(make_run(tmp_path / "run", config, triple, detections, 29.3), "run")
    assert settings(run)[0] == (title, "")


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
