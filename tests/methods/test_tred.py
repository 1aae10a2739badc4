"""TRED: its MMD by hand and against numpy, both of its runs, and the chain of the two."""

import math

import numpy as np
import pytest
import torch
from builders import REPO, TINY, TINY_TEACHER, batch, losses_of, tiny_cfg, tiny_model

from era.engine.launch import train_net
from era.errors import UserError
from era.losses import mse
from era.methods.tred import TRED as Method
from era.methods.tred import Disentangler, squared_mmd
from era.modeling.step import Step

LEVELS = ("p3", "p4", "p5")
TRED = ["MODEL.DISTILLER.METHODS", "('TRED',)", "MODEL.TRED.LEVELS", str(list(LEVELS))]
SPLIT = [*TRED, "MODEL.TRED.STAGE", "disentangle"]
WIDE = ["MODEL.FPN.OUT_CHANNELS", "24"]
each_batch = pytest.mark.parametrize(
    "objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"]
)


# ---- MMD ---------------------------------------------------------------------------------------------


def test_mmd_by_hand():
    """x = 0 and y = 3: the median of the one squared distance is 9, k(x, x) = k(y, y) = 1, k(x, y) = e^(-1/h)."""
    x, y = torch.tensor([[0.0]]), torch.tensor([[3.0]])
    assert squared_mmd(x, y, (1.0,)).item() == pytest.approx(2 - 2 * math.exp(-1), rel=1e-6)
    kernel = (math.exp(-2) + math.exp(-1) + math.exp(-0.5)) / 3
    assert squared_mmd(x, y).item() == pytest.approx(2 - 2 * kernel, rel=1e-6)


def numpy_mmd(x, y, bandwidths=(0.5, 1.0, 2.0)):
    rows = np.concatenate([x, y])
    squares = [[((a - b) ** 2).sum() for b in rows] for a in rows]
    pairs = sorted(squares[i][j] for i in range(len(rows)) for j in range(i + 1, len(rows)))
    median = pairs[(len(pairs) - 1) // 2]  # of an even number the lower of the two

    def kernel(a, b):
        return np.mean([math.exp(-((a - b) ** 2).sum() / (h * median)) for h in bandwidths])

    def mean(first, second):
        return np.mean([kernel(a, b) for a in first for b in second])

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (1, 6)])
def test_mmd_against_numpy(sizes):
    draw = np.random.default_rng(0)
    x, y = draw.normal(0, 1, (sizes[0], 7)), draw.normal(0.5, 2, (sizes[1], 7))
    found = squared_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert found.item() == pytest.approx(numpy_mmd(x, y), rel=1e-9)


def test_mmd_is_bounded_and_does_not_grow_with_the_scale():
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    assert squared_mmd(x, x).item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(squared_mmd(x, y), squared_mmd(y, x))
    torch.testing.assert_close(squared_mmd(1000 * x, 1000 * y), squared_mmd(x, y))
    torch.testing.assert_close(squared_mmd(x + 7, y + 7), squared_mmd(x, y))
    for gap in (1.0, 10.0, 1e4):
        assert 0 <= squared_mmd(x, y + gap).item() <= 2
    assert squared_mmd(x, y + 10) > squared_mmd(x, y)


