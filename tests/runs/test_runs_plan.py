"""Plans: their YAML files, and the runs that they make."""

from pathlib import Path

import pytest
from builders import REPO

from era.config import student_config
from era.errors import UserError
from era.registry import METHOD_REGISTRY
from era.runs.identity import identities
from era.runs.plan import NOTHING, check_overrides, make_runs
from era.runs.schema import read_plan

PLANS = sorted((REPO / "studies").glob("*.yaml"))
PLAN = """
title: Two ways
seeds: [1, 2]
baseline: plain
runs:
  teacher: {label: Teacher, config: configs/toy/teacher.yaml, role: teacher}
  plain: {label: Plain, config: configs/toy/plain.yaml, overrides: {SOLVER.BASE_LR: 0.5}}
  distilled:
    label: Distilled
    config: configs/toy/era.yaml
    weights: {MODEL.TEACHER.WEIGHTS: teacher}
  again: {label: Evaluated, evaluate: distilled, overrides: {MODEL.ROI_HEADS.NMS_THRESH_TEST: 0.4}}
  longer: {label: Longer, config: configs/toy/plain.yaml, iterations: {time_of: distilled, step_of: plain}}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a plan, by default PLAN, with one text replaced, and reads it."""
    monkeypatch.chdir(REPO)

    def write(old="", new="", text=PLAN):
        assert old in text
        path = tmp_path / "plan.yaml"
        path.write_text(text.replace(old, new, 1) if old else text)
        return read_plan(path)

    return write


def test_a_plan_becomes_processes_of_train_net(write, tmp_path):
    plan = write()
    runs = {run.name: run for run in make_runs(plan, tmp_path, opts=["SOLVER.MAX_ITER", "7"])}
    assert list(runs) == [
        "teacher", "plain_seed1", "plain_seed2", "distilled_seed1", "distilled_seed2",
        "again_seed1", "again_seed2", "longer_seed1", "longer_seed2",
    ]  # fmt: skip
    for run in runs.values():
        assert "tools/train_net.py" in run.command
        assert run.command[-2:] == ("SOLVER.MAX_ITER", "7")  # the user has the last word
        assert Path(run.config.OUTPUT_DIR) == run.folder == tmp_path / run.name
        assert (run.seed or 1) == run.config.SEED
    assert runs["teacher"].is_teacher and runs["teacher"].seed is None
    plain, distilled = runs["plain_seed2"], runs["distilled_seed2"]
    assert (plain.config.SOLVER.BASE_LR, plain.methods, plain.depends_on) == (0.5, (), ())
    assert str(tmp_path / "teacher" / "model_final.pth") == distilled.config.MODEL.TEACHER.WEIGHTS
    assert (distilled.iterations, distilled.methods) == (7, ("ERA",))
    assert distilled.depends_on == ("teacher",)


def test_an_evaluation_has_the_config_and_the_weights_of_its_training(write, tmp_path):
    run = {run.name: run for run in make_runs(write(), tmp_path)}["again_seed2"]
    assert "--eval-only" in run.command and run.iterations == 0
    assert str(tmp_path / "distilled_seed2" / "model_final.pth") == run.config.MODEL.WEIGHTS
    assert str(tmp_path / "teacher" / "model_final.pth") == run.config.MODEL.TEACHER.WEIGHTS
    assert run.config.MODEL.ROI_HEADS.NMS_THRESH_TEST == 0.4 and run.config.SEED == 2
    assert run.evaluates == "distilled_seed2"
    assert run.depends_on == ("teacher", "distilled_seed2")


def test_a_run_of_equal_time_waits_for_every_seed_of_the_others(write, tmp_path):
    run = make_runs(write(), tmp_path)[-1]
    assert run.time_of == ("distilled_seed1", "distilled_seed2")
    assert run.step_of == ("plain_seed1", "plain_seed2")
    assert run.depends_on == run.time_of + run.step_of


def test_seeds_variants_and_a_given_teacher(write, tmp_path):
    plan = write()
    given = {"teacher": tmp_path / "mine.pth"}
    runs = make_runs(plan, tmp_path, seeds=[9], only=["again"], given=given)
    assert [run.name for run in runs] == ["distilled_seed9", "again_seed9"]
    assert str(tmp_path / "mine.pth") == runs[0].config.MODEL.TEACHER.WEIGHTS
    assert [run.depends_on for run in runs] == [(), ("distilled_seed9",)]
    names = [run.variant for run in make_runs(plan, tmp_path, seeds=[3], only=["longer"])]
    assert names == ["teacher", "plain", "distilled", "longer"]
    with pytest.raises(UserError, match=r"has no run h1: it has teacher, plain"):
        make_runs(plan, tmp_path, only=["h1"])


