"""The benchmark: its rows, its numbers, its JSON, and what it says to bad flags."""

import json
import logging

import pytest
import torch
from builders import TINY, TINY_TEACHER, TOY, run_tool
from detectron2.utils.events import EventStorage

from era.benchmark import report
from era.benchmark.cli import choose, main, read_size
from era.benchmark.measure import Times, measure, reports, resident_growth
from era.benchmark.rows import (
    ALPHA_1,
    FLOOR,
    INFERENCE,
    PLAIN,
    TEACHER,
    Bench,
    other_methods,
    plan,
    run_name,
)
from era.config import load_config
from era.errors import UserError
from era.modeling.distiller import Distiller
from era.registry import METHOD_REGISTRY, methods_of

CPU = torch.device("cpu")
ERA = "ERA"
OPTS = [
    *TINY,
    "MODEL.TEACHER.CONFIG_FILE", str(TOY / "teacher.yaml"),
    "MODEL.TEACHER.OPTS", str(TINY_TEACHER),
    "MODEL.ERA.NORM", "none",
    "MODEL.ERA.HIDDEN_CHANNELS", "4",
    "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "8",
]  # fmt: skip
FLAGS = ["--config-file", str(TOY / "era.yaml"), "--height", "64", "--width", "96"]
SHORT = [*FLAGS, "--device", "cpu", "--repeats", "2", "--warmup", "1"]


@pytest.fixture(scope="module", autouse=True)
def _loggers():
    """The tool silences one logger for its process; put it back."""
    logger = logging.getLogger("era.modeling.teacher")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def bench():
    cfg = load_config(str(TOY / "era.yaml"), OPTS)
    cfg.MODEL.TEACHER.WEIGHTS = ""
    cfg.MODEL.TEACHER.ALLOW_RANDOM = True
    cfg.MODEL.ERA.KD_WEIGHT = 1.0
    cfg.SOLVER.BASE_LR = 0.0
    return Bench(cfg)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One run of everything through the command line's main."""
    folder = tmp_path_factory.mktemp("benchmark")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "builtins.print", lambda *a, sep=" ", **k: printed.append(sep.join(map(str, a)))
        )
        main([*SHORT, "--grow", "--grow-sizes", "64x64,64x96", "--profile", str(folder / "p.txt"),
              "--json", str(folder / "r.json"), *OPTS])  # fmt: skip
    profile = (folder / "p.txt").read_text(encoding="utf-8")
    return json.loads((folder / "r.json").read_text(encoding="utf-8")), "\n".join(printed), profile


def test_rows_and_numbers(result):
    found, _, _ = result
    rows = {row["name"]: row for row in found["rows"]}
    assert {PLAIN, TEACHER, FLOOR, ERA, INFERENCE, ALPHA_1, "inference: teacher"} < set(rows)
    of_the_method = {name.removeprefix("ERA, ") for name in rows if name.startswith("ERA, ")}
    assert {
        "as defined",
        "feature mimic alone",
        "sparse_rpn off",
        "N = 8",
        "with KD",
    } < of_the_method
    for row in rows.values():
        ms = row["ms"]
        assert 0 < ms["min"] <= ms["median"] <= ms["max"]
        assert len(ms["all"]) == 2 and row["cpu_ms"]["median"] > 0 and row["ratio"] > 0
        assert row["peak_mib"] is None
    assert rows[FLOOR]["ratio"] == rows[FLOOR]["cpu_ratio"] == rows[INFERENCE]["ratio"] == 1
    assert rows[FLOOR]["cpu_ms"]["min"] > rows[TEACHER]["cpu_ms"]["min"]
    assert rows[FLOOR]["cpu_ms"]["min"] > 0.5 * rows[PLAIN]["cpu_ms"]["min"]  # short and noisy
    assert {row["base"] for row in rows.values()} == {FLOOR, INFERENCE, TEACHER}
    assert f"{TEACHER}, channels-last on" in rows and not any("compile" in n for n in rows)


def test_json_says_where_it_comes_from(result):
    found, _, _ = result
    assert set(found) == {"schema", "machine", "settings", "notes", "rows", "grow"}
    assert found["settings"]["images"] == 1 and found["settings"]["height"] == 64
    assert found["settings"]["methods"]["ERA"]["NUM_BRANCHES"] == 4
    assert found["machine"]["torch"] == torch.__version__.split("+")[0]


