"""MTPD: MGD's loss under its own keys, and the chain of its steps."""

import pytest
import torch
from builders import REPO, TINY, TINY_TEACHER, batch, losses_of, tiny_cfg, tiny_model
from study_case import two_checkouts

from era.engine.launch import train_net
from era.errors import UserError
from era.runs.plan import make_runs
from era.runs.schema import read_plan

LEVELS = "['p3', 'p4', 'p5']"
CONFIG = REPO / "configs/toy/methods/mtpd.yaml"
PLAN = REPO / "studies/mtpd.yaml"


def test_keys_and_their_defaults_are_the_sources():
    keys = tiny_cfg("plain").MODEL
    assert keys.MTPD == keys.MGD
    assert (keys.MTPD.WEIGHT, keys.MTPD.MASK_RATIO) == (5e-7, 0.45)
    assert list(keys.MTPD.LEVELS) == ["p2", "p3", "p4", "p5"]
    assert keys.DISTILLER.INIT_STUDENT == "none"
    assert tiny_cfg("methods/mtpd").MODEL.DISTILLER.INIT_STUDENT == "heads"


def test_the_loss_is_mgds_with_its_own_keys():
    """From the same weights, to the bit; MGD's keys do not count."""
    found = {}
    for name, other in (("MGD", "MTPD"), ("MTPD", "MGD")):
        opts = ["MODEL.DISTILLER.METHODS", f"('{name}',)", f"MODEL.{other}.WEIGHT", "7.0"]
        for key, value in (("LEVELS", LEVELS), ("WEIGHT", "0.01"), ("MASK_RATIO", "0.65")):
            opts += [f"MODEL.{name}.{key}", value]
        losses, _ = losses_of(tiny_model("era", *opts), batch())
        found[name] = losses.pop(f"loss_{name.lower()}_feature")
    assert found["MTPD"] > 0 and torch.equal(found["MGD"], found["MTPD"])


def test_a_share_that_is_none_is_told_by_the_own_key():
    opts = ["MODEL.DISTILLER.METHODS", "('MTPD',)", "MODEL.MTPD.LEVELS", LEVELS]
    with pytest.raises(UserError, match=r"^MODEL\.MTPD\.MASK_RATIO is 1\.5: expected a share"):
        tiny_model("era", *opts, "MODEL.MTPD.MASK_RATIO", 1.5)


# ---- the chain ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tiny_data, tmp_path_factory):
    """Trains a step of the chain from the files of two teachers; the first step is there."""
    folder = tmp_path_factory.mktemp("chain")
    for seed, name in enumerate(("weak", "strong")):
        torch.save({"model": tiny_model(seed=seed).teacher.model.state_dict()}, folder / name)

    def run(name, teacher, *opts, flags=()):
        train_net(
            ["--config-file", str(CONFIG), *flags, *TINY, *tiny_data, "DATASETS.TEST", "()",
             "MODEL.TEACHER.CONFIG_FILE", str(REPO / "configs/toy/teacher.yaml"),
             "MODEL.TEACHER.OPTS", str(TINY_TEACHER), "MODEL.TEACHER.WEIGHTS", str(folder / teacher),
             "MODEL.MTPD.WEIGHT", "0.001", "OUTPUT_DIR", str(folder / name), *opts]
        )  # fmt: skip

    run("step1", "weak", "SOLVER.MAX_ITER", "2")
    return run, folder


def saved(path):
    """The student's weights and those of the methods, without statistics."""
    weights = torch.load(path, weights_only=True)["model"]
    return (
        {k: v for k, v in weights.items() if k.startswith("student.") and "running" not in k and "tracked" not in k},
        {k: v for k, v in weights.items() if k.startswith("methods.")},
    )  # fmt: skip


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