def test_without_seeds_every_run_has_its_own_name(write, tmp_path):
    runs = make_runs(write("seeds: [1, 2]", ""), tmp_path)
    assert [run.name for run in runs] == ["teacher", "plain", "distilled", "again", "longer"]


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (["SOLVER.MAX_ITER"], "not pairs"),
        (["OUTPUT_DIR", "x"], "OUTPUT_DIR cannot be overridden"),
        (["SEED", "3"], "SEED cannot be overridden"),
        (["MODEL.TEACHER.WEIGHTS", "x"], r"MODEL.TEACHER.WEIGHTS .* says from which run"),
        (["MODEL.WEIGHTS", "x"], "MODEL.WEIGHTS cannot"),
    ],
)
def test_overrides_that_a_plan_cannot_work_with(write, opts, said):
    with pytest.raises(UserError, match=said):
        check_overrides(write(), opts)


def test_a_plan_is_about_one_dataset(write, tmp_path):
    with pytest.raises(UserError, match=r"run teacher has 2 datasets"):
        make_runs(write(), tmp_path, opts=["DATASETS.TEST", "('a', 'b')"])


def test_comparisons(write):
    plan = write()
    assert plan.compare == {"distilled": "plain", "again": "plain", "longer": "plain"}
    plan = write("runs:", "compare: {longer: distilled}\nruns:")
    assert plan.compare == {"longer": "distilled"}


def test_schedules_train_every_student_for_each(write, tmp_path):
    plan = write("runs:", "schedules: {short: 6, long: 12}\nruns:")
    assert list(plan.variants) == [
        "teacher", "plain_short", "plain_long", "distilled_short", "distilled_long", "again_short", "again_long",
        "longer_short", "longer_long",
    ]  # fmt: skip
    assert plan.baseline == "plain_short" and plan.compare["distilled_long"] == "plain_long"
    assert plan.compare["again_short"] == "plain_short" and len(plan.compare) == 6
    runs = {run.name: run for run in make_runs(plan, tmp_path, seeds=[1])}
    assert runs["teacher"].iterations == 900  # its config's
    assert runs["plain_short_seed1"].iterations == 6 and runs["plain_long_seed1"].iterations == 12
    assert runs["plain_long_seed1"].config.SOLVER.BASE_LR == 0.5
    assert runs["plain_long_seed1"].label == "Plain, long"
    evaluated = runs["again_long_seed1"]
    assert evaluated.evaluates == "distilled_long_seed1" and evaluated.config.SOLVER.MAX_ITER == 12
    assert dict(evaluated.weights) == {
        "MODEL.TEACHER.WEIGHTS": "teacher",
        "MODEL.WEIGHTS": "distilled_long_seed1",
    }
    longer = runs["longer_long_seed1"]
    assert (longer.time_of, longer.step_of) == (("distilled_long_seed1",), ("plain_long_seed1",))
    assert longer.config.SOLVER.MAX_ITER == 600  # until the others' steps are measured


