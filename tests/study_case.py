"""Variants of a study with made-up results."""

from __future__ import annotations

from era.runs.metrics import AP_NAMES
from era.runs.results import Result
from era.study.summary import Entry


def entry(name: str, *curves, step_ms=100.0, reference="", charts=(), ends=(), **more) -> Entry:
    """A variant with a seed a curve; ``ends`` are each seed's ends of its charts, as in a result."""
    results = {}
    for seed, curve in enumerate(curves, start=1):
        ap = dict.fromkeys(AP_NAMES, curve[-1][1])
        kept = ends[seed - 1] if ends else {}
        results[seed] = Result(
            name, "", curve[-1][0], ap, curve, step_ms, None, None, "", "", None, kept
        )
    return Entry(
        name,
        f"the {name}",
        "nothing",
        curves[0][-1][0],
        False,
        results,
        reference,
        (),
        charts,
        **more,
    )
