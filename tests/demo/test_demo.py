"""The demo: the table, the sentences, figures, pictures and the report of its runs.

No training happens here: metrics and detections are made by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import REPO
from PIL import Image

from era.demo import cli, figures, pictures, table
from era.demo import report as demo_report
from era.errors import UserError
from era.registry import METHOD_REGISTRY
from era.runs import compare, dataset
from era.runs.measure import Measurement
from era.runs.metrics import read_metrics
from era.runs.plan import NOTHING, Run, make_runs
from era.runs.schema import read_plan
from era.runs.series import own_losses

OWN = ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
NAMES = ("teacher", "plain", "era", "plain_equal_time", "era_alpha1")
AP = {"teacher": 56.3, "plain": 29.3, "era": 45.4, "plain_equal_time": 30.0}
SECONDS = {"plain": 0.15, "plain_equal_time": 0.15}  # of a step; the others 0.25


def training_metrics(ap: float, methods: tuple[str, ...], seconds: float = 0.25) -> list[dict]:
    """What a run of 100 steps leaves: losses that fall, residuals that fall with i, an evaluation."""
    added = [name for method in methods for name in METHOD_REGISTRY.get(method).loss_labels]
    lines = []
    for iteration in range(19, 100, 20):
        fall = 1.0 / (1 + iteration / 50)
        line = {"iteration": iteration, "total_loss": 4 * fall, "time": seconds}
        line |= dict.fromkeys(OWN, fall) | dict.fromkeys(added, 0.5 * fall)
        for level in ("p2", "p3") if methods else ():
            line |= {f"era/{level}/residual_e{i}": fall * 0.8**i for i in range(5)}
            line[f"era/{level}/removed"] = 1 - 0.8**4
        lines.append(line)
    return [*lines, {"iteration": 100, "bbox/AP": ap, "bbox/AP50": ap + 20, "bbox/AP75": ap + 1}]


@pytest.fixture
def plan(monkeypatch):
    """The demo's own."""
    monkeypatch.chdir(REPO)
    return read_plan(Path(cli.PLAN))


@pytest.fixture
def runs(plan, tmp_path):
    """The demo's runs, with hand-made results in their folders."""
    made = make_runs(plan, tmp_path, opts=["SOLVER.MAX_ITER", "100"])
    made = [replace(r, iterations=167) if r.name == "plain_equal_time" else r for r in made]
    for run in made:
        run.folder.mkdir()
        if run.name in AP:
            lines = training_metrics(AP[run.name], run.methods, SECONDS.get(run.name, 0.25))
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (run.folder / "metrics.json").write_text(text)
        else:
            run.log.write_text(
                "[11/22 17:18:55] d2.evaluation.testing INFO: copypaste: Task: bbox\n"
                "[11/22 17:18:55] d2.evaluation.testing INFO: copypaste: AP,AP50,AP75,APs,APm,APl\n"
                "[11/22 17:18:55] d2.evaluation.testing INFO: copypaste: 46.8,66.0,48.5,1.0,2.0,nan\n"
            )
    return made


def test_fast_and_seed_reach_every_run_and_the_user_has_the_last_word(plan, tmp_path):
    args = cli.argument_parser().parse_args(["--fast", "--seed", "3", "SOLVER.MAX_ITER", "5"])
    made = make_runs(plan, tmp_path, opts=cli.overrides(plan, args))
    assert tuple(run.name for run in made) == NAMES
    for run in made:
        assert run.config.SEED == 3
        assert run.config.SOLVER.MAX_ITER == 5
        assert run.config.SOLVER.WARMUP_ITERS == 10
    with pytest.raises(UserError, match="pairs"):
        cli.overrides(plan, cli.argument_parser().parse_args(["SOLVER.MAX_ITER"]))
    with pytest.raises(UserError, match="SEED cannot"):
        cli.overrides(plan, cli.argument_parser().parse_args(["SEED", "3"]))


def test_the_plan_is_few_labels_under_a_strong_teacher(plan, tmp_path):
    cfgs = {run.name: run.config for run in make_runs(plan, tmp_path)}
    assert {name: cfg.DATASETS.TRAIN for name, cfg in cfgs.items()} == {
        "teacher": ("era_toy_train",),
        **dict.fromkeys(NAMES[1:], ("era_toy_train_200",)),
    }
    assert cfgs["teacher"].SOLVER.MAX_ITER > cfgs["plain"].SOLVER.MAX_ITER
    assert cfgs["era"].SOLVER.MAX_ITER == cfgs["plain"].SOLVER.MAX_ITER
    assert cfgs["era"].MODEL.TEACHER.CACHE == "memory"
    assert not any(cfg.DATASETS.UNLABELED for cfg in cfgs.values())


