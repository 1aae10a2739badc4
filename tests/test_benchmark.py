"""The benchmark: its rows, its numbers, its JSON, and what it says to bad flags."""

import json
import logging

import pytest
import torch
from builders import TINY, TINY_TEACHER, TOY, run_tool
from detectron2.utils.events import EventStorage
from torch import nn

from era.benchmark import report
from era.benchmark.cli import choose, main, read_size
from era.benchmark.measure import Times, measure, reports, resident_growth
from era.benchmark.reference import PlainLossERA
from era.benchmark.rows import (
    FAST,
    FLOOR,
    INFERENCE,
    MIMIC,
    MIMIC_KEYS,
    PLAIN,
    REFERENCE,
    TEACHER,
    Bench,
    plan,
)
from era.config import load_config
from era.errors import UserError
from era.modeling.distiller import Distiller

CPU = torch.device("cpu")
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
    levers = [name for name in rows if name.endswith(" off")]
    assert {PLAIN, TEACHER, FLOOR, MIMIC, REFERENCE, FAST, INFERENCE} < set(rows)
    assert {"inference: alpha 1", "inference: teacher"} < set(rows)
    assert len(levers) == 8
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
    assert found["settings"]["anchors"] == 32 and found["settings"]["proposals"] == 16
    assert found["machine"]["torch"] == torch.__version__.split("+")[0]
    assert any("KD_WEIGHT is 0" in note for note in found["notes"])


def test_growth(result):
    found, _, _ = result
    names = [row["name"] for row in found["grow"]["branches"]]
    assert names == [FLOOR, *(f"{FAST}, N = {n}" for n in (1, 2, 4, 8))]
    assert {(r["height"], r["width"]) for r in found["grow"]["sizes"]} == {(64, 64), (64, 96)}
    assert {r["images"] for r in found["grow"]["images"]} == {1, 2}


def test_printed_tables(result):
    _, text, _ = result
    assert "| row | median ms | min | max | x base | CPU ms | CPU x base | peak MiB |" in text
    assert f"| {FLOOR} | " in text and "n/a |" in text
    assert "Machine: " in text and "Command: tools/benchmark.py --config-file" in text
    assert text.count("| --- | ---:") == 1 + 1 + 2 + 2


def test_profile(result):
    _, _, text = result
    assert f"== {FLOOR}: one step" in text and f"== {FAST} minus {FLOOR}" in text
    assert "aten::item" in text and "host waits for the device (calls): " in text


def losses_of(bench, method, inputs):
    model = Distiller(
        student=bench.student, teacher=bench.teacher, methods=nn.ModuleDict({"era": method})
    )
    model.train()
    torch.manual_seed(3)
    with EventStorage(0):
        losses = model(inputs)
    parameters = [*bench.student.backbone.parameters(), *method.parameters()]
    parameters = [p for p in parameters if p.requires_grad]
    return losses, torch.autograd.grad(sum(losses.values()), parameters)


@pytest.mark.parametrize("plain_heads", [True, False])
def test_reference_row_computes_what_era_computes(bench, plain_heads):
    inputs = bench.batch(64, 96, 2)
    expected, expected_gradients = losses_of(bench, bench.method(), inputs)
    reference = bench.method(kind=PlainLossERA, plain_heads=plain_heads)
    found, gradients = losses_of(bench, reference, inputs)
    assert set(found) == set(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)


def test_mimic_is_the_feature_loss_alone(bench):
    model = Distiller(
        student=bench.student,
        teacher=bench.teacher,
        methods=nn.ModuleDict({"era": bench.method(*MIMIC_KEYS)}),
    )
    with EventStorage(0):
        losses = model.train()(bench.batch(64, 96, 1))
    assert [name for name in losses if name.startswith("loss_era")] == ["loss_era_feature"]


def test_every_repeat_is_the_same_step(bench):
    inputs = bench.batch(64, 96, 1)
    before = {name: value.clone() for name, value in bench.student.named_parameters()}
    rows = plan(bench, inputs).make([FLOOR, FAST])
    measure(rows, CPU, warmup=1, repeats=1, title="test")
    torch.testing.assert_close(dict(bench.student.named_parameters()), before, rtol=0, atol=0)


def test_bfloat16(bench):
    half = Bench(bench.cfg, amp_dtype=torch.bfloat16)
    inputs = half.batch(64, 96, 1)
    rows = plan(half, inputs).make([FLOOR, REFERENCE, FAST, INFERENCE])
    assert len(measure(rows, CPU, warmup=0, repeats=1, title="test")) == 4


def test_ratios_are_by_round():
    base = Times("floor", "floor", wall_ms=[1.0, 10.0, 2.0], cpu_ms=[1.0, 1.0, 1.0], peak_mib=4.0)
    row = Times("x", "floor", wall_ms=[2.0, 11.0, 4.0], cpu_ms=[3.0, 2.0, 1.0], peak_mib=5.0)
    _, found = reports([base, row], CPU)
    assert found["ratio"] == 2.0 and found["ratio_of_medians"] == 2.0 and found["cpu_ratio"] == 2.0
    assert found["peak_ratio"] == 1.25
    assert "| x | 4.0 | 2.0 | 11.0 | 2.000 | 2.0 | 2.000 | 5 | 1.250 |" in report.markdown(
        [found], base="floor"
    )
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
    names = [FLOOR, FAST, "ERA fast, folding off"]
    assert choose(names, None) == names
    assert choose(names, ["era FAST"]) == [FAST]
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
