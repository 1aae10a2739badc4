"""The demo: scheduling, remaining time, the folder, the table, figures and pictures.

No training happens here: runs are tiny processes, metrics and detections are made by hand.
"""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from era.demo import cli, figures, pictures, table
from era.demo import runs as demo_plan
from era.errors import UserError
from era.runs import compare, progress
from era.runs import execute as schedule
from era.runs import metrics as metrics_module
from era.runs import plan as runs
from era.runs.measure import Measurement, interleaved_times

ROOT = Path(__file__).resolve().parent.parent


def make_run(folder: Path, name: str, **changes) -> runs.Run:
    """A run that is nothing but a process: by default one that succeeds at once."""
    defaults = {
        "label": name,
        "config_file": "",
        "opts": (),
        "folder": folder / name,
        "iterations": 100,
        "cost": 1.0,
        "command": (sys.executable, "-c", "pass"),
    }
    return runs.Run(name=name, **{**defaults, **changes})


def write_metrics(folder: Path, lines: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def training_metrics(ap: float, *, is_era: bool = False, seconds: float = 0.25) -> list[dict]:
    """What a run of 100 steps leaves: losses that fall, residuals that fall with i, an evaluation."""
    lines = []
    for iteration in range(19, 100, 20):
        fall = 1.0 / (1 + iteration / 50)
        line = {"iteration": iteration, "total_loss": 4 * fall, "time": seconds}
        line |= dict.fromkeys(figures.DETECTION_LOSSES, fall)
        if is_era:
            line |= dict.fromkeys(figures.ERA_LOSSES, 0.5 * fall)
            for level in ("p2", "p3"):
                for i in range(5):
                    line[f"era/{level}/residual_e{i}"] = fall * 0.8**i
        lines.append(line)
    return [*lines, {"iteration": 100, "bbox/AP": ap, "bbox/AP50": ap + 20, "bbox/AP75": ap + 1}]


@pytest.fixture
def demo_runs(tmp_path, monkeypatch):
    """The demo's real runs, with hand-made results in their folders."""
    monkeypatch.chdir(ROOT)
    made = demo_plan.make_runs(tmp_path, ["SOLVER.MAX_ITER", "100"])
    ap = {"teacher": 56.3, "plain": 29.3, "era": 45.4, "plain_init": 50.4, "era_init": 57.8}
    for run in made:
        if run.name in ap:
            write_metrics(run.folder, training_metrics(ap[run.name], is_era="era" in run.name))
        else:
            run.folder.mkdir()
            run.log.write_text(
                "[11/22 17:18:55] d2.evaluation.testing INFO: copypaste: Task: bbox\n"
                "[11/22 17:18:55] d2.evaluation.testing INFO: copypaste: AP,AP50,AP75,APs,APm,APl\n"
                "[11/22 17:18:55] d2.evaluation.testing INFO: copypaste: 46.8,66.0,48.5,1.0,2.0,nan\n"
            )
    return made


# ---- What is run --------------------------------------------------------------------------------


def test_runs_are_train_net_with_the_toy_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = {run.name: run for run in demo_plan.make_runs(tmp_path, ["SOLVER.MAX_ITER", "7"])}
    assert tuple(made) == runs.RUN_NAMES
    for run in made.values():
        assert "tools/train_net.py" in run.command
        assert run.command[-2:] == ("SOLVER.MAX_ITER", "7")
        assert Path(run.config.OUTPUT_DIR) == tmp_path / run.name
    for name in ("era", "plain_init", "era_init"):
        assert made[name].depends_on == "teacher"
        weights = made[name].config.MODEL.TEACHER.WEIGHTS
        assert weights == str(tmp_path / "teacher" / "model_final.pth")
        # The table's word on inheritance is the config's.
        inherits = made[name].config.MODEL.ERA.TWI.INIT_STUDENT
        assert inherits == (made[name].inherited != runs.NOTHING)
    assert "--eval-only" in made["era_alpha1"].command
    assert made["era_alpha1"].config.MODEL.ERA.ALPHA == 1.0
    assert made["era"].iterations == made["plain"].iterations == 7


@pytest.mark.parametrize("key", demo_plan.RESERVED)
def test_keys_that_the_demo_sets_cannot_be_overridden(tmp_path, monkeypatch, key):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=key):
        demo_plan.make_runs(tmp_path, [key, "1"])


