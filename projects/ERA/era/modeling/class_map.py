"""Which class of the teacher each class of the student is, by name (``MODEL.DISTILLER.CLASS_MAP``)."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from era.config import EXACT, FEATURE_ONLY
from era.errors import UserError

logger = logging.getLogger(__name__)
MAX_BYTES = 2**30  # of an annotation file that is read for its class names


@dataclass(frozen=True)
class ClassMap:
    """Classes of a student in those of a teacher.

    Attributes:
        index: of every class of the student the number of the teacher's that it is, None if the teacher has none.
        student, teacher: names of all classes, in the order of their numbers; empty where they are not known.
    """

    index: tuple[int | None, ...]
    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()

    @property
    def unknown(self) -> list[str]:
        """Names of the student's classes that the teacher does not know."""
        return [self.student[i] for i, own in enumerate(self.index) if own is None]

    def table(self) -> str:
        """A row for every class of the student, and one that counts what of the teacher's is left."""
        rows = [
            [
                f"{name} ({i})",
                "-" if own is None else f"{self.teacher[own]} ({own})",
                "ground truth and features alone" if own is None else "the teacher judges",
            ]
            for i, (name, own) in enumerate(zip(self.student, self.index, strict=True))
        ]
        left = len(self.teacher) - sum(own is not None for own in self.index)
        rows += [["-", f"{left} more", "not asked"]] if left else []
        return tabulate(rows, ["student", "teacher", "taught by"], tablefmt="simple")


def class_map(
    mode: str,
    student: Sequence[str] | None,
    teacher: Sequence[str] | None,
    counts: tuple[int, int],
    *,
    source: str,
) -> ClassMap:
    """Match classes as a mode of ``MODEL.DISTILLER.CLASS_MAP`` says.

    Args:
        mode: ``auto`` or ``exact``.
        student, teacher: class names by number, None where they are not known.
        counts: of the student's and the teacher's classes.
        source: config file of the teacher, for messages.

    Raises:
        UserError: classes cannot be matched, differ where ``exact`` is asked for, or none is shared.
    """
    own, other = counts
    if student is None or teacher is None:
        if own == other:
            return ClassMap(tuple(range(own)))
        who = "the student's" if student is None else f"the teacher's ({source})"
        raise UserError(
            f"the student has {own} classes and the teacher {other}, and the names of {who} are not known to match them by: "
            "expected equal numbers, or names; name the teacher's in MODEL.TEACHER.CLASSES, and the student's by datasets "
            "(DATASETS.TRAIN) that tell them."
        )
    if mode == EXACT:
        return _exact(student, teacher, source)
    index = _matched(student, teacher)
    if not any(found is not None for found in index):
        raise UserError(
            f"MODEL.DISTILLER.CLASS_MAP is {mode}, and none of the student's classes ({_listed(student)}) has the name of one "
            f"of the teacher's of {source} ({_listed(teacher)}): expected at least one; give the teacher's by the student's "
            "names in MODEL.TEACHER.CLASSES, or choose feature_only."
        )
    return ClassMap(index, tuple(student), tuple(teacher))


def _exact(student: Sequence[str], teacher: Sequence[str], source: str) -> ClassMap:
    if list(student) != list(teacher):
        pairs = enumerate(zip(student, teacher, strict=False))
        i = next((i for i, (a, b) in pairs if a != b), min(len(student), len(teacher)))
        names = (repr(x[i]) if i < len(x) else "absent" for x in (student, teacher))
        raise UserError(
            "MODEL.DISTILLER.CLASS_MAP is exact, and class {} is {} in the student and {} in the teacher of {}: expected the "
            "same names in the same order; choose auto to match them by name, or name another teacher.".format(
                i, *names, source
            )
        )
    return ClassMap(tuple(range(len(student))), tuple(student), tuple(teacher))


