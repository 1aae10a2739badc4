"""The entries of a plan's YAML file, read and checked; ``studies/demo.yaml`` explains them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from era.errors import UserError
from era.runs.unique_keys import UniqueKeysLoader

PLAN_ENTRIES = (
    "title", "notes", "seeds", "schedules", "baseline", "compare", "results", "num_gpus", "tune", "runs",
)  # fmt: skip
TUNE_ENTRIES = ("dataset", "seeds", "iterations", "tries")
RUN_ENTRIES = (
    "label", "config", "overrides", "weights", "evaluate", "iterations", "role", "tuned_as",
)  # fmt: skip
ROLES = ("student", "teacher", "part")
MAX_ITER = "SOLVER.MAX_ITER"  # the key that a schedule sets
TEST = "DATASETS.TEST"
SEEDS = "a list of different numbers from 0 on"


@dataclass(frozen=True)
class Variant:
    """One entry below ``runs``: trained or evaluated once, or once a seed."""

    name: str
    label: str
    config: str  # path from the repository's root
    overrides: tuple[str, ...] = ()  # KEY, VALUE, KEY, VALUE, ...
    weights: dict[str, str] = field(default_factory=dict)  # config key -> variant it comes from
    evaluates: str | None = None  # the variant whose model it evaluates, without training
    is_teacher: bool = False  # trained once for all seeds, and not compared
    is_part: bool = (
        False  # such a one that is no detector: a part of a method, which is not evaluated
    )
    pace: tuple[
        str, ...
    ] = ()  # (time_of, step_of): variants that say how many iterations it trains
    tuned_as: str = ""  # the variant whose choice of a tune it takes too

    @property
    def needs(self) -> tuple[str, ...]:
        """Variants whose run of the same seed must be done before; that which it evaluates comes last."""
        return tuple(dict.fromkeys(self.weights.values()))


@dataclass(frozen=True)
class Tuning:
    """What is tried, on a split of its own, before the plan's runs: every student with each of its candidates."""

    dataset: str  # registered name
    seeds: tuple[int, ...]
    candidates: dict[str, tuple[tuple[str, ...], ...]]  # student, without schedule -> overrides
    tries: dict[str, tuple[Variant, ...]]  # the same students -> what is trained, a candidate each
    tuned: dict[str, str]  # the plan's variants that a choice is for -> that student


@dataclass(frozen=True)
class Plan:
    """A checked plan."""

    file: Path
    title: str
    notes: tuple[str, ...]  # sentences that a reader of the results must know
    seeds: tuple[int, ...]  # () = one run a variant, with its config's own seed
    baseline: str
    compare: dict[str, str]  # variant -> the one that its gain is counted from
    variants: dict[str, Variant]
    results: Path | None = None  # folder below the repository's root in which results are kept
    num_gpus: int = 1  # of every run
    tuning: Tuning | None = None
    entries: dict = field(default_factory=dict, repr=False)  # of the file, as they were read

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem

    @property
    def teachers(self) -> list[Variant]:
        """Detectors that are trained once for all seeds, and not compared."""
        return [v for v in self.variants.values() if v.is_teacher and not v.is_part]

    def choose(self, only: Sequence[str] | None) -> list[Variant]:
        """Some of the variants with all that they need, in the plan's order; None = all.

        Raises:
            UserError: there is no such variant.
        """
        wanted = set(self.variants if only is None else only)
        if unknown := sorted(wanted - set(self.variants)):
            raise UserError(
                f"{self.file} has no run {', '.join(unknown)}: it has {', '.join(self.variants)}."
            )
        for variant in reversed(self.variants.values()):  # what a variant needs stands above it
            if variant.name in wanted:
                wanted |= {*variant.needs, *variant.pace}
        return [v for v in self.variants.values() if v.name in wanted]