def test_a_method_whose_name_is_not_in_capitals(tmp_path):
    name = ["MODEL.DISTILLER.METHODS", "['Mimic']", "MODEL.MIMIC.LEVELS", "['p3', 'p4', 'p5']"]
    file = tmp_path / "r.json"
    main([*SHORT, "--rows", "mimic", "--json", str(file), *OPTS, *name])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["settings"]["methods"]["Mimic"]["WEIGHT"] == 1.0
    assert [row["name"] for row in found["rows"]] == [FLOOR, "Mimic"]


def test_growth(result):
    found, _, _ = result
    assert [row["name"] for row in found["grow"]["sizes"]] == [PLAIN, FLOOR, ERA] * 2
    assert {(r["height"], r["width"]) for r in found["grow"]["sizes"]} == {(64, 64), (64, 96)}
    assert {r["images"] for r in found["grow"]["images"]} == {1, 2}


def test_printed_tables(result):
    _, text, _ = result
    heads = [
        cell.strip() for cell in next(x for x in text.splitlines() if "median ms" in x).split("|")
    ]
    assert heads[1:-1] == [
        "row",
        "median ms",
        "min",
        "max",
        "x base",
        "CPU ms",
        "CPU x base",
        "peak MiB",
    ]
    assert f"| {FLOOR} " in text and "– |" in text and "TWI.PROPOSALS_PER_IMAGE 8" in text
    assert "Machine: " in text and "Command: tools/benchmark.py --config-file" in text
    assert text.count("median ms") == 1 + 2 + 2


def test_profile(result):
    _, _, text = result
    assert f"== {FLOOR}: one step" in text and f"== {ERA} minus {FLOOR}" in text
    assert "aten::item" in text and "host waits for the device (calls): " in text


def test_a_row_is_the_method_with_one_setting_changed(bench):
    inputs = bench.batch(64, 96, 1)
    build = methods_of(bench.cfg)["era"].benchmark_rows(bench.cfg)["feature mimic alone"]
    model = Distiller(
        student=bench.student, teacher=bench.teacher, methods=bench.methods(era=build)
    )
    with EventStorage(0):
        losses = model.train()(inputs)
    assert [name for name in losses if name.startswith("loss_era")] == ["loss_era_feature"]
    assert set(plan(bench, inputs).makers) > {"ERA", "ERA, feature mimic alone"}
    assert run_name(bench.cfg) == "ERA"


def test_every_repeat_is_the_same_step(bench):
    inputs = bench.batch(64, 96, 1)
    before = {name: value.clone() for name, value in bench.student.named_parameters()}
    rows = plan(bench, inputs).make([FLOOR, ERA])
    measure(rows, CPU, warmup=1, repeats=1, title="test")
    torch.testing.assert_close(dict(bench.student.named_parameters()), before, rtol=0, atol=0)


def test_bfloat16(bench):
    half = Bench(bench.cfg, amp_dtype=torch.bfloat16)
    inputs = half.batch(64, 96, 1)
    rows = plan(half, inputs).make([FLOOR, "ERA, as defined", ERA, INFERENCE])
    assert len(measure(rows, CPU, warmup=0, repeats=1, title="test")) == 4


def test_ratios_are_by_round():
    base = Times("floor", "floor", wall_ms=[1.0, 10.0, 2.0], cpu_ms=[1.0, 1.0, 1.0], peak_mib=4.0)
    row = Times("x", "floor", wall_ms=[2.0, 11.0, 4.0], cpu_ms=[3.0, 2.0, 1.0], peak_mib=5.0)
    _, found = reports([base, row], CPU)
    assert found["ratio"] == 2.0 and found["ratio_of_medians"] == 2.0 and found["cpu_ratio"] == 2.0
    assert found["peak_ratio"] == 1.25
    cells = [
        cell.strip() for cell in report.markdown([found], base="floor").splitlines()[2].split("|")
    ]
    assert cells[1:-1] == ["x", "4.0", "2.0", "11.0", "2.000", "2.0", "2.000", "5", "1.250"]
    (alone,) = reports([row], CPU)
    assert alone["ratio"] is None and alone["peak_ratio"] is None