def test_results_are_kept_below_the_repository(write):
    assert write().results is None
    assert write("runs:", "results: docs/results/two\nruns:").results == Path("docs/results/two")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("runs:", "results: /tmp/two\nruns:", "results is '/tmp/two': expected a folder below the repository"),
        ("runs:", "results: docs/../../two\nruns:", r"results is 'docs/../../two': expected a folder below"),
        ("runs:", "results: .\nruns:", r"results is '\.': expected a folder below"),
        ("runs:", "results: [a]\nruns:", r"results is \['a'\]: expected a text"),
        ("runs:", "schedules: {}\nruns:", r"schedules is \{\}: expected at least one name"),
        ("runs:", "schedules: 600\nruns:", "schedules is 600: expected a mapping"),
        ("runs:", "schedules: {a/b: 600}\nruns:", "a name in schedules is 'a/b': expected letters"),
        ("runs:", "schedules: {short: 0}\nruns:", "schedules.short is 0: expected a number of iterations"),
        ("runs:", "schedules: {short: 1.5}\nruns:", "schedules.short is 1.5: expected a number"),
        ("title: Two ways", "title: [", "is not YAML"),
        ("title: Two ways", "titel: Two ways", r"an entry of the plan is 'titel': expected one of title"),
        ("title: Two ways", "", "title is missing: expected a text"),
        ("[1, 2]", "[1, one]", r"seeds is \[1, 'one'\]: expected a list of different numbers"),
        ("[1, 2]", "[1, 1]", r"seeds is \[1, 1\]"),
        ("baseline: plain", "baseline: teacher", "baseline is 'teacher': expected one of plain, dist"),
        ("runs:", "compare: {plain: plain}\nruns:", "compare.plain is 'plain': expected one of dist"),
        ("  plain: {", "  ../plain: {", "a name below runs is '../plain': expected letters"),
        ("label: Plain, ", "", "runs.plain.label is missing"),
        ("config: configs/toy/plain.yaml", "config: 3", "runs.plain.config is 3: expected a text"),
        ("{SOLVER.BASE_LR: 0.5}", "[1]", r"runs.plain.overrides is \[1\]: expected a mapping"),
        ("role: teacher", "role: tutor", "runs.teacher.role is 'tutor': expected one of student, teacher"),
        ("WEIGHTS: teacher", "WEIGHTS: again", "runs.distilled.weights.MODEL.TEACHER.WEIGHTS is 'again'"),
        ("evaluate: distilled", "evaluate: longer", "runs.again.evaluate is 'longer': expected one of"),
        ("evaluate: distilled", "evaluate: distilled, role: teacher", "runs.again.role .* no such entry"),
        ("step_of: plain", "step_of: teacher", "runs.longer.iterations.step_of is 'teacher'"),
        ("time_of: distilled, ", "", "runs.longer.iterations.time_of is missing"),
        (PLAN, "just a text", "the plan is 'just a text': expected a mapping"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_file_and_entry(write, tmp_path, old, new, said):
    with pytest.raises(UserError, match=said) as error:
        write(old, new)
    assert str(tmp_path / "plan.yaml") in str(error.value) and "\n" not in str(error.value)


def test_a_schedule_has_the_only_word_on_iterations(write):
    text = PLAN.replace("SOLVER.BASE_LR: 0.5", "SOLVER.MAX_ITER: 5")
    with pytest.raises(
        UserError, match=r"override of runs.plain is 'SOLVER.MAX_ITER': expected others"
    ):
        write("runs:", "schedules: {short: 6}\nruns:", text)
    text = PLAN.replace(
        "  plain:", "  plain_b: {label: B, config: configs/toy/plain.yaml}\n  plain:"
    )
    with pytest.raises(
        UserError, match=r"schedules .*: expected names that give every run a name of its"
    ):
        write("runs:", "schedules: {c: 6, b_c: 7}\nruns:", text)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  again:", "  plain: {}\n  again:", r"plan\.yaml: plain stands in line 7 and again in line 12 of the same"),
        ("seeds: [1, 2]", "seeds: [1, 2]\nseeds: [3]", "seeds stands in line 3 and again in line 4"),
        ("{SOLVER.BASE_LR: 0.5}", "{SOLVER.BASE_LR: 0.5, SOLVER.BASE_LR: 1.0}", "SOLVER.BASE_LR stands in line 7 and"),
        ("label: Plain, ", "<<: {label: a}, <<: {label: b}, ", "<< stands in line 7 and again in line 7"),
    ],
)  # fmt: skip
def test_a_key_that_stands_twice_is_named(write, old, new, said):
    with pytest.raises(UserError, match=said) as error:
        write(old, new)
    assert "\n" not in str(error.value)