def test_fast_and_seed_reach_every_run_and_the_user_has_the_last_word(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = cli.argument_parser().parse_args(["--fast", "--seed", "3", "SOLVER.MAX_ITER", "5"])
    for run in demo_plan.make_runs(tmp_path, cli.overrides(args), seed=args.seed):
        assert run.config.SEED == 3
        assert run.config.SOLVER.MAX_ITER == 5
        assert run.config.SOLVER.WARMUP_ITERS == 10
    with pytest.raises(UserError, match="pairs"):
        cli.overrides(cli.argument_parser().parse_args(["SOLVER.MAX_ITER"]))


# ---- The folder ---------------------------------------------------------------------------------


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(UserError, match="no demo wrote"):
        runs.prepare_folder(tmp_path, reuse=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        runs.prepare_folder(tmp_path / "thesis.txt", reuse=False)


def test_an_earlier_demo_is_replaced_but_nothing_else(tmp_path):
    out = tmp_path / "demo"
    runs.prepare_folder(out, reuse=False).close()
    (out / "era").mkdir()
    (out / "table.md").write_text("old")
    (out / "my_notes.txt").write_text("mine")
    runs.prepare_folder(out, reuse=True).close()
    assert (out / "era").exists() and not (out / "table.md").exists()
    runs.prepare_folder(out, reuse=False).close()
    assert {p.name for p in out.iterdir()} == {runs.MARKER, "my_notes.txt"}


def test_two_demos_do_not_share_a_folder(tmp_path):
    with (
        runs.prepare_folder(tmp_path / "demo", reuse=False),
        pytest.raises(UserError, match="another demo"),
    ):
        runs.prepare_folder(tmp_path / "demo", reuse=False)


# ---- Scheduling ---------------------------------------------------------------------------------


def execute(made: list[runs.Run], **options) -> tuple[dict[str, schedule.State], str]:
    out = io.StringIO()
    defaults = {"jobs": 2, "cores": 2, "screen": progress.Screen(out), "poll_seconds": 0.01}
    return schedule.execute(made, **{**defaults, **options}), out.getvalue()


def test_dependencies_and_the_longest_way_first(tmp_path):
    made = [
        make_run(tmp_path, "short", iterations=10),
        make_run(tmp_path, "student", depends_on="teacher", iterations=300),
        make_run(tmp_path, "eval", depends_on="student", iterations=0, cost=0.0),
        make_run(tmp_path, "plain", iterations=200),
        make_run(tmp_path, "teacher", iterations=100),
    ]
    order, ended = [], {}

    def start(run, threads):
        assert threads == 2
        if run.depends_on:
            assert ended[run.depends_on] == 0
        order.append(run.name)
        process = schedule.start_process(run, threads)
        ended[run.name] = process.wait()
        return process

    states, _ = execute(made, jobs=1, start=start)
    # The teacher is short, but the student and its evaluation wait for it.
    assert order == ["teacher", "student", "plain", "short", "eval"]
    assert all(state.is_done for state in states.values())


def test_no_more_than_jobs_run_at_a_time(tmp_path):
    nap = (sys.executable, "-c", "import time; time.sleep(0.3)")
    made = [make_run(tmp_path, name, command=nap) for name in "abc"]
    alive, most = [], []

    def start(run, threads):
        process = schedule.start_process(run, threads)
        alive.append(process)
        most.append(sum(p.poll() is None for p in alive))
        return process

    execute(made, start=start)
    assert max(most) == 2


def test_a_failing_run_stops_the_others_and_is_one_sentence(tmp_path):
    bad = (sys.executable, "-c", "print('disk on fire'); raise SystemExit(3)")
    slow = (sys.executable, "-c", "import time; time.sleep(60)")
    made = [
        make_run(tmp_path, "bad", command=bad),
        make_run(tmp_path, "slow", command=slow),
        make_run(tmp_path, "after", depends_on="bad"),
    ]
    started = {}

    def start(run, threads):
        started[run.name] = schedule.start_process(run, threads)
        return started[run.name]

    out = io.StringIO()
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"'bad' failed \(exit status 3\)") as error:
        execute(made, start=start, screen=progress.Screen(out))
    assert time.monotonic() - begin < 20
    assert started["slow"].poll() is not None and "after" not in started
    assert str(made[0].log) in str(error.value) and "\n" not in str(error.value)
    assert "bad: disk on fire" in out.getvalue()
    assert not (made[0].folder / runs.STAMP).exists()


def test_an_interrupt_stops_the_children(tmp_path):
    slow = (sys.executable, "-c", "import time; time.sleep(60)")
    made = [make_run(tmp_path, name, command=slow) for name in "ab"]
    started = []

    class Interrupting(progress.Screen):
        def show(self, *args):
            if len(started) == 2:
                raise KeyboardInterrupt

    def start(run, threads):
        started.append(schedule.start_process(run, threads))
        return started[-1]

    with pytest.raises(KeyboardInterrupt):
        execute(made, start=start, screen=Interrupting(io.StringIO()))
    assert all(process.poll() is not None for process in started)


def test_reuse_keeps_what_is_complete_and_unchanged(tmp_path):
    write_model = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]) / 'student'; p.mkdir(); "
        "(p / 'model_final.pth').touch()"
    )

    def trains(name, **changes):
        command = (sys.executable, "-c", write_model, str(tmp_path / name))
        return make_run(tmp_path, name, **{"command": command, **changes})

    made = [trains("teacher"), trains("student", depends_on="teacher"), trains("plain")]
    execute(made)

    def reused(made):
        states, _ = execute(made, reuse=True)
        return {name for name, state in states.items() if state.reused}

    assert reused(made) == {"teacher", "student", "plain"}
    # Another command: the run is done again, and so is what builds upon it.
    other = dataclasses.replace(made[0], command=(*made[0].command, "more"))
    assert reused([other, *made[1:]]) == {"plain"}
    # Complete by its stamp, but its model is gone.
    (tmp_path / "plain" / "student" / "model_final.pth").unlink()
    assert reused([other, *made[1:]]) == {"teacher", "student"}


