"""The HTML report: from hand-made runs to one file, escaped, self-contained, and working in a browser.

No training happens here: pictures are drawn, metrics and detections are made by hand.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from era.config import load_config
from era.demo import cli as demo_cli
from era.demo import report as report_demo
from era.demo import table as demo_table
from era.errors import UserError
from era.report import charts, cli, deployed, examples, scores, write_report
from era.report.overlay import Mark, place_tags
from era.report.tables import signed
from era.runs import plan as demo_runs
from era.runs import reading as runs
from era_runtime.manifest import sha256_file

ROOT = Path(__file__).resolve().parent.parent
EVIL = "<script>alert(1)</script>"
CLASSES = ("disk", EVIL)  # category ids 3 and 7
IDS = (3, 7)


# ---- Hand-made runs -----------------------------------------------------------------------------


def make_dataset(folder: Path, name: str) -> list:
    """Six pictures of two objects each; returns the triple for DATASETS.COCO_FORMAT."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, 7):
        picture = Image.new("RGB", (160, 120), (40 * i, 90, 120))
        for k, x in enumerate((10, 90)):
            box = [x, 20 + 5 * i, 40, 40]
            ImageDraw.Draw(picture).rectangle((x, box[1], x + 40, box[1] + 40), fill=(250, 200, 90))
            ids = {"id": len(annotations) + 1, "image_id": i, "category_id": IDS[k]}
            annotations.append({**ids, "bbox": box, "area": 1600, "iscrowd": 0})
        picture.save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 160, "height": 120})
    categories = [{"id": i, "name": c} for i, c in zip(IDS, CLASSES, strict=True)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(data))
    return [name, str(folder / "val.json"), str(folder / "images")]


def found(folder: Path, count) -> list[dict]:
    """Detections: of image i the first ``count(i)`` objects, and one low-scored mistake each."""
    data = json.loads((folder / "val.json").read_text())
    made = []
    for i in range(1, 7):
        own = [a for a in data["annotations"] if a["image_id"] == i]
        for a in own[: count(i)]:
            made.append({k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9})
        wrong = {"image_id": i, "category_id": 7, "bbox": [60.0, 2.0, 20.0, 20.0], "score": 0.3}
        made.append(wrong)
    return made


def make_run(folder: Path, config: str, triple: list, detections: list[dict], ap: float) -> Path:
    """An OUTPUT_DIR after training."""
    opts = ["DATASETS.COCO_FORMAT", [triple], "DATASETS.TEST", (triple[0],)]
    opts += ["OUTPUT_DIR", str(folder), "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    cfg = load_config(str(ROOT / "configs/toy" / f"{config}.yaml"), opts)
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / runs.RESULTS).write_text(json.dumps(detections))
    lines = []
    for i in range(19, 100, 20):
        fall = math.exp(-i / 50)
        line = {"iteration": i, "total_loss": 4 * fall, "time": 0.25}
        line |= dict.fromkeys(("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"), fall)
        if config.startswith("era"):
            line |= {"loss_era_feature": fall, "loss_other": fall}
            line |= {
                f"era/{p}/residual_e{k}": fall * 0.7**k for p in ("p3", "p4") for k in range(5)
            }
        lines.append(line)
    metrics = {"AP": ap, "AP50": ap + 20, "AP75": ap + 1, "APs": math.nan, "APm": ap, "APl": 3.0}
    metrics |= {"AP-disk": ap - 5, f"AP-{EVIL}": ap + 5}
    lines.append({"iteration": 100, **{f"bbox/{k}": v for k, v in metrics.items()}})
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def made(tmp_path):
    """Folders: plain, era (better in images 1 to 4, worse in 6), teacher."""
    data = tmp_path / "data"
    triple = make_dataset(data, f"report_{tmp_path.name}")
    return {
        "plain": make_run(
            tmp_path / "plain", "plain", triple, found(data, lambda i: int(i > 3)), 29.3
        ),
        "era": make_run(
            tmp_path / "era", "era", triple, found(data, lambda i: 2 if i < 5 else 0), 45.4
        ),
        "teacher": make_run(
            tmp_path / "teacher", "teacher", triple, found(data, lambda i: 2), 56.3
        ),
    }


