"""Curves from metrics: whose loss is whose, and the scalars of a method's chart."""

from types import SimpleNamespace
from typing import ClassVar

import pytest

from era.registry import METHOD_REGISTRY
from era.runs import series as curves

METRICS = [
    {"iteration": 19, "total_loss": 9.0, "loss_cls": 1.0, "loss_mask": 2.0, "loss_probe_b": 3.0},
    {"iteration": 39, "loss_cls": 0.5, "loss_mask": 1.5, "loss_probe_a": 4.0, "loss_probe_b": 1.0},
    {"iteration": 39, "bbox/AP": 12.0, "loss_probes": 1.0},
]


class Probe:
    """A method as the curves see it."""

    loss_labels: ClassVar[dict] = {"loss_probe_b": "the second", "loss_probe_never": "switched off"}
    charts: ClassVar[tuple] = (
        SimpleNamespace(
            pattern=r"probe/(?P<level>\w+)/gap_(?P<curve>\d+)", curve_name=lambda group: f"gap {group}"
        ),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _method(monkeypatch):
    monkeypatch.setitem(METHOD_REGISTRY._obj_map, "Probe", Probe)


def test_a_methods_losses_begin_with_its_name_and_all_others_are_the_students():
    assert curves.own_losses(METRICS, ("Probe",)) == ("loss_cls", "loss_mask", "loss_probes")
    assert len(curves.own_losses(METRICS, ())) == 5
    assert curves.method_losses(METRICS, ()) == {}


def test_losses_have_the_methods_labels_in_its_order_and_else_their_names():
    expected = {"loss_probe_b": "the second", "loss_probe_a": "loss_probe_a"}
    assert curves.method_losses(METRICS, ("Probe",)) == expected
    assert list(curves.method_losses(METRICS, ("Probe",))) == list(expected)
    unknown = curves.method_losses([{"iteration": 0, "loss_other_x": 1.0}], ("Other",))
    assert unknown == {"loss_other_x": "loss_other_x"} and curves.method_charts(("Other",)) == ()


def test_series_add_up_where_all_are_there():
    x, y = curves.series(METRICS, ("loss_cls", "loss_mask"))
    assert x.tolist() == [20, 40] and y.tolist() == [3.0, 2.0]
    assert curves.series(METRICS, ("loss_cls", "loss_probe_a"))[1].tolist() == [4.5]
    assert [a.shape for a in curves.series(METRICS, ())] == [(0,), (0,)]


def test_a_charts_scalars_are_averaged_by_group_in_natural_order():
    metrics = [
        {"iteration": 19, "probe/p2/gap_9": 1.0, "probe/p3/gap_9": 3.0, "probe/p2/gap_10": 0.5},
        {"iteration": 39, "probe/p2/gap_9": 0.0, "probe/p3/gap_9": 1.0, "probe/p2/gap_9_more": 8.0},
    ]
    (chart,) = curves.method_charts(("Probe",))
    nine, ten = curves.chart_series(metrics, chart)
    assert (nine[0], nine[1].tolist(), nine[2].tolist()) == ("gap 9", [20, 40], [2.0, 0.5])
    assert (ten[0], ten[1].tolist(), ten[2].tolist()) == ("gap 10", [20], [0.5])


def test_a_chart_ends_at_the_mean_of_its_last_points():
    values = [9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    metrics = [
        {"iteration": i, "probe/p2/gap_10": v, "probe/p3/gap_10": 3 * v} | ({"probe/p2/gap_9": v} if i > 4 else {})
        for i, v in enumerate(values)
    ]  # fmt: skip
    (chart,) = curves.method_charts(("Probe",))
    ends = curves.chart_ends(metrics, chart)
    assert ends == {"9": 4.5, "10": 6.0} and list(ends) == ["9", "10"]  # 2 x mean of 1 to 5
    assert curves.chart_ends(METRICS, chart) == {}