def _matched(student: Sequence[str], teacher: Sequence[str]) -> tuple[int | None, ...]:
    """By the name as it is; else by small letters, with spaces for ``_`` and ``-``, where one class alone is called so."""
    exact = {name: i for i, name in enumerate(teacher)}
    found = [exact.get(name) for name in student]
    alike: dict[str, list[int]] = {}
    for i, name in enumerate(teacher):
        alike.setdefault(_plain(name), []).append(i)
    for i, name in enumerate(student):
        others = alike.get(_plain(name), [])
        if found[i] is None and len(others) == 1 and others[0] not in found:
            found[i] = others[0]
    return tuple(found)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _listed(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def names_of(cfg: CfgNode, count: int) -> tuple[str, ...] | None:
    """The class names of a config's datasets, in Detectron2's order; None where none of them tells as many.

    Args:
        count: of classes that the model of the config has.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        found = _names_of_set(cfg, name)
        if found is not None and len(found) == count:
            return tuple(found)
    return None


def _names_of_set(cfg: CfgNode, name: str) -> Sequence[str] | None:
    listed = {
        entry[0]: entry[1]
        for entry in cfg.DATASETS.COCO_FORMAT
        if isinstance(entry, (list, tuple))
        and len(entry) == 3
        and all(isinstance(x, str) for x in entry)
    }
    if name in DatasetCatalog:
        meta = MetadataCatalog.get(name)
        if meta.get("thing_classes"):
            return meta.thing_classes
        listed.setdefault(name, meta.get("json_file") or "")
    path = os.path.expanduser(listed.get(name, ""))
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_BYTES:
        return None
    try:
        return _categories(os.path.abspath(path), os.stat(path).st_mtime_ns)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None  # whether the file is sound is asked where it is trained on


@functools.lru_cache(maxsize=16)
def _categories(path: str, _mtime: int) -> tuple[str, ...]:
    with open(path, encoding="utf-8") as f:
        categories = sorted(json.load(f)["categories"], key=lambda c: c["id"])
    return tuple(str(c["name"]) for c in categories)


def read_names(path: str, what: str) -> tuple[str, ...]:
    """Class names out of a file: one a line, or of a ``.json`` a list of them or COCO's ``categories``.

    Args:
        what: the key or option that names the file, for the message.

    Raises:
        UserError: it cannot be read, or holds no names.
    """
    try:
        if not path.endswith(".json"):
            with open(path, encoding="utf-8") as f:
                return tuple(line.strip() for line in f if line.strip())
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
        if isinstance(data, dict):
            data = [c["name"] for c in sorted(data["categories"], key=lambda c: c["id"])]
        if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
            raise ValueError("no list of names")
        return tuple(data)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as e:
        raise UserError(
            f"{what} {path} cannot be read ({e}): expected a text file with one class name a line, or a .json with a list of "
            "names or COCO's categories; correct it."
        ) from e


def teacher_names(cfg: CfgNode, datasets: CfgNode, count: int) -> tuple[str, ...] | None:
    """The teacher's class names: of ``MODEL.TEACHER.CLASSES``, else of its config's datasets.

    Args:
        cfg: the student's config.
        datasets: the teacher's.
        count: of the teacher's classes.

    Raises:
        UserError: the file cannot be read, names a class twice, or has another number of names.
    """
    path = cfg.MODEL.TEACHER.CLASSES
    if not path:
        return names_of(datasets, count)
    names = read_names(path, "MODEL.TEACHER.CLASSES")
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if len(names) != count or repeated is not None:
        found = f"{len(names)} names" if repeated is None else f"the name {repeated!r} twice"
        raise UserError(
            f"MODEL.TEACHER.CLASSES {path} has {found}, and the teacher has {count} classes: expected a name of its own for "
            "each, in the order of their numbers; correct the file."
        )
    return names


def find_class_map(cfg: CfgNode, datasets: CfgNode, counts: tuple[int, int]) -> ClassMap | None:
    """The map of a distiller's config; None where the classes are not compared (``feature_only``).

    Args:
        datasets: the teacher's config, for its datasets.
        counts: of the student's and the teacher's classes.

    Raises:
        UserError: see :func:`class_map`.
    """
    mode = cfg.MODEL.DISTILLER.CLASS_MAP
    if mode == FEATURE_ONLY:
        return None
    own, other = counts
    return class_map(
        mode,
        names_of(cfg, own),
        teacher_names(cfg, datasets, other),
        counts,
        source=cfg.MODEL.TEACHER.CONFIG_FILE,
    )


def log_class_map(found: ClassMap | None, counts: tuple[int, int]) -> None:
    """Say what is matched, as a table where it is not all of both in one order."""
    if found is None:
        logger.info("Classes are not matched (MODEL.DISTILLER.CLASS_MAP feature_only).")
    elif not found.student:
        logger.info(
            "The names of the classes are not known: the teacher's %d are taken for the student's, by number.",
            counts[1],
        )
    elif found.index == tuple(range(counts[1])):
        logger.info("The teacher's %d classes are the student's, by name and number.", counts[1])
    else:
        logger.info("Classes by name (MODEL.DISTILLER.CLASS_MAP):\n%s", found.table())
        if found.unknown:
            logger.info(
                "The teacher's AP (TEST.EVAL_TEACHER) counts 0 for what it does not know: %s.",
                ", ".join(found.unknown),
            )