def make_deployed(folder: Path, name: str = "onnx") -> Path:
    """A deployment folder as far as the report looks into it."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"\0" * 2_500_000)
    (folder / "classes.json").write_text("[]")
    (folder / "parity.json").write_text('{"cases": [{"box_difference": 0.004}]}')
    files = {p.name: {"sha256": sha256_file(p)} for p in folder.iterdir()}
    manifest = {"format_version": 1, "format": name, "alpha": 0, "precision": f"float32 {EVIL}"}
    manifest |= {"score_threshold": 0.05, "max_batch": 1, "files": files}
    manifest["input"] = {"min_size": 128, "max_size": 128, "channel_order": "BGR"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Page(HTMLParser):
    """The page's elements: tag and attributes, in their order; unclosed elements fail."""

    VOID = ("meta", "link", "img", "input", "path", "rect", "circle", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.found if name == tag]

    def ids(self) -> set[str]:
        return {attrs["id"] for _, attrs in self.found if "id" in attrs}


def full_report(made: dict[str, Path], path: Path) -> Path:
    folder = make_deployed(made["plain"].parent / f"exported_{path.stem}" / "onnx")
    return write_report(
        [made["plain"], made["era"]],
        path,
        teacher=made["teacher"],
        deployed=[folder],
        latency={"eager": [20.0, 21.0, 30.0], str(folder): [10.0, 10.5, 11.0]},
        notes=[f"One seed. {EVIL}"],
        title=f"A report {EVIL}",
    )


# ---- The page -----------------------------------------------------------------------------------


def test_a_whole_report(made, tmp_path):
    page = Page(full_report(made, tmp_path / "out" / "report.html"))
    assert {"result", "detail", "training", "pictures", "deployment", "runs"} <= page.ids()
    text = page.text
    for number in ("29.3", "45.4", "+16.1", "56.3", "60 %"):  # 16.1 of 27.0 points
        assert number in text
    assert "Of all 6 test images, era has the higher F1 in 4, plain in 2" in text
    assert "residual" in text and "log scale" in text and "loss_other" in text
    # The export: 2.5 MB, half of eager's time.
    assert ">2.50<" in text and ">10.5<" in text and ">0.50<" in text and ">0.004<" in text
    assert len([a for a in page.all("img") if a["alt"].startswith("Test image")]) == 6
    assert len(page.all("caption")) == len(page.all("table")) == 5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html"]


def test_it_loads_nothing_and_runs_its_own_script_alone(made, tmp_path):
    page = Page(full_report(made, tmp_path / "report.html"))
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", page.text)
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
    boxes = [a["class"] for a in page.all("g") if a["class"].startswith("box")]
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
    assert [(run.role, run.recorded["AP"]) for run in read] == [
        (runs.BASELINE, 29.3),
        (runs.DISTILLED, 45.4),
        (runs.TEACHER, 61.2),
    ]


# ---- Its parts ----------------------------------------------------------------------------------


def test_ap_is_computed_where_none_was_recorded(made):
    (made["teacher"] / "metrics.json").unlink()  # as --eval-only leaves a folder
    run = runs.read_run(made["teacher"], "t")
    dataset = scores.read_dataset(run)
    got = scores.scores(run, dataset)
    # Every object is found exactly; the mistakes of the second class have a lower score.
    assert got["AP"] == got["APm"] == got["AP-disk"] == got[f"AP-{EVIL}"] == pytest.approx(100)
    assert "APs" not in got and "APl" not in got
    assert scores.computed([], dataset)["AP"] == 0
    assert dataset.objects == {"disk": 6, EVIL: 6}
    with pytest.raises(UserError, match="images or categories"):
        scores.computed([{**run.detections[0], "image_id": 99}], dataset)


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


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 3.1, [0, 1, 2, 3, 4]), (0, 700, [0, 200, 400, 600, 800]), (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1])],
)  # fmt: skip
def test_ticks(low, high, ticks):
    assert charts.nice_ticks(low, high) == pytest.approx(ticks)


def test_log_ticks_cover_the_data_and_are_at_least_four():
    assert charts.log_ticks(0.002, 40) == pytest.approx([1e-3, 1e-2, 0.1, 1, 10, 100])
    assert charts.log_ticks(0.11, 2.3) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    for low, high in ((0.3, 0.31), (1.0, 1.0), (9.9, 10.1), (1e-9, 1e3)):
        ticks = charts.log_ticks(low, high)
        assert ticks[0] <= low * 1.001 and ticks[-1] >= high * 0.999 and len(ticks) >= 2


def test_charts_of_long_and_of_odd_curves():
    x = np.arange(1, 5001.0)
    thin = charts.thinned(charts.Curve("a", x, 2 * x, "c0"))
    assert len(thin.x) <= charts.MOST_POINTS and thin.x[0] == 11 and thin.y[0] == 22
    nothing = charts.Curve("b", np.array([]), np.array([]), "c0")
    assert charts.line_chart("t", [nothing], y_label="y") == ""
    zero = charts.Curve("z", np.array([1.0, 2.0]), np.array([0.0, 0.5]), "c0")
    assert charts.line_chart("t", [zero], y_label="y", log=True).count("<circle") == 1


