"""The models of a run: whether they can be built, fit their weights and each other, and what the files will take."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tabulate import tabulate
from torch import nn

from era.checkpoint.reading import STUDENT_PREFIX
from era.doctor.case import OK, SKIPPED, WARNING, WRONG, Case, Finding, plural
from era.engine.preflight import build_for_training, check_folders
from era.engine.room import GIB, check_room, free_bytes, in_words
from era.methods.listing import needs_in_words
from era.modeling.detectors import Detector, known_family
from era.modeling.distiller import Distiller
from era.modeling.teacher_cache import cache_folder
from era.registry import is_distiller, methods_of

TABLE = "simple"  # tabulate's
MARGIN = 2.0  # free room below this many times what is needed is worth a warning


def check(case: Case) -> Finding:
    """Build what is trained and read its weights, as training does before it starts; raises UserError."""
    case.model, incompatible = build_for_training(case.cfg, resume=case.args.resume)
    number = _weights(case.model.parameters())
    trained = _weights(p for p in case.model.parameters() if p.requires_grad)
    words = f"{number:,} weights, {trained:,} of them trained"
    details = {"weights": number, "trained": trained}
    source = case.cfg.MODEL.WEIGHTS
    if not source:
        return Finding(OK, f"{words}; without MODEL.WEIGHTS it starts from random ones", details)
    if incompatible is None:
        return Finding(
            OK, f"{words}; it goes on with the checkpoint of {case.cfg.OUTPUT_DIR}", details
        )
    student = case.model.student if isinstance(case.model, Distiller) else case.model
    names = {name for name, _ in student.named_parameters()}
    missing = {key.removeprefix(STUDENT_PREFIX) for key in incompatible.missing_keys}
    total, filled = len(names), len(names - missing)
    details |= {"tensors": total, "filled": filled}
    words += f"; MODEL.WEIGHTS {source} fills {filled} of {total} tensors of the student"
    if filled == 0:
        return Finding(WRONG, f"{words}: it is of another architecture; name another file", details)
    misshapen = [key for key, _, _ in incompatible.incorrect_shapes]
    if misshapen:
        return Finding(
            WARNING,
            f"{words}: {len(misshapen)} have another shape there and start at random, such as {misshapen[0]}",
            details,
        )
    return Finding(OK, words, details)


def check_disk(case: Case) -> Finding:
    """The folders can be written and the disk has room; raises UserError."""
    check_folders(case.cfg, for_training=True)
    room = check_room(case.cfg, case.model)
    details = {"needed_bytes": room.needed, "free_bytes": room.free, "checkpoints": room.count}
    folder = cache_folder(case.cfg) if is_distiller(case.cfg) else None
    if folder is not None and free_bytes(folder) < case.cfg.MODEL.TEACHER.CACHE_GIB * GIB:
        return Finding(
            WARNING,
            f"{room.words()}; MODEL.TEACHER.CACHE {folder} may grow to {case.cfg.MODEL.TEACHER.CACHE_GIB:g} GiB "
            f"(MODEL.TEACHER.CACHE_GIB), and its disk has {in_words(free_bytes(folder))} free besides what is in it",
            details,
        )
    if room.free < MARGIN * room.needed:
        return Finding(WARNING, f"{room.words()}, which others may fill", details)
    return Finding(OK, room.words(), details)


def check_pairing(case: Case) -> Finding:
    """Student and teacher side by side, and the methods between them."""
    model = case.model
    if not isinstance(model, Distiller):
        family = known_family(case.cfg)
        name = family.__name__ if family else type(model).__name__
        return Finding(
            SKIPPED, f"the config describes a plain detector ({name}), which has no teacher"
        )
    student = model.detector
    teacher = model.teacher.detector if model.teacher is not None else None
    levels = level_rows(student, teacher)
    parts = [
        tabulate(levels, headers="keys", tablefmt=TABLE, missingval="-"),
        tabulate(_side_by_side(student, teacher), ["", "student", "teacher"], tablefmt=TABLE),
    ]
    methods = method_rows(case)
    if methods:
        parts.append(tabulate(methods, headers="keys", tablefmt=TABLE, maxcolwidths=[None, 40, 60]))
    details = {"levels": levels, "methods": methods}
    lines = "\n\n".join(parts)
    names = ", ".join(case.cfg.MODEL.DISTILLER.METHODS) or "no method"
    if teacher is None:
        return Finding(OK, f"{names} without a teacher, which none of them needs", details, lines)
    common = [row for row in levels if row["student stride"] and row["teacher stride"]]
    other = [row["level"] for row in common if row["student stride"] != row["teacher stride"]]
    alike = f"{len(common)} of {plural(len(levels), 'level')} in both, {names} accepts the pair"
    if other:
        return Finding(
            WARNING,
            f"{alike}, but the strides of {', '.join(other)} differ: nothing can be compared there position by position",
            details,
            lines,
        )
    return Finding(OK, alike, details, lines)


def level_rows(student: Detector, teacher: Detector | None) -> list[dict]:
    """A row for every level of either model: channels, strides, which heads read it, and how they compare."""
    own = student.feature_shapes
    other = teacher.feature_shapes if teacher is not None else {}
    rows = []
    for level in sorted({*own, *other}, key=lambda name: (len(name), name)):
        mine, theirs = own.get(level), other.get(level)
        readers = [
            who
            for who, detector in (("student", student), ("teacher", teacher))
            if detector is not None and level in detector.head_levels
        ]
        rows.append(
            {
                "level": level,
                "student channels": mine and mine.channels,
                "teacher channels": theirs and theirs.channels,
                "student stride": mine and mine.stride,
                "teacher stride": theirs and theirs.stride,
                "read by heads of": " and ".join(readers) or "nobody",
                "comparison": _comparison(mine, theirs),
            }
        )
    return rows


def method_rows(case: Case) -> list[dict]:
    """A row for every method: what it needs, and its own modules (adapters, projectors), which no student keeps."""
    rows = []
    for name, method in methods_of(case.cfg).items():
        modules = case.model.methods[name]
        own = [
            f"{part} {_weights(module.parameters()):,}{_frozen(module)}"
            for part, module in modules.named_children()
            if _weights(module.parameters())
        ]
        loose = sum(p.numel() for p in modules.parameters(recurse=False))
        own += [f"further {loose:,}"] if loose else []
        rows.append(
            {
                "method": name,
                "needs": needs_in_words(method.needs(case.cfg)),
                "adapters and other modules of its own (weights)": ", ".join(own) or "none",
            }
        )
    return rows


def _comparison(mine, theirs) -> str:
    if mine is None or theirs is None:
        return f"{'student' if mine is None else 'teacher'} has none"
    if mine.stride != theirs.stride:
        return "strides differ"
    return "alike" if mine.channels == theirs.channels else "channels differ: needs an adapter"


def _side_by_side(student: Detector, teacher: Detector | None) -> list[list[str]]:
    columns = [_about(student), _about(teacher) if teacher is not None else {}]
    return [[name, *(column.get(name, "-") for column in columns)] for name in columns[0]]


def _about(detector: Detector) -> dict[str, str]:
    further = [name for name in ("mask", "keypoint") if getattr(detector, f"{name}_on")]
    return {
        "family": f"{type(detector).__name__}, a {detector.meta_architecture}",
        "backbone": type(detector.model.backbone).__name__,
        "heads": ", ".join(detector.heads),
        "they read": ", ".join(sorted(detector.head_levels)),
        "classes": _classes(detector),
        "also predicts": ", ".join(f"{name}s" for name in further) or "nothing but boxes",
        "pixel mean": ", ".join(f"{value:.1f}" for value in detector.pixel_mean),
        "weights": f"{_weights(detector.model.parameters()):,}",
    }


def _classes(detector: Detector) -> str:
    unknown = detector.num_classes - detector.num_known_classes
    return f"{detector.num_classes}{f', {unknown} of them unknown' if unknown else ''}"


def _weights(parameters: Iterable[nn.Parameter]) -> int:
    return sum(math.prod(p.shape) for p in parameters)


def _frozen(module: nn.Module) -> str:
    return "" if any(p.requires_grad for p in module.parameters()) else " (frozen)"