def test_what_is_merged_may_be_named_again(write):
    plan = write("overrides: {SOLVER.BASE_LR: 0.5}", "overrides: &a {SOLVER.BASE_LR: 0.5, SEED: 4}")
    assert plan.variants["plain"].overrides == ("SOLVER.BASE_LR", "0.5", "SEED", "4")
    own = "label: Distilled\n    overrides: {<<: *a, SEED: 5}"
    text = PLAN.replace("overrides: {SOLVER.BASE_LR: 0.5}", "overrides: &a {SOLVER.BASE_LR: 0.5, SEED: 4}")  # fmt: skip
    plan = write("label: Distilled", own, text)
    found = plan.variants["distilled"].overrides
    assert dict(zip(found[::2], found[1::2], strict=True)) == {"SOLVER.BASE_LR": "0.5", "SEED": "5"}  # fmt: skip


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml cannot be read"):
        read_plan(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_of_the_repository_makes_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    plan = read_plan(path)
    runs = make_runs(plan, tmp_path)
    assert {run.variant for run in runs} == set(plan.variants)
    assert all(run.iterations > 0 or run.evaluates for run in runs)


@pytest.mark.parametrize(("name", "pictures"), [("full", ""), ("few_labels", "_200")])
def test_the_benchmarks_have_one_teacher_and_equal_terms(name, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    plan = read_plan(REPO / "studies" / f"{name}.yaml")
    teacher, *students = make_runs(plan, tmp_path)
    assert teacher.iterations == 4000 and teacher.config.DATASETS.TRAIN == ("era_toy_train",)
    terms = {}
    for run in students:
        assert (f"era_toy_train{pictures}",) == run.config.DATASETS.TRAIN
        assert run.config.DATASETS.TEST == teacher.config.DATASETS.TEST == ("era_toy_val",)
        if not run.evaluates and not run.time_of:  # evaluations, and what trains for another's time
            terms.setdefault(run.variant.rsplit("_", 1)[0], set()).add((run.seed, run.iterations))
    assert set(terms) >= {"plain", "plain_init", "pkd", "era", "era_n0"}
    assert len(terms["plain"]) == len(plan.seeds) * len({length for _, length in terms["plain"]})
    assert len(terms["plain"]) >= 6 and all(term == terms["plain"] for term in terms.values())
    methods = {run.variant: run.config.MODEL.ERA for run in students}
    assert (methods["era_short"].NUM_BRANCHES, methods["era_n0_short"].NUM_BRANCHES) == (4, 0)
    assert plan.results == Path("docs/results") / name


def test_the_trees_have_equal_terms_and_fetch_nothing_to_be_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    plan = read_plan(REPO / "studies" / "trees.yaml")
    runs = make_runs(plan, tmp_path / "out")
    assert len(set(identities(runs).values())) == len(runs) and not (tmp_path / "data").exists()
    for run in runs:
        assert run.config.DATASETS.TRAIN == ("era_trees_train",)
        assert run.config.DATASETS.TEST == ("era_trees_test",)
    longest = max(run.iterations for run in runs if not run.is_teacher)
    assert runs[0].is_teacher and runs[0].iterations >= longest


def test_the_coco_study_is_ready_for_eight_gpus(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    plan = read_plan(REPO / "studies" / "coco.yaml")
    runs = {run.variant: run for run in make_runs(plan, tmp_path, seeds=[1])}
    for name, run in runs.items():
        recipe = run.config.SOLVER
        found = (recipe.IMS_PER_BATCH, recipe.BASE_LR, run.iterations, recipe.STEPS)
        assert found == (
            (16, 0.02, 90_000, (60_000, 80_000))
            if name.endswith("_16")
            else (8, 0.01, 180_000, (120_000, 160_000))
        )
        assert run.iterations == run.config.TEST.EVAL_PERIOD * 6 and not run.depends_on
        assert run.config.DATASETS.TRAIN == ("coco_2017_train",) and run.command[-1] == "1"
        assert run.num_gpus == 8 and run.config.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"
        if run.methods:
            teacher = run.config.MODEL.TEACHER
            assert "R_101_FPN_3x" in teacher.CONFIG_FILE
            assert teacher.WEIGHTS.startswith(f"detectron2://{teacher.CONFIG_FILE[:-5]}/")
        # Nothing but the distillation differs from what it is compared with.
        reference = runs[plan.compare.get(name, name)]
        stock, other = (student_config(r.config) for r in (run, reference))
        stock.OUTPUT_DIR = other.OUTPUT_DIR
        assert stock == other
    assert [runs[f"{name}_16"].methods for name in ("plain", "era", "era_n0", "pkd", "mask_era")] == [
        (), ("ERA",), ("ERA",), ("PKD",), ("ERA",),
    ]  # fmt: skip
    for size in ("16", "8"):
        era, control = (runs[f"{name}_{size}"].config.MODEL.ERA for name in ("era", "era_n0"))
        total = 1 + sum(era.SCALES) / era.NUM_BRANCHES
        assert control.NUM_BRANCHES == 0 and list(control.SCALES) == []
        for key in ("RPN_WEIGHT", "ROI_WEIGHT", "SOFT_RPN_WEIGHT", "SOFT_ROI_WEIGHT"):
            assert control.TWI[key] == total * era.TWI[key]


@pytest.mark.parametrize("name", ["few_labels", "full", "trees"])
def test_the_control_without_branches_has_the_same_total_weight(name, tmp_path, monkeypatch):
    """Soft judges: 1 on e_0 and s_i / N on every e_i, against all of it on e_0."""
    monkeypatch.chdir(REPO)
    plan = read_plan(REPO / "studies" / f"{name}.yaml")
    keys = {run.variant: run.config.MODEL.ERA for run in make_runs(plan, tmp_path, seeds=(1,))}
    era, control = keys["era_long"], keys["era_n0_long"]
    total = 1 + sum(era.SCALES) / era.NUM_BRANCHES
    assert control.NUM_BRANCHES == 0 and list(control.SCALES) == []
    for key in ("SOFT_RPN_WEIGHT", "SOFT_ROI_WEIGHT"):
        assert control.TWI[key] == total * era.TWI[key] > 0


def test_the_rows_with_unlabelled_pictures_differ_in_these_alone(tmp_path, monkeypatch):
    """The same labelled pictures, at most as many of them a step, and the rest without annotations."""
    monkeypatch.chdir(REPO)
    plan = read_plan(REPO / "studies" / "few_labels.yaml")
    cfgs = {run.variant: run.config for run in make_runs(plan, tmp_path, seeds=(1,))}
    for name, of, pictures in (
        ("pkd_unlabeled", "pkd_tuned", (4, 4)),
        ("era_unlabeled", "era", (4, 4)),
        ("era_unlabeled_16", "era", (8, 8)),
    ):
        cfg, other = cfgs[f"{name}_long"].clone(), cfgs[f"{of}_long"].clone()
        assert cfg.DATASETS.UNLABELED == ("era_toy_train_rest",) and not other.DATASETS.UNLABELED
        without = cfg.SOLVER.UNLABELED_PER_BATCH
        assert (cfg.SOLVER.IMS_PER_BATCH - without, without) == pictures
        for config in (cfg, other):
            config.defrost()
            config.DATASETS.UNLABELED, config.SOLVER.UNLABELED_PER_BATCH = (), 0
            config.SOLVER.IMS_PER_BATCH, config.OUTPUT_DIR = 8, ""
        assert cfg == other


def test_the_study_of_all_methods_holds_all_methods(tmp_path, monkeypatch):
    """Each on both sets, with and without inherited heads, with as many tries; but what is a sequence of runs itself. ERA
    has a second row, without branches."""
    monkeypatch.chdir(REPO)
    plan = read_plan(REPO / "studies" / "toy_methods.yaml")
    names = {name.lower() for name, _ in METHOD_REGISTRY} - {"mtpd"} | {"era_n0"}
    assert plan.tuning.candidates.keys() == names
    runs = {run.variant: run for run in make_runs(plan, tmp_path, seeds=(1,))}
    for name in names:
        needs_teacher = METHOD_REGISTRY.get(runs[f"{name}_long"].methods[0]).needs(
            runs[f"{name}_long"].config
        )
        for data, size in (("", 200), ("full_", 1600)):
            for heads in ("", "_heads") if needs_teacher.teacher else ("",):
                run = runs[f"{data}{name}{heads}_long"]
                assert [m.lower() for m in run.methods] == [name.removesuffix("_n0")]
                assert (run.config.DATASETS.TRAIN == ("era_toy_train_200",)) == (size == 200)
                assert (run.inherited == "heads") == bool(heads)
                assert plan.tuning.tuned[run.variant] == name


def test_the_tables_word_on_inheritance_is_the_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    plan = read_plan(REPO / "studies" / "few_labels.yaml")
    inherited = {run.variant: run.inherited for run in make_runs(plan, tmp_path)}
    assert inherited["plain_long"] == inherited["era_long"] == inherited["teacher"] == NOTHING
    assert inherited["plain_init_long"] == "heads"