def test_differences_have_a_sign_and_no_minus_zero():
    assert "+1.5" in signed(1.5) and "−0.3" in signed(-0.3) and "±0.0" in signed(-0.04)
    assert signed(None) == signed(math.nan) == "–"


def test_names_stay_inside_and_avoid_one_another():
    box = examples.Box((10.0, 0.0, 60.0, 40.0), 0, 0.9)
    marks = [Mark(box, group, "c0", True, "disk 0.90") for group in ("truth", "m0", "m1")]
    tags = place_tags(marks, 160, 120, {"m0", "m1"})
    assert len({(tag.x, tag.y) for tag in tags}) == 3
    assert all(t.x >= 0 and t.y >= 0 and t.x + t.width <= 160 for t in tags)


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


# ---- A real browser -----------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")),
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver) and selenium",
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium with an empty profile, its console recorded."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def set_width(browser, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    media = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})


VISIBLE = """return [...document.querySelectorAll(arguments[0])]
    .filter(e => getComputedStyle(e).display !== "none" && e.getClientRects().length).length"""


@needs_browser
def test_in_a_browser(made, tmp_path, browser):
    path = full_report(made, tmp_path / "report.html")
    set_width(browser, 390)
    browser.get(path.as_uri())

    def visible(selector: str) -> int:
        return browser.execute_script(VISIBLE, selector)

    # The switches: ground truth, the two students, names; the teacher starts hidden.
    assert visible("g.box.truth") == 12 and visible("g.box.m1") == 8 and visible("g.box.m2") == 0
    for target, shown in (("m1", 8), ("truth", 12)):
        button = browser.find_element("css selector", f"[data-switch={target}]")
        browser.execute_script("arguments[0].focus()", button)
        button.send_keys(" ")  # by keyboard
        assert button.get_attribute("aria-pressed") == "false"
        assert visible(f"g.box.{target}") == visible(f"g.tag.{target}") == 0
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert visible(f"g.box.{target}") == visible(f"g.tag.{target}") == shown
    browser.find_element("css selector", "[data-switch=m2]").click()
    assert visible("g.box.m2") == 12
    names = browser.find_element("css selector", "[data-switch=names]")
    names.click()
    assert visible("g.tag") == 0 and visible("g.box.m1") == 8

    # The slider: from 0.3 on, each run has one mistake more in each of the six pictures.
    move = """const s = document.getElementById("threshold"); s.value = arguments[0];
        s.dispatchEvent(new Event("input"));"""
    browser.execute_script(move, "0.25")
    assert visible("g.box.m1") == 14
    counts = [e.text for e in browser.find_elements("css selector", "[data-count=m1] .wrong")]
    assert counts == ["1"] * 6
    browser.execute_script(move, "0.95")
    assert visible("g.box.m1") == 0 and visible("g.box.truth") == 12

    # No scrolling to the side, at either width and in either scheme; every picture is there.
    for width, scheme in ((390, "light"), (1280, "light"), (1280, "dark"), (390, "dark")):
        set_width(browser, width, scheme)
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        outside = """return [...document.querySelectorAll("h1, h2, h3, p, figure, .scroll, .tiles")]
            .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).length"""
        assert browser.execute_script(outside) == 0
        loaded = """document.querySelectorAll("img").forEach(i => i.loading = "eager");
            return Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"""
        assert browser.execute_script(loaded) == [160] * 6
    assert browser.get_log("browser") == []


@needs_browser
def test_texts_are_legible_in_a_browser(made, tmp_path, browser):
    """WCAG's contrast of 4.5 between text and what it stands on, and no text below 10 px on a phone."""
    browser.get(full_report(made, tmp_path / "report.html").as_uri())
    contrast = """
        const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
        const lum = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
            return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
            return .2126 * r + .7152 * g + .0722 * b; };
        const ground = e => { for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
        const worst = [];
        for (const e of document.querySelectorAll("p,th,td,small,button span,dt,dd b,li,a,caption,span")) {
            if (!e.textContent.trim() || !e.getClientRects().length) continue;
            const [a, b] = [lum(rgb(getComputedStyle(e).color)), lum(ground(e))];
            const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
            if (ratio < 4.5) worst.push([e.tagName, e.className, e.textContent.slice(0, 20), ratio]);
        }
        return worst;"""
    smallest = """return Math.min(...[...document.querySelectorAll(".chart text, .tag text")]
        .filter(e => e.getClientRects().length)
        .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a))"""
    for scheme in ("light", "dark"):
        set_width(browser, 390, scheme)
        assert browser.execute_script(contrast) == []
    assert browser.execute_script(smallest) >= 10