@pytest.mark.parametrize("rows", [torch.zeros(4, 3), torch.ones(1, 3), torch.zeros(0, 3)])
def test_mmd_of_rows_that_are_alike_or_none_is_zero_with_a_finite_gradient(rows):
    x = rows.clone().requires_grad_()
    found = squared_mmd(x, rows)
    found.backward()
    assert found.item() == 0 and torch.isfinite(x.grad).all()
    mostly = torch.zeros(8, 3)
    mostly[0] = 1.0  # the median distance is 0
    x = mostly.clone().requires_grad_()
    squared_mmd(x, torch.zeros(8, 3)).backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_mmd_in_half_precision_does_not_overflow():
    x = torch.full((2, 64), 200.0, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = squared_mmd(x, -x.detach())
    assert found.dtype == torch.float32 and found.item() > 1
    found.backward()
    assert torch.isfinite(x.grad).all()


# ---- the run that disentangles -----------------------------------------------------------------------


def test_both_parts_start_from_half_of_the_map():
    maps = {level: torch.randn(2, 16, 5, 4) for level in LEVELS}
    relevant, rest = Disentangler(LEVELS, 16)(maps)
    for level in LEVELS:
        assert relevant[level].shape == rest[level].shape == maps[level].shape
        assert mse(relevant[level], maps[level] / 2) < 0.01
        assert mse(relevant[level] + rest[level], maps[level]) < 0.01
        assert not torch.equal(relevant[level], rest[level])


def test_the_split_by_hand():
    split = Disentangler(["p3"], 2)
    with torch.no_grad():
        split.splits["p3"].weight.copy_(
            torch.tensor([[1.0, 0], [0, 2], [0, 1], [1, 1]])[..., None, None]
        )
    relevant, rest = split({"p3": torch.tensor([3.0, 5.0])[None, :, None, None]})
    assert relevant["p3"].flatten().tolist() == [3, 10] and rest["p3"].flatten().tolist() == [5, 8]


def step_of(model, inputs):
    torch.manual_seed(7)
    with torch.no_grad(), model.detector.record() as recording:
        model.student(inputs)
    return Step(inputs, recording, model.detector, model.teacher)


@each_batch
def test_the_first_run_trains_the_disentangler_alone(objects):
    model = tiny_model("era", *SPLIT, teacher_opts=WIDE)
    losses, storage = losses_of(model, batch(objects))
    names = ("task", "reconstruction", "mmd")
    assert losses.keys() == {f"loss_tred_{name}" for name in names}
    with storage:
        step = step_of(model, batch(objects))
        maps, judge = step.teacher_features, model.teacher.detector
        parts = {
            level: conv(maps[level]).split(24, 1)
            for level, conv in model.methods["tred"].disentangler.splits.items()
        }
        seen = [
            {level: parts[level][i] if level in parts else maps[level] for level in maps}
            for i in (0, 1)
        ]
        samples = step.student.sample(32).proposals
        expected = {
            "task": judge.head_loss("rpn", seen[0], step.student)
            + judge.head_loss("roi", seen[0], step.student),
            "reconstruction": sum(mse(seen[0][x] + seen[1][x], maps[x]) for x in LEVELS),
            "mmd": -0.1 * squared_mmd(*(judge.vectors(x, samples) for x in seen)),
        }
    for name in names:
        torch.testing.assert_close(losses[f"loss_tred_{name}"], expected[name])
    sum(losses.values()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"methods.tred.disentangler.splits.{level}.{x}" for level in LEVELS for x in ("weight", "bias")
    }  # fmt: skip
    assert all(p.grad is None for p in model.teacher.parameters())


def test_a_term_of_weight_0_is_left_out():
    opts = ["MODEL.TRED.MMD_WEIGHT", "0.0", "MODEL.TRED.RECONSTRUCTION_WEIGHT", "0.0"]
    losses, _ = losses_of(tiny_model("era", *SPLIT, *opts), batch())
    assert losses.keys() == {"loss_tred_task"}


def test_the_parts_move_apart_and_still_make_up_the_map():
    """A few steps on one batch: every term falls, so MMD grows."""
    model = tiny_model("era", *SPLIT, "MODEL.TRED.MMD_WEIGHT", "1.0")
    optimizer = torch.optim.SGD(model.methods.parameters(), lr=0.02)
    history = []
    for _ in range(15):
        losses, _ = losses_of(model, batch())
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert history[-1]["loss_tred_mmd"] < history[0]["loss_tred_mmd"] <= 0
    assert sum(history[-1].values()) < sum(history[0].values())


# ---- the run that distils ----------------------------------------------------------------------------


@each_batch
@pytest.mark.parametrize("teacher_opts", [(), WIDE], ids=["equal width", "wider"])
def test_the_second_run_mimics_what_is_relevant(objects, teacher_opts):
    model = tiny_model("era", *TRED, "MODEL.TRED.WEIGHT", "3.0", teacher_opts=teacher_opts)
    losses, storage = losses_of(model, batch(objects))
    with storage:
        step, method = step_of(model, batch(objects)), model.methods["tred"]
        relevant, _ = method.disentangler(step.teacher_features)
        own = step.student.features
        expected = 3 * sum(mse(method.adapter(own[x]), relevant[x]) for x in LEVELS)
    torch.testing.assert_close(losses["loss_tred_mimic"], expected.detach())
    losses["loss_tred_mimic"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    adapter = (
        {"methods.tred.adapter.weight", "methods.tred.adapter.bias"} if teacher_opts else set()
    )
    assert {name for name in reached if name.startswith("methods.")} == adapter
    assert any(name.startswith("student.backbone") for name in reached)
    assert all(p.grad is None for p in model.teacher.parameters())


def test_weight_0_is_plain_training_and_needs_no_part():
    plain, _ = losses_of(tiny_model("plain"), batch())
    model = tiny_model("era", *TRED, "MODEL.TRED.WEIGHT", "0.0")
    found, _ = losses_of(model, batch())
    assert found == plain and not list(model.methods["tred"].parameters())


def test_with_era_the_losses_add_up():
    """The disentangler, built after ERA's modules, starts from other noise: its loss is apart."""
    alone, _ = losses_of(tiny_model("era"), batch())
    opts = ["MODEL.DISTILLER.METHODS", "('ERA', 'TRED')", *TRED[2:]]
    both, _ = losses_of(tiny_model("era", *opts), batch())
    assert both.pop("loss_tred_mimic") > 0
    torch.testing.assert_close(both, alone)


def test_neither_building_nor_training_moves_the_global_random_state():
    state = []
    for opts in (["plain"], ["era", *TRED], ["era", *SPLIT]):
        losses_of(tiny_model(*opts), batch())
        state.append(torch.get_rng_state())
    assert all(torch.equal(state[0], other) for other in state[1:])


def test_needs_and_stages():
    cfg = tiny_cfg("era", *TRED)
    assert not Method.needs(cfg).labels and not Method.prepares(cfg)
    assert Method.needs(cfg).more == ("a trained disentangler",)
    cfg.MODEL.TRED.STAGE = "disentangle"
    assert Method.needs(cfg).labels and Method.prepares(cfg)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.TRED.STAGE", "head"], r"MODEL\.TRED\.STAGE is 'head': expected one of disentangle, distil"),
        (["MODEL.TRED.MMD_WEIGHT", "-1.0"], r"MODEL\.TRED\.MMD_WEIGHT is -1\.0"),
        (["MODEL.TRED.LEVELS", "[]"], r"MODEL\.TRED\.LEVELS is empty"),
        (["MODEL.TRED.LEVELS", "['p3', 'p3']"], r"MODEL\.TRED\.LEVELS is \['p3', 'p3'\], with a level twice"),
        (["MODEL.TRED.LEVELS", "['p9']"], r"MODEL\.TRED\.LEVELS is \['p9'\].*student"),
        (["MODEL.TRED.MMD_SAMPLES_PER_IMAGE", "0"], r"MODEL\.TRED\.MMD_SAMPLES_PER_IMAGE is 0"),
    ],
)  # fmt: skip
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=words):
        tiny_model("era", *TRED, *opts)


