"""What a run's result follows from: the same on every machine, another with every setting that matters."""

from __future__ import annotations

import dataclasses
import json

import pytest
from builders import REPO
from detectron2.data import DatasetCatalog, MetadataCatalog
from runs_case import make_run

from era.data import datasets, toy
from era.registry import METHOD_REGISTRY
from era.runs import identity as identities_
from era.runs.folder import mark_finished
from era.runs.identity import describe, identities
from era.runs.plan import make_runs
from era.runs.schema import read_plan

PLAN = """
title: Two ways
seeds: [1, 2]
baseline: plain
runs:
  teacher: {label: Teacher, config: configs/toy/teacher.yaml, role: teacher}
  plain: {label: Plain, config: configs/toy/plain.yaml}
  distilled: {label: D, config: configs/toy/era.yaml, weights: {MODEL.TEACHER.WEIGHTS: teacher}}
  pkd: {label: P, config: configs/toy/methods/pkd.yaml, weights: {MODEL.TEACHER.WEIGHTS: teacher}}
  again: {label: E, evaluate: distilled, overrides: {MODEL.ERA.ALPHA: 1.0}}
  longer: {label: L, config: configs/toy/plain.yaml, iterations: {time_of: distilled, step_of: plain}}
"""


@pytest.fixture
def of(tmp_path, monkeypatch):
    """Identities by name of the plan's runs in a folder, with one text of the plan replaced."""
    monkeypatch.chdir(REPO)

    def of(folder="out", old="", new="", **options):
        assert old in PLAN
        path = tmp_path / "plan.yaml"
        path.write_text(PLAN.replace(old, new, 1) if old else PLAN)
        return identities(make_runs(read_plan(path), tmp_path / folder, **options))

    return of


def changed(first: dict[str, str], second: dict[str, str]) -> set[str]:
    """Variants of which an identity differs."""
    assert first.keys() == second.keys()
    return {name.split("_")[0] for name in first if first[name] != second[name]}


def test_an_identity_knows_no_folder(of, tmp_path):
    first = of("out")
    assert len(set(first.values())) == len(first) == 11
    assert of("another/folder") == first
    runs = make_runs(read_plan(tmp_path / "plan.yaml"), tmp_path / "out")
    text = json.dumps([describe(run, first) for run in runs])
    assert str(tmp_path) not in text and str(REPO) not in text


def test_what_changes_it(of):
    first = of()
    every = {"teacher", "plain", "distilled", "pkd", "again", "longer"}
    override = "configs/toy/plain.yaml, overrides: {SOLVER.BASE_LR: 0.5}}\n  distilled"
    assert changed(first, of(old="configs/toy/plain.yaml}\n  distilled", new=override)) == {
        "plain",
        "longer",  # whose iterations follow from the steps of the plain student
    }
    # The teacher's own settings are its students'; another teacher's config is not the plain student's.
    strong = of(old="toy/teacher.yaml", new="toy/teacher_strong.yaml")
    assert changed(first, strong) == every - {"plain"}
    assert changed(first, of(old="ALPHA: 1.0", new="ALPHA: 0.5")) == {"again"}
    assert changed(first, of(opts=["SOLVER.MAX_ITER", "7"])) == every
    # Where a teacher's maps are kept is a place; keeping them in half precision rounds them.
    teacher = "distilled: {label: D, config: configs/toy/era.yaml, overrides: {MODEL.TEACHER.CACHE"
    start = teacher.split(", overrides")[0]
    assert of(old=start, new=f"{teacher}: memory, MODEL.TEACHER.CACHE_GIB: 1.0}}") == first
    assert of(old=start, new=f"{teacher}: ./maps}}") == first
    assert changed(first, of(old=start, new=f"{teacher}_DTYPE: float16}}")) == {
        "distilled", "again", "longer",
    }  # fmt: skip
    two = of(seeds=[2, 3])
    assert two["plain_seed2"] == first["plain_seed2"] and two["teacher"] == first["teacher"]
    assert two["longer_seed2"] != first["longer_seed2"]  # it is as long as other runs


def test_a_methods_defaults_are_its_own_runs_and_no_others(of, monkeypatch):
    first = of()

    pkd = METHOD_REGISTRY.get("PKD")
    own = pkd.add_config

    def with_key(cls, cfg):
        own(cfg)
        cfg.MODEL.PKD.NEW = 1.0

    monkeypatch.setattr(pkd, "add_config", classmethod(with_key))
    identities_._defaults.cache_clear()
    assert changed(first, of()) == {"pkd"}
    identities_._defaults.cache_clear()


def test_a_methods_key_at_its_neutral_value_changes_nothing(of, monkeypatch):
    """Whether it is the default or not, so that a key may come, go, and be made the default."""
    first = of()
    pkd = METHOD_REGISTRY.get("PKD")
    own = pkd.add_config
    monkeypatch.setattr(pkd, "neutral", {"MODEL.PKD.NEW": [1.0]})
    for value, expected in (([1.0], set()), ([2.0], {"pkd"})):

        def with_key(cls, cfg, value=value):
            own(cfg)
            cfg.MODEL.PKD.NEW = value

        monkeypatch.setattr(pkd, "add_config", classmethod(with_key))
        identities_._defaults.cache_clear()
        assert changed(first, of()) == expected
    identities_._defaults.cache_clear()


def test_a_new_key_of_the_frame_changes_nothing_at_its_default(of, monkeypatch):
    first = of()
    own = identities_._leaves

    def with_key(cfg, prefix="", value=0):
        yield from own(cfg, prefix)
        if not prefix:
            yield "TEST.NEW", value

    monkeypatch.setattr(identities_, "_leaves", with_key)
    identities_._defaults.cache_clear()
    assert of() == first
    identities_._defaults.cache_clear()


def test_a_given_teacher_of_another_study_is_that_teacher(of, tmp_path):
    first = of()
    other = tmp_path / "other" / "teacher"
    other.mkdir(parents=True)
    weights = other / "model_final.pth"
    weights.write_bytes(b"weights")
    given = of(given={"teacher": weights})
    assert given["distilled_seed1"] != first["distilled_seed1"]  # whose it is, nobody knows
    copy = tmp_path / "copy.pth"
    copy.write_bytes(b"weights")
    assert of(given={"teacher": copy}) == given  # the same content
    copy.write_bytes(b"others")
    assert changed(given, of(given={"teacher": copy})) == {"distilled", "pkd", "again", "longer"}
    run = make_run(tmp_path / "other", "teacher")
    mark_finished(run, first["teacher"], {}, seconds=1.0, peak=None, commit="")
    given = of(given={"teacher": weights})
    assert {name: first[name] for name in given} == given


def test_data_count_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)

    spec = toy.ToySpec(train_images=3, val_images=2, image_size=64)

    def described(folder: str, spec: toy.ToySpec = spec):
        data = toy.generate(tmp_path / folder, spec)
        pairs = [
            [f"own_{s}", str(data / "annotations" / f"{s}.json"), str(data / s)]
            for s in ("train", "val")
        ]
        opts = ["DATASETS.COCO_FORMAT", str(pairs), "DATASETS.TRAIN", "('own_train',)"]
        opts += ["DATASETS.TEST", "('own_val',)"]
        try:
            return describe(make_run(tmp_path, "run", opts=tuple(opts)), {})
        finally:
            for name in ("own_train", "own_val"):
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
                datasets._own.pop(name, None)

    first = described("here")
    assert described("there") == first and str(tmp_path) not in json.dumps(first)
    other = described("here", dataclasses.replace(spec, val_images=1))
    assert other["data"] != first["data"] and other["settings"] == first["settings"]