# ---- Remaining time -----------------------------------------------------------------------------


def test_makespan_on_two_workers(tmp_path):
    made = [
        make_run(tmp_path, "teacher"),
        make_run(tmp_path, "plain"),
        make_run(tmp_path, "era", depends_on="teacher"),
        make_run(tmp_path, "plain_init", depends_on="teacher"),
        make_run(tmp_path, "era_init", depends_on="teacher"),
    ]
    left = {"teacher": 50.0, "plain": 30.0, "era": 60.0, "plain_init": 20.0, "era_init": 60.0}
    # teacher 0-50, plain 0-30; then era 50-110 and era_init 50-110, then plain_init 110-130.
    assert schedule.makespan(made, left, set(), set(), 2) == 130
    assert schedule.makespan(made, left, set(), set(), 1) == 220
    # The teacher is done, era and era_init run: plain_init follows, then nothing.
    left |= {"teacher": 0.0, "plain": 0.0, "era": 25.0, "era_init": 40.0}
    done, running = {"teacher", "plain"}, {"era", "era_init"}
    assert schedule.makespan(made, left, running, done, 2) == 45
    assert schedule.makespan(made, left, set(), set(left), 2) == 0


def test_remaining_time_of_each_run(tmp_path):
    def state(name, *, cost=1.0, **values):
        return schedule.State(make_run(tmp_path, name, cost=cost), **values)

    process = object()
    states = [
        state("done", seconds=30.0, step_seconds=0.2, steps=100),
        state("runs", cost=3.0, process=process, started=100.0, step_seconds=0.6, steps=40),
        state("alike", cost=3.0),
        state("unknown", cost=2.0),
    ]
    left = schedule.estimate_left(states, now=130.0)
    assert left["done"] == 0
    # Overhead as measured on the run that is done: 30 - 100 * 0.2 = 10 s, half of it to come.
    # By its steps 60 * 0.6 + 5 = 41; by the clock 100 * 0.6 + 10 - 30 = 40.
    assert left["runs"] == pytest.approx(40)
    # 100 steps as long as those of the run of the same cost, and the overhead.
    assert left["alike"] == pytest.approx(70)
    # 0.2 s a step at cost 1 and at cost 3: 0.4 at cost 2.
    assert left["unknown"] == pytest.approx(50)


def test_nothing_measured_yet_uses_the_priors(tmp_path):
    left = schedule.estimate_left([schedule.State(make_run(tmp_path, "a", cost=2.0))], now=0.0)
    expected = 100 * 2 * schedule.STEP_SECONDS + schedule.OVERHEAD_SECONDS
    assert left["a"] == pytest.approx(expected)