def test_a_teacher_that_makes_no_vectors_is_refused():
    conv = ["MODEL.ROI_BOX_HEAD.NUM_FC", "0", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1"]
    with pytest.raises(UserError, match=r"MMD_WEIGHT is above 0, and the teacher is a RCNN"):
        tiny_model("era", *SPLIT, teacher_opts=conv)


# ---- the chain ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tiny_data, tmp_path_factory):
    """A teacher's file, and the two runs of the chain after each other."""
    folder = tmp_path_factory.mktemp("tred")
    weights = folder / "teacher.pth"
    torch.save({"model": tiny_model("era", *SPLIT).teacher.model.state_dict()}, weights)

    def run(config, name, *opts):
        train_net(
            ["--config-file", str(REPO / f"configs/toy/methods/{config}.yaml"), *TINY,
             *tiny_data, "MODEL.TEACHER.CONFIG_FILE", str(REPO / "configs/toy/teacher.yaml"),
             "MODEL.TEACHER.OPTS", str(TINY_TEACHER), "MODEL.TEACHER.WEIGHTS", str(weights),
             "OUTPUT_DIR", str(folder / name), "SOLVER.CHECKPOINT_PERIOD", "2", *opts]
        )  # fmt: skip

    run("tred_disentangle", "part", "SOLVER.MAX_ITER", "4")
    run.part = folder / "part" / "model_final.pth"
    run("tred", "distil", "MODEL.TRED.DISENTANGLER_WEIGHTS", str(run.part), "SOLVER.MAX_ITER", "2")
    return run, folder


def saved(path):
    return torch.load(path, weights_only=True)["model"]


def test_the_student_learns_from_the_disentangler_that_was_trained(chain):
    _, folder = chain
    part, own = saved(folder / "part/model_final.pth"), saved(folder / "distil/model_final.pth")
    keys = {key for key in part if key.startswith("methods.")}
    assert len(keys) == 6 and keys == {key for key in own if key.startswith("methods.")}
    assert all(torch.equal(part[key], own[key]) for key in keys)
    first = saved(folder / "part/model_0000001.pth")
    assert any(not torch.equal(first[key], part[key]) for key in keys)
    trained = {key for key in part if key.startswith("student.") and "running" not in key}
    assert all(torch.equal(first[key], part[key]) for key in trained if "num_batches" not in key)
    assert not (folder / "part/student").exists() and not (folder / "part/inference").exists()


def test_the_students_file_holds_nothing_of_the_method(chain):
    _, folder = chain
    own = saved(folder / "distil/student/model_final.pth")
    assert own.keys() == tiny_model("plain").state_dict().keys()
    assert "TRED" not in (folder / "distil/student/config.yaml").read_text()


@pytest.mark.parametrize(
    "case, words",
    [
        ("missing", r'MODEL\.TRED\.DISENTANGLER_WEIGHTS is "": expected the checkpoint of the run'),
        ("absent", r"absent\.pth' cannot be opened"),
        ("no part", r"DISENTANGLER_WEIGHTS .* holds no methods\.tred\.disentangler\.\*"),
        ("other teacher", r"DISENTANGLER_WEIGHTS .* another teacher than MODEL\.TEACHER\.WEIGHTS"),
        ("misfitting", r"DISENTANGLER_WEIGHTS .* does not fit: below methods\.tred\.disentangler\."),
    ],
)  # fmt: skip
def test_a_part_that_does_not_serve_is_one_sentence_before_anything_is_written(
    chain, tmp_path, case, words
):
    run, _ = chain
    path = {"missing": "", "absent": str(tmp_path / "absent.pth")}.get(case)
    if path is None:
        data = torch.load(run.part, weights_only=True)
        if case == "no part":
            data["model"] = {k: v for k, v in data["model"].items() if "methods" not in k}
        elif case == "other teacher":
            data["teacher"]["sha256"] = "0" * 64
        else:
            del data["model"]["methods.tred.disentangler.splits.p3.weight"]
        path = str(tmp_path / "part.pth")
        torch.save(data, path)
    with pytest.raises(UserError, match=words):
        run("tred", str(tmp_path / "run"), "MODEL.TRED.DISENTANGLER_WEIGHTS", path)
    assert not (tmp_path / "run").exists()