def test_every_dataset_is_made_before_the_first_run(tmp_path, monkeypatch):
    made = []

    def execute(*_, **__):
        raise UserError("the first run")

    monkeypatch.setattr(dataset, "check_data", lambda cfg, **_: made.append(cfg.DATASETS.TRAIN))
    monkeypatch.setattr(cli, "execute", execute)
    monkeypatch.chdir(REPO)  # as the tool does, and back at the end
    with pytest.raises(UserError, match="the first run"):
        cli.main(["--output", str(tmp_path / "demo")], root=REPO)
    assert sorted(made) == [("era_toy_train",), ("era_toy_train_200",)]


# ---- Numbers ------------------------------------------------------------------------------------


def test_table_from_the_runs_metrics(plan, runs, tmp_path):
    measured = {run.name: Measurement(1234567, 0.0234) for run in runs}
    rows = {row.name: row for row in table.gather(runs, measured)}
    assert (rows["era"].ap, rows["era"].ap50, rows["era"].ap75) == (45.4, 65.4, 46.4)
    assert (rows["era_alpha1"].ap, rows["era_alpha1"].iterations) == (46.8, 100)
    assert rows["era_alpha1"].step_ms is None and rows["era"].step_ms == 250
    # 100 steps of 250 ms are 25 s; 167 of 150 ms are 25.05 s.
    assert rows["era"].minutes == pytest.approx(25 / 60) and rows["era_alpha1"].minutes is None
    assert rows["plain_equal_time"].minutes == pytest.approx(25.05 / 60)

    gains = table.gains(list(rows.values()), plan.compare)
    assert [gain.points for gain in gains] == pytest.approx([16.1, -15.4])
    about = {"sentences": ["what it comes to"], "notes": ["a note"], "seed": 1}
    table.write(tmp_path, list(rows.values()), runs, gains, about)
    text = (tmp_path / "table.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    cells = ["ERA student", "100", "45.4", "65.4", "46.4", "1,234,567", "250", "0.4", "23.4"]
    assert cells in lines
    assert ["Plain student, ERA's time", "167", "30.0"] in [line[:3] for line in lines]
    assert "- what it comes to\n" in text and "- a note\n" in text
    stored = json.loads((tmp_path / "results.json").read_text())
    assert tuple(r["name"] for r in stored["runs"]) == NAMES
    assert stored["runs"][0]["command"][2] == "tools/train_net.py"
    assert [gain["run"] for gain in stored["gains"]] == ["era", "plain_equal_time"]
    assert stored["sentences"] == ["what it comes to"]
    width = {len(line) for line in table.terminal_table(list(rows.values())).splitlines()}
    assert max(width) <= 125


def row(name, ap, iterations=100, inherited=NOTHING, minutes=None):
    return table.Row(
        name, name.upper(), inherited, iterations, ap, ap, ap, None, None, minutes, None
    )


def sentence(*rows):
    (gain,) = table.gains(rows, {"b": "a"})
    return gain.sentence


@pytest.mark.parametrize(
    ("plain", "distilled", "said"),
    [
        (29.3, 45.4, '"B" beats "A" by 16.1 points (45.4 AP against 29.3 AP)'),
        (29.3, 29.9, '"B" is 0.6 points ahead of "A", which is not a clear win'),
        (29.3, 28.3, '"A" beats "B" by 1.0 points (29.3 AP against 28.3 AP)'),
        (29.3, 29.31, '"B" and "A" are level (29.3 AP against 29.3 AP)'),
        (29.3, float("nan"), '"B" and "A" cannot be compared (nan AP against 29.3 AP)'),
    ],
)
def test_the_sentence_names_the_winner_first(plain, distilled, said):
    text = sentence(row("a", plain), row("b", distilled))
    assert said in text and "At equal iterations (100) and nothing inherited" in text


def test_the_sentence_says_what_was_equal():
    assert "NOT at equal iterations (200 against 100) and" in sentence(
        row("a", 29.3), row("b", 45.4, 200)
    )
    unequal = sentence(row("a", 29.3), row("b", 45.4, inherited="heads"))
    assert "NOT from an equal start (inherited heads against nothing)" in unequal
    both = sentence(row("a", 29.3, inherited="heads"), row("b", 45.4, inherited="heads"))
    assert "both starting from the teacher's heads" in both
    assert table.gains([row("b", 45.4)], {"b": "a"}) == []


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        (3.0, "At equal training time (3.0 min of steps each) and nothing inherited, "),
        (2.71, "At equal training time (3.0 and 2.7 min of steps) and"),
        (2.69, "NOT at equal iterations (100 against 180) or training time (3.0 min of steps against 2.7) and"),
    ],
)  # fmt: skip
def test_the_sentence_at_equal_time(minutes, said):
    text = sentence(row("a", 45.4, minutes=3.0), row("b", 18.0, 180, minutes=minutes))
    assert text.startswith(said) and '"A" beats "B" by 27.4 points' in text