def test_progress_from_metrics(tmp_path):
    lines = training_metrics(12.0)
    lines[0]["time"] = 9.0  # the first steps are slow and do not count
    write_metrics(tmp_path, lines)
    with open(tmp_path / "metrics.json", "a") as f:
        f.write('{"iteration": 119, "total')  # being written
    metrics = metrics_module.read_metrics(tmp_path)
    assert metrics_module.steps_done(metrics) == 100
    assert metrics_module.step_seconds(metrics) == 0.25
    assert metrics_module.step_seconds(metrics[:1]) == 9.0
    assert metrics_module.step_seconds([]) is None and metrics_module.steps_done([]) == 0


def test_the_screen_renews_a_block_on_a_terminal_and_writes_lines_elsewhere():
    views = [
        progress.RunView("teacher", 640, 1200, "running"),
        progress.RunView("era", 0, 800, "waiting"),
    ]
    lines = io.StringIO()
    screen = progress.Screen(lines)
    for _ in range(3):
        screen.show(views, 190.0, 452.0)
    assert lines.getvalue() == "teacher 640/1200 | 3:10 elapsed, about 7:40 left\n"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    block = Terminal()
    screen = progress.Screen(block)
    screen.show(views, 190.0, 452.0)
    screen.show(views, 191.0, 451.0)
    assert block.getvalue().count("teacher") == 2 and "\x1b[3F" in block.getvalue()


# ---- Results ------------------------------------------------------------------------------------


def test_table_from_the_runs_metrics(demo_runs, tmp_path):
    measured = {run.name: Measurement(1234567, 0.0234) for run in demo_runs}
    rows = {row.name: row for row in table.gather(demo_runs, measured)}
    assert (rows["era"].ap, rows["era"].ap50, rows["era"].ap75) == (45.4, 65.4, 46.4)
    assert (rows["era_alpha1"].ap, rows["era_alpha1"].iterations) == (46.8, 100)
    assert rows["era_alpha1"].step_ms is None and rows["era"].step_ms == 250

    about = {"notes": ["a note"], "seed": 1}
    table.write(tmp_path, list(rows.values()), demo_runs, about)
    text = (tmp_path / "table.md").read_text()
    assert "| ERA student | nothing | 100 | 45.4 | 65.4 | 46.4 | 1,234,567 | 250 | 23.4 |" in text
    assert "| ERA student, inherited | RPN and ROI heads | 100 | 57.8 |" in text
    assert "a note" in text
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [r["name"] for r in stored["runs"]] == list(runs.RUN_NAMES)
    assert stored["runs"][0]["command"][2] == "tools/train_net.py"
    assert [g["gain"] for g in stored["gains"]] == pytest.approx([16.1, 7.4])
    width = {len(line) for line in table.terminal_table(list(rows.values())).splitlines()}
    assert max(width) <= 120


@pytest.mark.parametrize(
    ("plain", "era", "said"),
    [
        (29.3, 45.4, "ERA beats the plain student by +16.1 points"),
        (29.3, 29.9, "not a clear win"),
        (29.3, 28.3, "ERA does NOT beat the plain student: -1.0 points"),
    ],
)
def test_the_sentence_says_who_won(plain, era, said):
    def row(name, ap, iterations=100):
        return table.Row(name, name, runs.NOTHING, iterations, ap, ap, ap, None, None, None)

    (gain,) = table.gains([row("plain", plain), row("era", era)])
    assert said in gain["sentence"] and "At equal iterations (100)" in gain["sentence"]
    (gain,) = table.gains([row("plain", plain), row("era", era, 200)])
    assert "NOT at equal iterations" in gain["sentence"]


def test_a_run_without_an_evaluation_is_named(tmp_path):
    with pytest.raises(UserError, match="'era' left no evaluation"):
        table.gather([make_run(tmp_path, "era")], {})


def test_models_take_turns_and_warm_up_is_not_timed():
    calls = []
    models = [lambda x, name=name: calls.append(name) for name in "abc"]
    times = interleaved_times(models, [{}] * 4, warm_up=2)
    assert [len(t) for t in times] == [4, 4, 4]
    assert "".join(calls[:6]) == "abcbca" and len(calls) == 18


def test_figures_are_drawn(demo_runs, tmp_path):
    figures.write_losses(demo_runs, tmp_path / "losses.png")
    figures.write_residuals(demo_runs, tmp_path / "residuals.png")
    figures.write_ap(table.gather(demo_runs, {}), tmp_path / "ap.png")
    for name, inches in {"losses": (11, 4.4), "residuals": (11, 4.4), "ap": (7.2, 4.4)}.items():
        with Image.open(tmp_path / f"{name}.png") as image:
            expected = [round(side * figures.DPI) for side in inches]
            assert np.abs(np.subtract(image.size, expected)).max() <= 1
            assert np.asarray(image.convert("L")).std() > 5, "the figure is blank"