STILL = ["SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "1e-30", "MODEL.DISTILLER.INIT_STUDENT", "none"]


def test_the_next_step_takes_the_student_alone_and_its_modules_begin_afresh(chain):
    """At a learning rate that vanishes in float32 a step ends where it began."""
    run, folder = chain
    first = folder / "step1" / "model_final.pth"
    run("afresh", "strong", *STILL)
    run("step2", "strong", *STILL, "MODEL.WEIGHTS", str(first))
    student, modules = saved(folder / "step2/model_final.pth")
    before, trained = saved(first)
    other, afresh = saved(folder / "afresh/model_final.pth")
    assert same(student, before) and not same(student, other)
    assert same(modules, afresh) and not same(modules, trained)


@pytest.mark.parametrize(
    "file", ["step1/model_final.pth", "step1/student/model_final.pth"], ids=["distilled", "plain"]
)
def test_inheritance_that_would_undo_the_last_step_is_refused(chain, file):
    run, folder = chain
    words = r"MODEL\.WEIGHTS .* MODEL\.DISTILLER\.INIT_STUDENT heads would .*: set .* none to go on"
    with pytest.raises(UserError, match=words):
        run("undone", "strong", "MODEL.WEIGHTS", str(folder / file))
    assert not (folder / "undone").exists()


def test_a_backbone_leaves_room_for_inherited_heads(chain):
    run, folder = chain
    weights, _ = saved(folder / "step1/model_final.pth")
    backbone = {k.removeprefix("student."): v for k, v in weights.items() if "backbone" in k}
    torch.save({"model": backbone}, folder / "backbone.pth")
    still = [*STILL[:4], "MODEL.WEIGHTS", str(folder / "backbone.pth")]
    run("inherited", "strong", *still)
    student, _ = saved(folder / "inherited/model_final.pth")
    teacher = torch.load(folder / "strong", weights_only=True)["model"]
    for key, value in student.items():
        name = key.removeprefix("student.")
        source = backbone if name in backbone else teacher
        if name not in ("pixel_mean", "pixel_std"):
            assert torch.allclose(value, source[name], rtol=0, atol=1e-30), key


def test_a_first_step_that_is_missing_is_one_sentence(chain):
    run, folder = chain
    with pytest.raises(UserError, match=r"weights .*absent\.pth' cannot be opened"):
        run("missing", "strong", "MODEL.WEIGHTS", str(folder / "absent.pth"), *STILL)
    assert not (folder / "missing").exists()


# ---- the plan of it -----------------------------------------------------------------------------------


def test_the_plan_leads_from_the_weak_teacher_to_the_strong_one(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    runs = {run.name: run for run in make_runs(read_plan(PLAN), tmp_path, seeds=[2])}
    first, second, alone = (runs[f"{name}_seed2"] for name in ("step1", "mtpd", "strong_alone"))
    assert first.depends_on == ("weak",) and second.depends_on == ("step1_seed2", "strong")
    assert str(tmp_path / "step1_seed2/model_final.pth") == second.config.MODEL.WEIGHTS
    for run, teacher in ((first, "weak"), (second, "strong"), (alone, "strong")):
        assert str(tmp_path / f"{teacher}/model_final.pth") == run.config.MODEL.TEACHER.WEIGHTS
        assert runs[teacher].config_file == run.config.MODEL.TEACHER.CONFIG_FILE
    assert [run.inherited for run in (first, second, alone)] == ["heads", "nothing", "heads"]
    plain = runs["plain_seed2"]
    assert first.iterations + second.iterations == alone.iterations == plain.iterations
    data = {run.config.DATASETS.TRAIN for run in (first, second, alone, plain)}
    assert data == {("era_toy_train_200",)}
    weak, strong = runs["weak"], runs["strong"]
    assert weak.config.DATASETS == strong.config.DATASETS and weak.iterations < strong.iterations


def test_a_plan_that_would_undo_a_step_is_refused_before_any_run(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(PLAN.read_text().replace(", MODEL.DISTILLER.INIT_STUDENT: none", ""))
    words = r"INIT_STUDENT of the run mtpd_seed1 is heads, .* step1 trained .*: set it to none"
    with pytest.raises(UserError, match=words):
        make_runs(read_plan(wrong), tmp_path)


def test_the_command_goes_on_after_the_last_complete_step(tmp_path, monkeypatch, capsys):
    ap = {"weak": 30, "strong": 50, "plain": 10, "strong_alone": 15, "step1": 12, "mtpd": 18}
    with two_checkouts(tmp_path, monkeypatch, PLAN.read_text(), ap) as (here, _):
        here.failing = {"mtpd_seed1"}
        assert here.study("--seeds", "1") == 1
        order = list(here.started)
        assert order.index("weak") < order.index("step1_seed1") < order.index("mtpd_seed1")
        here.failing = set()
        assert here.study("--seeds", "1") == 0 and list(here.started) == ["mtpd_seed1"]
        table = (here.root / "output/study/two/table.md").read_text()
        assert "MTPD, after the strong teacher" in table and "+3.0" in table
