"""A teacher's feature maps by the student's names: levels are paired by stride, and resampled where that is asked for
(``MODEL.DISTILLER.RESAMPLE_LEVELS``)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from detectron2.layers import ShapeSpec
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from era.modeling.detectors import Detector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LevelMap:
    """How a teacher's levels are named for a student, and which maps are made of them.

    Attributes:
        names: of every level of the teacher's the new name.
        resampled: of a level that the student alone has, by new names: the teacher's level that it is made of, and
            the stride of that one over its own, a power of two: above 1 the map is enlarged, below 1 it is averaged.
    """

    names: Mapping[str, str]
    resampled: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether anything is not as the teacher has it."""
        return bool(self.resampled) or any(old != new for old, new in self.names.items())

    def read(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's maps (B, C, H, W) by new names, and those that are made of them."""
        found = {self.names[level]: value for level, value in maps.items()}
        return found | {
            level: resample(found[source], ratio)
            for level, (source, ratio) in self.resampled.items()
        }

    def shapes(self, shapes: Mapping[str, ShapeSpec]) -> dict[str, ShapeSpec]:
        """Channels and strides of :meth:`read`, out of the teacher's."""
        found = {self.names[level]: shape for level, shape in shapes.items()}
        for level, (source, ratio) in self.resampled.items():
            own = found[source]
            stride = round(own.stride / ratio)
            found[level] = ShapeSpec(channels=own.channels, stride=stride)
        return found


def resample(value: Tensor, ratio: float) -> Tensor:
    """A map (B, C, H, W) of a stride that is ``ratio`` times smaller, an exact power of two.

    Above 1 every position is repeated, as an FPN's top-down pathway enlarges its maps; below 1 squares of positions are
    averaged, those that the border cuts over what there is of them.
    """
    if ratio >= 1:
        return F.interpolate(value, scale_factor=float(ratio), mode="nearest")
    return F.avg_pool2d(value, round(1 / ratio), ceil_mode=True, count_include_pad=False)


def pair_levels(
    student: Mapping[str, ShapeSpec], teacher: Mapping[str, ShapeSpec], *, resample: bool
) -> LevelMap:
    """Pair the levels of two backbones.

    A level of the student's is the teacher's of the same stride: that of its own name if there is one, else the only one. A
    level of the teacher's without a pair keeps its name, with its stride where the student has one of that name.

    Args:
        resample: make maps for the student's levels without a pair, of the teacher's level of the nearest stride whose
            ratio is a power of two, of two as near the finer one.
    """
    names = {n: n for n, own in student.items() if n in teacher and own.stride == teacher[n].stride}
    for level, own in student.items():
        others = [n for n, s in teacher.items() if s.stride == own.stride and n not in names]
        if level not in names.values() and len(others) == 1:
            names[others[0]] = level
    for level, other in teacher.items():
        if level not in names:
            names[level] = f"{level} of stride {other.stride}" if level in student else level
    made = {}
    for level, own in student.items():
        if level in names.values() or not resample:
            continue
        ratios = {n: s.stride / own.stride for n, s in teacher.items()}
        apart = {n: abs(math.log2(r)) for n, r in ratios.items() if math.log2(r).is_integer()}
        if apart:
            nearest = min(apart, key=lambda n: (apart[n], ratios[n]))
            made[level] = (names[nearest], ratios[nearest])
    return LevelMap(names, made)


def can_resample(levels: Iterable[ShapeSpec], teacher: Mapping[str, ShapeSpec]) -> bool:
    """Whether maps for all of these levels of a student can be made of the teacher's."""
    return all(
        any(math.log2(other.stride / own.stride).is_integer() for other in teacher.values())
        for own in levels
    )


class _Reading:
    """A forward hook and an ``output_shape`` of a backbone that gives a :class:`LevelMap`'s maps."""

    def __init__(self, found: LevelMap, shapes: dict[str, ShapeSpec]):
        self.found, self._shapes = found, shapes

    def __call__(self, _module: nn.Module, _args: tuple, maps: dict[str, Tensor]) -> dict:
        return self.found.read(maps)

    def shapes(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)


def read_levels(teacher: Detector, found: LevelMap) -> None:
    """The teacher's backbone gives the maps of a :class:`LevelMap` from now on, and its heads read them; in place."""
    backbone = teacher.model.backbone
    reading = _Reading(found, found.shapes(backbone.output_shape()))
    backbone.register_forward_hook(reading)
    backbone.output_shape = reading.shapes
    teacher.rename_levels(found.names)


def describe(
    found: LevelMap, student: Mapping[str, ShapeSpec], teacher: Mapping[str, ShapeSpec]
) -> str:
    """A row for every level of either model.

    Args:
        teacher: its levels by their old names.
    """
    old = {new: name for name, new in found.names.items()}
    rows = []
    for level, own in student.items():
        source, ratio = found.resampled.get(level, (level, 1.0))
        if source not in old:
            rows.append([f"{level} of stride {own.stride}", "-", "no pair"])
            continue
        how = "as it is"
        if ratio > 1:
            how = f"enlarged {ratio:g} times"
        elif ratio < 1:
            how = f"averaged over {1 / ratio:g} x {1 / ratio:g}"
        name = old[source]
        rows.append(
            [f"{level} of stride {own.stride}", f"{name} of stride {teacher[name].stride}", how]
        )
    left = [n for n, new in found.names.items() if new not in student]
    rows += [["-", f"{n} of stride {teacher[n].stride}", "no pair"] for n in left]
    return tabulate(rows, ["student", "teacher", "compared"], tablefmt="simple")


def fit_levels(student: Detector, teacher: Detector, *, resample: bool) -> LevelMap:
    """Pair the levels of two detectors, have the teacher read so, and say it where anything differs from the names."""
    own, other = student.feature_shapes, teacher.feature_shapes
    found = pair_levels(own, other, resample=resample)
    if found.changes:
        logger.info("Levels by stride:\n%s", describe(found, own, other))
        read_levels(teacher, found)
    return found