def test_residuals_are_the_mean_over_levels():
    metrics = [{"iteration": 19, "era/p2/residual_e0": 1.0, "era/p3/residual_e0": 3.0}]
    ((iterations, values),) = figures.residual_series(metrics)
    assert iterations.tolist() == [20] and values.tolist() == [2.0]


def test_figures_of_runs_too_short_for_metrics(tmp_path):
    made = [make_run(tmp_path, name) for name in ("teacher", "plain", "era")]
    figures.write_losses(made, tmp_path / "losses.png")
    figures.write_residuals(made, tmp_path / "residuals.png")
    assert (tmp_path / "losses.png").stat().st_size and (tmp_path / "residuals.png").stat().st_size


# ---- Pictures -----------------------------------------------------------------------------------


def box(x: float, category: int = 0, score: float = 1.0) -> compare.Box:
    return compare.Box((x, 0.0, x + 10.0, 10.0), category, score)


def test_detections_are_judged_as_coco_does():
    objects = [box(0), box(50), box(90, category=1)]
    found = [box(1, score=0.9), box(0, score=0.8), box(50, category=1, score=0.7), box(90, 1, 0.6)]
    judged = compare.judge(found, objects)
    # right, found twice, wrong class, right; the object at 50 is missed
    assert judged.right == (True, False, False, True)
    assert judged.missed == (objects[1],)
    assert judged.f1 == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert compare.judge([], []).f1 == 1.0 and compare.judge([box(0)], []).f1 == 0.0
    assert compare.iou(box(0), box(5)) == pytest.approx(1 / 3)


def example(image_id: int, plain: int, era: int, file_name: str = "") -> compare.Example:
    """Four objects, of which the plain student and ERA find so many."""
    objects = tuple(box(30.0 * i) for i in range(4))
    judged = {
        name: compare.judge([box(30.0 * i, score=0.9) for i in range(count)], objects)
        for name, count in {"teacher": 4, "plain": plain, "era": era}.items()
    }
    lead = judged["era"].f1 - judged["plain"].f1
    return compare.Example(image_id, file_name, objects, judged, lead)


def test_pictures_show_losses_as_well_as_gains():
    examples = [example(i, plain=1, era=3) for i in range(1, 10)]
    examples += [example(20, plain=2, era=2), example(21, plain=3, era=2), example(22, 4, 1)]
    chosen = compare.choose(examples, 6)
    assert [e.image_id for e in chosen] == [1, 2, 3, 4, 22, 21]
    assert [e.image_id for e in compare.choose(examples[-3:], 6)] == [22, 21]
    assert [e.image_id for e in compare.choose(examples[9:10], 6)] == [20]
    assert "in 9, the plain student in 2; in 1 they" in compare.summary(examples, *pictures.COMPARED)


def test_pictures_are_drawn(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    file_name = str(tmp_path / "photo.png")
    Image.fromarray(noise).save(file_name)
    examples = [
        example(1, 1, 3, file_name),
        example(2, 0, 4, file_name),
        example(3, 3, 1, file_name),
    ]
    monkeypatch.setattr(pictures, "read_examples", lambda *_, **__: (examples, ["disk"]))
    made = [make_run(tmp_path, name) for name in pictures.SHOWN]
    overview, *rest = pictures.write_pictures(made, "some_val", tmp_path / "pictures")
    assert [p.name for p in rest] == ["1_image_2.jpg", "2_image_1.jpg", "3_image_3.jpg"]
    assert overview.stat().st_size <= pictures.OVERVIEW_BYTES
    with Image.open(overview) as image:
        assert abs(image.width - pictures.OVERVIEW_WIDTH) < 40
    captions = (tmp_path / "pictures" / "README.md").read_text()
    assert compare.rule(*pictures.COMPARED) in captions
    assert "image 3, the plain student leads (F1 -0.46)" in captions


# ---- The tool -----------------------------------------------------------------------------------


def test_the_tool_tells_a_mistake_in_one_sentence(tmp_path):
    (tmp_path / "mine.txt").touch()
    result = subprocess.run(
        [sys.executable, "tools/demo.py", "--output", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: --output") and result.stderr.count("\n") == 1