def test_resident_growth_counts_what_a_step_allocates():
    class Big:
        def prepare(self):
            pass

        def step(self):
            torch.ones(64 * 2**18)  # 64 MiB

    assert resident_growth(Big) > 0


def test_choosing_rows():
    names = [FLOOR, ERA, "ERA, sparse_rpn off"]
    assert choose(names, None) == names
    assert choose(names, ["era"]) == [ERA]
    assert choose(names, ["*off", "floor"]) == [FLOOR, names[2]]
    assert read_size("320x480") == (320, 480)


BAD = {
    "unknown device": (["--device", "tpu"], "--device is 'tpu'"),
    "unknown precision": (["--precision", "int4"], "--precision is 'int4'"),
    "no image": (["--images", "0"], "--images is 0"),
    "no repeat": (["--repeats", "0"], "--repeats is 0"),
    "too small": (["--height", "8"], "--height is 8"),
    "no size": (["--grow-sizes", "big"], "--grow-sizes has 'big'"),
    "folder is not there": (["--json", "/no/such/folder/x.json"], "--json is /no/such"),
    "no distiller": (["--config-file", str(TOY / "plain.yaml")], "expected a Distiller"),
    "no config": (["--config-file", "nothing.yaml"], "nothing.yaml"),
    "no row": (["--rows", "nothing"], "matches no row"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case):
    flags, words = BAD[case]
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        main([*SHORT, *flags, *OPTS])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(UserError, match="finds no GPU"):
        main([*FLAGS, "--device", "cuda"])


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        main([*FLAGS, "--compile"])


def test_the_tool_tells_a_mistake_in_one_sentence():
    done = run_tool("benchmark.py", "--device", "tpu")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --device is 'tpu'")
    assert "Traceback" not in done.stderr


def test_every_other_method_has_a_row_or_a_reason(bench):
    """One step each; the toy pyramid has no p2, which methods look at by default."""
    inputs = bench.batch(64, 96, 2)
    planned = plan(bench, inputs)
    before = set(planned.makers)
    other_methods(bench, inputs, planned)
    names, notes = set(planned.makers) - before, " ".join(planned.notes)
    assert names | {n for n, _ in METHOD_REGISTRY if f"{n} is left out: " in notes} == {
        name for name, _ in METHOD_REGISTRY
    } - {ERA}
    assert "KD" in names and "PKD is left out: MODEL.PKD.LEVELS is" in notes
    for row in planned.make(sorted(names)):
        row.prepare()
        row.step()


def test_rows_of_a_dense_detector_and_those_that_do_not_fit(monkeypatch):
    """Its own rows, each of which makes a step; a row that cannot be built is a note."""
    teacher = ["MODEL.TEACHER.CONFIG_FILE", str(TOY / "retinanet_teacher.yaml")]
    opts = [
        *TINY,
        *teacher,
        "MODEL.TEACHER.OPTS",
        str(TINY_TEACHER),
        "MODEL.ERA.HIDDEN_CHANNELS",
        "4",
    ]
    cfg = load_config(str(TOY / "retinanet_era.yaml"), opts)
    cfg.MODEL.TEACHER.WEIGHTS = ""
    cfg.MODEL.TEACHER.ALLOW_RANDOM = True
    own = METHOD_REGISTRY.get(ERA).benchmark_rows

    def refuse(*_):
        raise UserError("not with these two")

    monkeypatch.setattr(
        METHOD_REGISTRY.get(ERA),
        "benchmark_rows",
        classmethod(lambda _, cfg: {**own(cfg), "odd": refuse}),
    )
    bench = Bench(cfg)
    planned = plan(bench, bench.batch(64, 96, 1))
    assert "ERA, odd is left out: not with these two" in planned.notes
    rows = {name for name in planned.makers if name.startswith("ERA, ")}
    assert {"ERA, sparse_dense off", "ERA, with TWI of the dense head", "ERA, N = 2"} < rows
    assert "ERA, odd" not in rows and "ERA, with KD" not in rows
    for row in planned.make([FLOOR, ERA, "ERA, sparse_dense off", ALPHA_1]):
        row.prepare()
        row.step()