def scheduled(variants: dict[str, Variant], schedules: dict[str, int]) -> dict[str, Variant]:
    """Every student once a schedule, named ``<student>_<schedule>``; teachers as they are.

    What a student needs of other students is of the same schedule. One that trains for others' time keeps
    the iterations that follow from that.
    """
    found = {}
    for name, variant in variants.items():
        if variant.is_teacher:
            found[name] = variant
            continue
        for schedule, iterations in schedules.items():
            source = variant
            while source.evaluates:
                source = variants[source.evaluates]
            own = (MAX_ITER, str(iterations)) if not source.pace else ()

            def at(other: str, schedule: str = schedule) -> str:
                return other if variants[other].is_teacher else f"{other}_{schedule}"

            found[at(name)] = replace(
                variant,
                name=at(name),
                label=f"{variant.label}, {schedule}",
                overrides=(*variant.overrides, *own),
                weights={key: at(other) for key, other in variant.weights.items()},
                evaluates=at(variant.evaluates) if variant.evaluates else None,
                pace=tuple(map(at, variant.pace)),
            )
    return found


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: one sentence about the first mistake, with the file and the entry.
    """
    try:
        with open(path, encoding="utf-8") as file:
            value = yaml.load(file, Loader=UniqueKeysLoader)
    except OSError as e:
        raise UserError(
            f"the plan {path} cannot be read ({e.strerror}): name a YAML file such as studies/demo.yaml."
        ) from e
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(
            f"the plan {path} is not YAML ({' '.join(str(e).split())}): correct it."
        ) from e
    return _Reader(path).plan(value)


def with_chosen(plan: Plan, chosen: Mapping[str, Sequence[str]]) -> Plan:
    """The plan with further overrides, ``[KEY, VALUE, ...]``, of students that were tuned, by their names there."""
    return _Reader(plan.file, chosen).plan(plan.entries)


class _Reader:
    """Checks the values of one file; ``where`` names an entry as ``runs.student.weights``."""

    def __init__(self, file: Path, chosen: Mapping[str, Sequence[str]] | None = None):
        self.file = file
        self.chosen = chosen or {}

    def plan(self, value: Any) -> Plan:
        plan = self.mapping(value, "the plan", PLAN_ENTRIES)
        variants: dict[str, Variant] = {}
        for name, entry in self.mapping(plan.get("runs"), "runs").items():
            fits = re.fullmatch(r"\w[\w-]*", name) is not None
            self.expect(fits, "a name below runs", name, "letters, digits, _ and -, for a folder")
            variants[name] = self.variant(name, entry, variants)
        students = [name for name, v in variants.items() if not v.is_teacher]
        baseline = self.one_of(plan.get("baseline"), "baseline", students)
        others = {name: baseline for name in students if name != baseline}
        compare = self.mapping(plan.get("compare", others), "compare")
        for name, reference in compare.items():
            self.one_of(name, "a name in compare", students)
            self.one_of(reference, f"compare.{name}", [s for s in students if s != name])
        seeds = self.seeds(plan.get("seeds", []), "seeds")
        num_gpus = plan.get("num_gpus", 1)
        fits = type(num_gpus) is int and num_gpus > 0
        self.expect(fits, "num_gpus", num_gpus, "the number of GPUs of a run, from 1 on")
        tuning = self.tuning(plan["tune"], variants) if "tune" in plan else None
        if "schedules" in plan:
            schedules = self.schedules(plan["schedules"], variants)
            count = sum(1 if v.is_teacher else len(schedules) for v in variants.values())
            variants = scheduled(variants, schedules)
            fits = len(variants) == count
            self.expect(fits, "schedules", schedules, "names that give every run a name of its own")
            first = next(iter(schedules))
            baseline = f"{baseline}_{first}"
            compare = {f"{a}_{s}": f"{b}_{s}" for s in schedules for a, b in compare.items()}
            if tuning is not None:
                tuned = {f"{a}_{s}": b for s in schedules for a, b in tuning.tuned.items()}
                tuning = replace(tuning, tuned=tuned)
        for trial in (v.name for tries in (tuning.tries.values() if tuning else ()) for v in tries):
            fits = trial not in variants
            self.expect(fits, "the name of a run", trial, "another, for a try of tune has that one")
        return Plan(
            file=self.file,
            title=self.text(plan.get("title"), "title"),
            notes=tuple(self.items(plan.get("notes", []), "notes", str, "a list of sentences")),
            seeds=tuple(seeds),
            baseline=baseline,
            compare=compare,
            variants=variants,
            results=self.results(plan["results"]) if "results" in plan else None,
            num_gpus=num_gpus,
            tuning=tuning,
            entries=plan,
        )

    def tuning(self, value: Any, variants: dict[str, Variant]) -> Tuning:
        tune = self.mapping(value, "tune", TUNE_ENTRIES)
        dataset = self.text(tune.get("dataset"), "tune.dataset")
        seeds = self.seeds(tune.get("seeds", []), "tune.seeds")
        self.expect(bool(seeds), "tune.seeds", seeds or None, SEEDS)
        iterations = tune.get("iterations")
        fits = type(iterations) is int and iterations > 0
        self.expect(fits, "tune.iterations", iterations, "a number of iterations from 1 on")
        split = (MAX_ITER, str(iterations), TEST, f"('{dataset}',)", "TEST.EVAL_PERIOD", "0")
        candidates: dict[str, tuple[tuple[str, ...], ...]] = {}
        tries: dict[str, tuple[Variant, ...]] = {}
        for name, given in self.mapping(tune.get("tries"), "tune.tries").items():
            where = f"tune.tries.{name}"
            trained = [n for n, v in variants.items() if not v.evaluates and not v.is_teacher]
            variant = variants[self.one_of(name, "a name in tune.tries", trained)]
            fits = all(variants[source].is_teacher for source in variant.weights.values())
            self.expect(fits, where, name, "a run whose weights come from a teacher alone")
            fits = isinstance(given, list) and len(given) > 1
            self.expect(fits, where, given, "a list of two or more mappings of overrides")
            candidates[name] = tuple(self.overrides(overrides, where) for overrides in given)
            for key in sum(candidates[name], ())[::2]:
                self.expect(key not in (MAX_ITER, TEST), f"a key of {where}", key, "others, for tune and the plan set it")  # fmt: skip
            first, *_ = candidates
            count = len(candidates[first])
            self.expect(len(given) == count, where, f"a list of {len(given)}", f"{count} as {first} has, for every run gets the same number of tries")  # fmt: skip
            tries[name] = tuple(
                replace(
                    variant,
                    name=f"{name}_try{number}",
                    label=f"{variant.label}, try {number}",
                    overrides=(*variant.overrides, *overrides, *split),
                    pace=(),
                )
                for number, overrides in enumerate(candidates[name], start=1)
            )
        self.expect(bool(tries), "tune.tries", tries, "at least one run with its candidates")
        tuned = {}
        for name, variant in variants.items():
            source = tuned.get(variant.evaluates or variant.tuned_as or name, name)
            if source in tries:
                tuned[name] = source
        return Tuning(dataset, tuple(seeds), candidates, tries, tuned)

    def seeds(self, value: Any, where: str) -> list[int]:
        seeds = self.items(value, where, int, SEEDS)
        fits = len(set(seeds)) == len(seeds) and all(seed >= 0 for seed in seeds)
        self.expect(fits, where, seeds, SEEDS)
        return seeds

    def overrides(self, value: Any, where: str) -> tuple[str, ...]:
        found = self.mapping(value, where)
        return tuple(text for key, override in found.items() for text in (key, str(override)))

    def schedules(self, value: Any, variants: dict[str, Variant]) -> dict[str, int]:
        found = self.mapping(value, "schedules")
        self.expect(bool(found), "schedules", found, "at least one name with its iterations")
        for name, iterations in found.items():
            fits = re.fullmatch(r"[\w-]+", name) is not None
            self.expect(fits, "a name in schedules", name, "letters, digits, _ and -, for a folder")
            fits = type(iterations) is int and iterations > 0
            self.expect(fits, f"schedules.{name}", iterations, "a number of iterations from 1 on")
        for variant in variants.values():
            fits = variant.is_teacher or MAX_ITER not in variant.overrides[::2]
            self.expect(fits, f"an override of runs.{variant.name}", MAX_ITER, "others, for schedules sets it")  # fmt: skip
        return found

    def results(self, value: Any) -> Path:
        expected = "a folder below the repository's root, such as docs/results/NAME"
        path = Path(self.text(value, "results"))
        fits = not path.is_absolute() and ".." not in path.parts and bool(path.parts)
        self.expect(fits, "results", value, expected)
        return path

    def variant(self, name: str, value: Any, above: dict[str, Variant]) -> Variant:
        where = f"runs.{name}"
        entry = self.mapping(value, where, RUN_ENTRIES)
        label = self.text(entry.get("label"), f"{where}.label")
        overrides = self.overrides(entry.get("overrides", {}), f"{where}.overrides")
        tuned_as = ""
        if "tuned_as" in entry:
            tuned_as = self.one_of(entry["tuned_as"], f"{where}.tuned_as", above)
        overrides += tuple(self.chosen.get(tuned_as or name, ()))
        if "evaluate" in entry:
            source = self.one_of(entry["evaluate"], f"{where}.evaluate", above)
            for other in ("config", "weights", "iterations", "role", "tuned_as"):
                self.expect(
                    other not in entry, f"{where}.{other}", entry.get(other), f"no such entry beside evaluate, which takes {source!r} as it is"
                )  # fmt: skip
            trained = above[source]
            return replace(
                trained,
                name=name,
                label=label,
                overrides=(*trained.overrides, *overrides),
                weights={**trained.weights, "MODEL.WEIGHTS": source},
                evaluates=source,
                pace=(),
            )
        weights = self.mapping(entry.get("weights", {}), f"{where}.weights")
        for key, source in weights.items():
            self.one_of(source, f"{where}.weights.{key}", above)
        pace: tuple[str, ...] = ()
        if "iterations" in entry:
            place, keys = f"{where}.iterations", ("time_of", "step_of")
            given = self.mapping(entry["iterations"], place, keys)
            trained = [n for n, v in above.items() if not v.evaluates and not v.is_teacher]
            pace = tuple(self.one_of(given.get(key), f"{place}.{key}", trained) for key in keys)
        role = self.one_of(entry.get("role", ROLES[0]), f"{where}.role", ROLES)
        return Variant(
            name=name,
            label=label,
            config=self.text(entry.get("config"), f"{where}.config"),
            overrides=overrides,
            weights=weights,
            is_teacher=role != "student",
            is_part=role == "part",
            tuned_as=tuned_as,
            pace=pace,
        )

    def expect(self, fits: bool, where: str, found: Any, expected: str) -> None:
        if not fits:
            shown = "missing" if found is None else repr(found)
            raise UserError(
                f"{self.file}: {where} is {shown}: expected {expected}; correct the file."
            )

    def mapping(self, value: Any, where: str, keys: Sequence[str] = ()) -> dict[str, Any]:
        is_mapping = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        self.expect(is_mapping, where, value, "a mapping of names to values")
        for key in value if keys else ():
            self.expect(key in keys, f"an entry of {where}", key, f"one of {', '.join(keys)}")
        return value

    def text(self, value: Any, where: str) -> str:
        self.expect(isinstance(value, str) and bool(value.strip()), where, value, "a text")
        return value

    def one_of(self, value: Any, where: str, options: Sequence[str] | dict) -> str:
        fits = isinstance(value, str) and value in options
        named = ", ".join(options) or "none yet, for a run may name only those above it"
        self.expect(fits, where, value, f"one of {named}")
        return value

    def items(self, value: Any, where: str, kind: type, expected: str) -> list:
        fits = isinstance(value, list) and all(type(item) is kind for item in value)
        self.expect(fits, where, value, expected)
        return value
