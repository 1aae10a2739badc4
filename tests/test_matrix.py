"""The tables of docs/families.md are what trying every method with every family gives."""

from __future__ import annotations

import itertools

import matrix
import pytest
from detectron2.config import CfgNode
from matrix_words import BEGIN, END, in_words, replaced

from era.config import get_era_cfg
from era.errors import UserError
from era.methods import Method
from era.modeling.detectors.families import DETECTOR_FAMILIES
from era.modeling.detectors.rcnn import RCNN
from era.registry import METHOD_REGISTRY


@pytest.fixture(scope="module")
def tried():
    """Every method with every pair of families."""
    return matrix.try_all(matrix.all_rows(), matrix.kinds())


def test_every_cell_works_or_is_refused_in_one_sentence(tried):
    assert not tried.failures, "\n".join(tried.failures)
    assert set(tried.cells) == set(itertools.product(matrix.all_rows(), tried.columns))
    assert {name for name, _ in METHOD_REGISTRY} < {row for row, _ in tried.cells}
    assert {kind.family for kind, _ in tried.columns} == {family for _, family in DETECTOR_FAMILIES}
    assert len(set(tried.columns)) == len(tried.columns)


def test_the_page_says_what_was_tried(tried):
    page = matrix.PAGE.read_text(encoding="utf-8")
    written = replaced(page, in_words(tried, matrix.all_rows()))
    assert page == written, "run python tests/matrix.py --write, and read what has changed"


@pytest.fixture
def register(monkeypatch):
    """Registers a method for one test: ``losses`` and, if given, what building it does."""
    monkeypatch.setattr(METHOD_REGISTRY, "_obj_map", dict(METHOD_REGISTRY._obj_map))
    monkeypatch.setattr(matrix, "settings_config", lambda name, family: get_era_cfg())

    def add(losses, build=lambda: None):
        def init(self, cfg, student, teacher):
            Method.__init__(self)
            build()

        def add_config(cfg):
            cfg.MODEL.PROBE = CfgNode({"LEVELS": []})

        members = {"__init__": init, "losses": losses, "add_config": staticmethod(add_config)}
        METHOD_REGISTRY.register(type("Probe", (Method,), members))

    return add


def refuse():
    raise UserError("MODEL.PROBE.LEVELS is not to its liking: name others.")


def probe():
    """The only cell of the method ``Probe`` with Faster R-CNN."""
    found = matrix.try_all(["Probe"], matrix.kinds()[:1])
    return list(found.cells.values()), found.failures


def mimic(self, step):
    return {"loss_probe_p3": step.student.features["p3"].square().mean()}


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda self, step: step.nothing, "Probe, Faster R-CNN: AttributeError"),
        (lambda self, step: {}, "no loss of its own among"),
        (lambda self, step: {"loss_probe_p3": mimic(self, step)["loss_probe_p3"] * 0}, "no gradient"),
        (lambda self, step: {"loss_probe_p3": mimic(self, step)["loss_probe_p3"] / 0}, "is inf"),
    ],
    ids=["error", "no loss", "no gradient", "not finite"],
)  # fmt: skip
def test_a_method_that_neither_works_nor_is_refused_is_told(register, losses, message):
    register(losses)
    cells, failures = probe()
    assert cells == [] and len(failures) == 1 and message in failures[0]


def test_losses_of_a_further_row_are_off():
    (kind,) = matrix.kinds()[:1]
    pair = matrix.pair_config(kind, kind)
    for row, weight in (("ERA", 1.0), ("ERA, no judges", 0.0)):
        keys = matrix.cell_config(row, kind.family, pair, ["p3", "p4", "p5", "p6"]).MODEL.ERA
        assert (weight, weight) == (keys.TWI.SOFT_RPN_WEIGHT, keys.TWI.SOFT_ROI_WEIGHT)
        assert keys.FEATURE_WEIGHT == 50.0 and pair.MODEL.ERA.FEATURE_WEIGHT != 50.0


def test_what_works(register):
    register(mimic)
    assert probe() == ([matrix.WORKS], [])


def test_a_refusal_is_kept_as_it_is_said(register):
    register(mimic, refuse)
    assert probe() == (["MODEL.PROBE.LEVELS is not to its liking: name others."], [])


def test_a_refusal_comes_before_the_first_step(register):
    register(lambda self, step: refuse())
    cells, failures = probe()
    assert cells == [] and failures == [
        "Probe, Faster R-CNN: UserError: MODEL.PROBE.LEVELS is not to its liking: name others."
    ]


def test_a_family_without_a_toy_config_is_named(monkeypatch):
    class Another(RCNN):
        @classmethod
        def describes(cls, cfg):
            return False

    families = {**DETECTOR_FAMILIES._obj_map, "Another": Another}
    monkeypatch.setattr(DETECTOR_FAMILIES, "_obj_map", families)
    with pytest.raises(LookupError, match="no plain config of Another lies below configs/toy"):
        matrix.kinds()


def test_each_kind_has_its_own_teacher_and_one_of_another_family():
    first, second = (type(name, (RCNN,), {}) for name in "AB")
    kinds = [
        matrix.Kind(name, family, matrix.TOY / "plain.yaml")
        for name, family in (("a", first), ("a with masks", first), ("b", second))
    ]
    found = [(student.name, teacher.name) for student, teacher in matrix.pairs(kinds)]
    same = [("a", "a"), ("a with masks", "a with masks"), ("b", "b")]
    assert found == [*same, ("a", "b"), ("a with masks", "b"), ("b", "a")]
    assert matrix.pairs(kinds[:2]) == [(kind, kind) for kind in kinds[:2]]


def test_the_tables_by_hand():
    kinds = [
        matrix.Kind(name, family, matrix.TOY / "plain.yaml")
        for name, family in (("One", RCNN), ("Two", type("Two", (RCNN,), {})))
    ]
    columns = matrix.pairs(kinds)
    rows = ["X", "Y", "Y, less"]
    found = matrix.Matrix(columns, dict.fromkeys(itertools.product(rows, columns), matrix.WORKS))
    found.cells["X", columns[2]], found.cells["Y", columns[0]] = "No X, MODEL.X.", "No Y, MODEL.Y."
    found.cells["Y", columns[3]] = "Never Y."
    lines = [" ".join(x.split()) for x in in_words(found, rows).splitlines()]
    assert [line for line in lines if "`X`" in line] == ["| `X` | yes | yes |", "| `X` | 1 | yes |"]
    assert [line for line in lines if "`Y` |" in line] == ["| `Y` | 1 | yes |", "| `Y` | yes | 2 |"]
    assert lines.count("| `Y`, less | yes | yes |") == 2
    assert "| method | One from Two | Two from One |" in lines
    assert lines[-2:] == ["1. No METHOD, MODEL.METHOD.", "2. Never Y."]
    assert "| One | `GeneralizedRCNN` | `MODEL.ROI_HEADS.NUM_CLASSES` | rpn, roi |" in "\n".join(
        lines
    )


def test_the_text_goes_between_the_markers_alone():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    found = replaced(page, "new")
    assert found == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert replaced(found, "new") == found
    for wrong in ("no markers", page + page, f"{END}\n{BEGIN}\n"):
        with pytest.raises(ValueError, match="the page needs one line"):
            replaced(wrong, "new")
