"""Equal iterations and equal time: numbers read off curves, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from study_case import entry

from era.study import equal_time


@pytest.fixture
def entries():
    """A plain student of 600 steps of 100 ms (1 minute), and one distilled of 150 ms (1.5 minutes)."""
    plain = entry("plain", [[200, 5.0], [400, 15.0], [600, 20.0]], step_ms=100.0)
    slow = entry("slow", [[200, 10.0], [400, 20.0], [600, 24.0]], step_ms=150.0, reference="plain")
    longer = entry("longer", [[300, 8.0], [600, 20.0], [900, 26.0]], step_ms=100.0, reference="slow", time_of="slow")  # fmt: skip
    return [plain, slow, longer]


def test_between_evaluations_there_are_straight_lines_and_beyond_them_nothing():
    curve = np.array([[200.0, 400.0, 600.0], [10.0, 20.0, 24.0]])
    found = [equal_time.ap_at(curve, step) for step in (199, 200, 250, 400, 500, 600, 601)]
    assert found == [None, 10.0, 12.5, 20.0, 22.0, 24.0, None]
    assert equal_time.ap_at(np.zeros((2, 0)), 5) is None


def test_the_slower_at_the_others_time_and_the_other_way_round(entries):
    found = equal_time.as_dict(entries)
    assert list(found) == ["slow", "longer"]
    # 1 minute is 400 steps of 150 ms; the plain student has nothing at 1.5 minutes, 900 steps of 100 ms.
    assert found["slow"] == {
        "minutes": 1.5,
        "reference_minutes": 1.0,
        "ap_at_reference_iterations": 24.0,
        "ap_at_reference_minutes": 20.0,
        "reference_ap": 20.0,
        "ap": 24.0,
        "reference_ap_at_minutes": None,
    }
    # As many minutes, more iterations.
    assert found["longer"] == {
        "minutes": 1.5,
        "reference_minutes": 1.5,
        "ap_at_reference_iterations": 20.0,
        "ap_at_reference_minutes": 26.0,
        "reference_ap": 24.0,
        "ap": 26.0,
        "reference_ap_at_minutes": 24.0,
    }


def test_the_table_names_what_was_trained_for_anothers_time(entries):
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in equal_time.table(entries).splitlines()]  # fmt: skip
    assert rows[0][:4] == ["variant", "reference", "trained for the time of", "minutes"]
    assert rows[2] == ["the slow", "the plain", "", "1.5", "1.0", "24.0", "20.0", "20.0", "24.0", "–"]  # fmt: skip
    assert rows[3][:3] == ["the longer", "the slow", "the slow"]
    assert "trained for" not in equal_time.table(entries[:2])
    assert equal_time.table(entries[:1]) == "" and equal_time.as_dict(entries[:1]) == {}


def test_without_the_time_of_a_step_there_are_iterations_alone(entries):
    plain, slow, _ = entries
    object.__setattr__(plain.results[1], "step_ms", None)
    found = equal_time.as_dict([plain, slow])["slow"]
    assert found["ap_at_reference_iterations"] == 24.0 and found["minutes"] == 1.5
    assert found["reference_minutes"] is found["ap_at_reference_minutes"] is None