def test_a_teacher_below_a_student_is_told(runs):
    rows = table.gather(runs, {})
    assert table.teacher_warning(rows, runs) == ""
    # At alpha 1 the teacher's own heads are at work: that is no student.
    alone = [replace(r, ap=99.0) if r.name == "era_alpha1" else r for r in rows]
    assert table.teacher_warning(alone, runs) == ""
    weak = [replace(r, ap=45.4) if r.name == "teacher" else r for r in rows]
    said = 'NOT above its students in this run: 45.4 AP, "ERA student" 45.4 AP.'
    assert said in table.teacher_warning(weak, runs)
    assert table.teacher_warning(rows, [run for run in runs if not run.is_teacher]) == ""


def test_a_run_without_an_evaluation_is_named(tmp_path):
    run = Run("era", "ERA", "", (), tmp_path / "era", 100)
    with pytest.raises(UserError, match="'era' left no evaluation"):
        table.gather([run], {})


# ---- Figures ------------------------------------------------------------------------------------


def test_figures_are_drawn(runs, tmp_path):
    figures.write_losses(runs, runs[2], tmp_path / "losses.png")
    figures.write_charts(runs, tmp_path / "charts.png")
    figures.write_ap(table.gather(runs, {}), runs, tmp_path / "ap.png")
    for name, inches in {"losses": (11, 4.4), "charts": (5.5, 8.8), "ap": (7.2, 4.4)}.items():
        with Image.open(tmp_path / f"{name}.png") as image:
            expected = [round(side * figures.DPI) for side in inches]
            assert np.abs(np.subtract(image.size, expected)).max() <= 1
            assert np.asarray(image.convert("L")).std() > 5, "the figure is blank"


def test_the_losses_in_a_figure_are_the_runs_own(runs):
    for run in runs:
        if run.iterations:
            assert set(own_losses(read_metrics(run.folder), run.methods)) == set(OWN)


def test_figures_of_runs_too_short_for_metrics(plan, tmp_path):
    made = make_runs(plan, tmp_path)
    figures.write_losses(made, made[2], tmp_path / "losses.png")
    figures.write_charts(made, tmp_path / "charts.png")
    assert (tmp_path / "losses.png").stat().st_size and (tmp_path / "charts.png").stat().st_size
    figures.write_charts(made[:2], tmp_path / "none.png")  # plain runs have no charts
    assert not (tmp_path / "none.png").exists()


def test_every_training_has_a_colour_of_its_own(runs):
    looks = figures.looks(runs)
    assert set(looks) == set(NAMES) - {"era_alpha1"}
    assert len({look["color"] for look in looks.values()}) == 4
    assert [name for name, look in looks.items() if look["linestyle"] == ":"] == ["teacher"]


# ---- Pictures -----------------------------------------------------------------------------------


def box(x: float, category: int = 0, score: float = 1.0) -> compare.Box:
    return compare.Box((x, 0.0, x + 10.0, 10.0), category, score)


def example(image_id: int, plain: int, era: int, file_name: str = "") -> compare.Example:
    """Four objects, of which the plain student and ERA find so many."""
    objects = tuple(box(30.0 * i) for i in range(4))
    judged = {
        name: compare.judge([box(30.0 * i, score=0.9) for i in range(count)], objects)
        for name, count in {"teacher": 4, "plain": plain, "era": era}.items()
    }
    lead = judged["era"].f1 - judged["plain"].f1
    return compare.Example(image_id, file_name, objects, judged, lead)


