"""What a plan's entry ``tune`` asks for: overrides chosen on a split of its own, before anything is compared.

Every student is trained once with each of its candidates, all of them equally many; the best by mean AP on that
split, the first of equals, is what the plan's runs of that student are trained with.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from detectron2.data import DatasetCatalog

from era.errors import UserError
from era.runs import tables
from era.runs.identity import file_sha256
from era.runs.plan import Run
from era.runs.results import Result
from era.runs.schema import Plan


@dataclass(frozen=True)
class Choice:
    """What the tries of a student came to."""

    student: str  # its name in the plan, without a schedule
    label: str
    candidates: tuple[tuple[str, ...], ...]  # KEY, VALUE, KEY, VALUE, ...
    ap: tuple[
        tuple[float | None, ...], ...
    ]  # of each candidate, by the tuning's seeds; None = none was found

    @property
    def means(self) -> list[float | None]:
        """AP of each candidate, mean over seeds; None where a seed has none."""
        return [None if None in values else statistics.mean(values) for values in self.ap]

    @property
    def best(self) -> int:
        """The number of the best candidate, from 0 on."""
        ranked = [-math.inf if mean is None else mean for mean in self.means]
        return ranked.index(max(ranked))

    @property
    def overrides(self) -> tuple[str, ...]:
        """The best candidate."""
        return self.candidates[self.best]

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        tries = [
            {"overrides": _pairs(overrides), "ap": list(ap), "mean": mean}
            for overrides, ap, mean in zip(self.candidates, self.ap, self.means, strict=True)
        ]
        return {"student": self.student, "chosen": self.best, "tries": tries}


def tries_plan(plan: Plan) -> Plan:
    """The plan whose runs are the tries, and what is trained once for all: teachers, and parts of methods."""
    tries = (variant for variants in plan.tuning.tries.values() for variant in variants)
    shared = (variant for variant in plan.variants.values() if variant.is_teacher)
    variants = {variant.name: variant for variant in (*shared, *tries)}
    return replace(plan, variants=variants, seeds=plan.tuning.seeds, compare={}, tuning=None)


def wanted(plan: Plan, only: Sequence[str] | None) -> list[str]:
    """Names of the tries that some of the plan's variants, by name, and what they need ask for; None = all."""
    students = {plan.tuning.tuned.get(variant.name) for variant in plan.choose(only)}
    tries = plan.tuning.tries.items()
    return [variant.name for name, variants in tries if name in students for variant in variants]


def check_split(plan: Plan, runs: Sequence[Run]) -> None:
    """No picture that choices are made on takes part in what is compared.

    Args:
        runs: of the plan, with their data in place.

    Raises:
        UserError: one does, itself or as a copy.
    """
    for name in sorted({run.config.DATASETS.TEST[0] for run in runs if not run.is_teacher}):
        if shared := shared_picture(plan.tuning.dataset, name):
            raise UserError(
                f"{plan.file}: tune.dataset {plan.tuning.dataset!r} shares {shared} with {name!r}, on which the runs "
                "are compared: name a dataset of other pictures."
            )


def shared_picture(one: str, other: str) -> str | None:
    """A file of the first registered dataset that is, by its content, in the second too; None if none is."""
    by_size: dict[int, set[str]] = {}
    for path in _pictures(other):
        by_size.setdefault(os.path.getsize(path), set()).add(path)
    for path in _pictures(one):
        alike = by_size.get(os.path.getsize(path), set())
        if path in alike or (alike and file_sha256(path) in map(file_sha256, alike)):
            return path
    return None


def choose(
    plan: Plan, runs: Sequence[Run], results: Mapping[str, Result]
) -> tuple[list[Choice], set[str]]:
    """The choices that the tries allow, and the students of which tries are missing.

    Args:
        runs: the tries.
        results: by name of the run.
    """
    choices, missing = [], set()
    for student, tries in plan.tuning.tries.items():
        of_student = [[r for r in runs if r.variant == variant.name] for variant in tries]
        if not all(of_student):
            continue  # nobody asked for it
        if any(run.name not in results for seeds in of_student for run in seeds):
            missing.add(student)
            continue
        ap = tuple(tuple(results[run.name].ap["AP"] for run in seeds) for seeds in of_student)
        label = tries[0].label.rsplit(", try ", 1)[0]
        choices.append(Choice(student, label, plan.tuning.candidates[student], ap))
    return choices, missing


def blocked(plan: Plan, missing: Collection[str]) -> dict[str, str]:
    """Why variants cannot be trained, by their names: tries of theirs, or of one that they need, are missing."""
    found: dict[str, str] = {}
    for name, variant in plan.variants.items():  # each after those that it needs
        student = plan.tuning.tuned.get(name)
        if student in missing:
            found[name] = f"skipped, for not all tries of {student} are there to choose from"
        elif lost := [other for other in (*variant.needs, *variant.pace) if other in found]:
            found[name] = f"skipped, for it needs {', '.join(lost)}"
    return found


def table(plan: Plan, choices: Sequence[Choice]) -> str:
    """All tries with their AP, as a Markdown table under a sentence on how they were made."""
    rows = []
    for choice in choices:
        for number, overrides in enumerate(choice.candidates):
            pairs = (f"{key} {value}" for key, value in _pairs(overrides).items())
            chosen = "chosen" if number == choice.best else ""
            ap = tables.number(choice.means[number], ".1f")
            rows.append([choice.label, ", ".join(pairs) or "as it stands", chosen, ap])
    if not rows:
        return ""
    dataset, seeds = plan.tuning.dataset, plan.tuning.seeds
    over = (
        f"mean over the seeds {', '.join(map(str, seeds))}"
        if len(seeds) > 1
        else f"seed {seeds[0]}"
    )
    about = (
        f"Chosen before, {len(choices[0].candidates)} tries each, by AP on `{dataset}` ({over}), whose pictures take no "
        "part in the tables above:"
    )
    return f"{about}\n\n{tables.markdown(['variant', 'overrides', '', f'AP on {dataset}'], rows, texts=3)}"


def _pictures(dataset: str) -> list[str]:
    paths = (os.path.realpath(entry["file_name"]) for entry in DatasetCatalog.get(dataset))
    return [path for path in paths if os.path.isfile(path)]


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    return dict(zip(overrides[::2], overrides[1::2], strict=True))