def test_pictures_are_drawn(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    file_name = str(tmp_path / "photo.png")
    Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC).save(file_name)
    examples = [
        example(1, 1, 3, file_name),
        example(2, 0, 4, file_name),
        example(3, 3, 1, file_name),
    ]
    monkeypatch.setattr(pictures, "read_examples", lambda *_, **__: (examples, ["disk"]))
    made = [Run(n, n.title(), "", (), tmp_path / n, 100) for n in ("teacher", "plain", "era")]
    overview, *rest = pictures.write_pictures(
        made, made[1], made[2], "some_val", tmp_path / "pictures"
    )
    assert [p.name for p in rest] == ["1_image_2.jpg", "2_image_1.jpg", "3_image_3.jpg"]
    assert overview.stat().st_size <= pictures.OVERVIEW_BYTES
    with Image.open(overview) as image:
        assert 1100 < image.width < 1300
    captions = (tmp_path / "pictures" / "README.md").read_text()
    assert compare.rule('"Plain"', '"Era"') in captions
    assert 'image 3, "Plain" leads (F1 -0.46)' in captions
    assert 'image 2, "Era" leads (F1 +1.00): Teacher 4 of 4 found, 0 wrong' in captions


def test_boxes_have_the_colour_of_what_they_are(tmp_path):
    file_name = str(tmp_path / "grey.png")
    Image.fromarray(np.full((128, 128, 3), 90, np.uint8)).save(file_name)
    truth = (box(10), box(60))
    found = compare.judge([box(10, score=0.9), box(100, score=0.8)], truth)
    shown = compare.Example(1, file_name, truth, {"student": found}, 0.0)
    image = pictures.draw(shown, "student", ["disk"], 512)
    assert image.shape == (512, 512, 3) and image.dtype == np.uint8

    def has(colour: str, x: int) -> bool:
        """Whether the left side of the box at x (pixels of the image) has that colour."""
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        side = image[2 : 10 * 4 - 2, x * 4 - 2 : x * 4 + 3].astype(int)
        return bool((np.abs(side - wanted).max(axis=2) < 12).any())

    right, wrong, missed = (style[0] for style in (pictures.RIGHT, pictures.WRONG, pictures.MISSED))
    assert has(right, 10) and not has(wrong, 10)
    assert has(missed, 60) and has(wrong, 100)


# ---- The report ---------------------------------------------------------------------------------


def test_the_demo_ends_with_the_report(runs, tmp_path, monkeypatch):
    told = {}

    def write_report(folders, output, **options):
        told.update(options, folders=folders)
        return output

    monkeypatch.setattr(demo_report, "write_report", write_report)
    monkeypatch.setattr(demo_report, "deploy", lambda run, output, say: ([output / run.name], {}))
    rows = table.gather(runs, {run.name: Measurement(12345, 0.0234) for run in runs})
    path = demo_report.write_demo_report(
        runs, rows, tmp_path, title="T", deployed="era", caution="SMOKE RUN"
    )
    assert path == tmp_path / "report.html" and path.name in cli.PRODUCTS
    assert [folder.name for folder in told["folders"]] == ["plain", "era", "plain_equal_time"]
    assert told["teacher"] == tmp_path / "teacher" and told["caution"] == "SMOKE RUN"
    assert told["deployed"] == [tmp_path / "deployed" / "era"]
    assert told["costs"]["Teacher"].image_seconds == pytest.approx(0.0234)


def test_a_missing_runtime_is_told_and_the_rest_is_exported(tmp_path, monkeypatch):
    def check(name, *, int8):
        if name == "openvino":
            raise UserError("openvino is not installed.")

    class Source:
        def predictor(self):
            return "eager"

    monkeypatch.setattr(demo_report, "check_format", check)
    monkeypatch.setattr(demo_report, "load_source", lambda run: Source())
    monkeypatch.setattr(demo_report, "export", lambda *_: None)
    monkeypatch.setattr(demo_report, "measure", lambda folders, calls, eager: {eager: [1.0]})
    (tmp_path / "deployed").mkdir()  # of an earlier demo
    said = []
    run = Run("era", "ERA", "", (), tmp_path, 1)
    folders, latency = demo_report.deploy(run, tmp_path / "deployed", said.append)
    assert [f.name for f in folders] == ["torchscript", "onnx"] and latency == {"eager": [1.0]}
    assert said == ["The report has no openvino: openvino is not installed."]
    assert not (tmp_path / "deployed").exists()


# ---- The tool -----------------------------------------------------------------------------------


def test_the_tool_tells_a_mistake_in_one_sentence(tmp_path):
    (tmp_path / "mine.txt").touch()
    result = subprocess.run(
        [sys.executable, "tools/demo.py", "--output", str(tmp_path)],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: --output") and result.stderr.count("\n") == 1
