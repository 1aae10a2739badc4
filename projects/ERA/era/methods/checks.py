"""What methods check alike, before anything is written: each check is one sentence about one key."""

from __future__ import annotations

from collections.abc import Sequence

from era.errors import UserError
from era.modeling.detectors import Detector
from era.modeling.levels import can_resample
from era.modeling.teacher import Teacher


def check_weights(weights: dict[str, float]) -> None:
    """Loss weights, by config key, are finite and at least 0.

    Raises:
        UserError: names the first key that is not.
    """
    for key, value in weights.items():
        if not 0.0 <= value < float("inf"):
            raise UserError(f"{key} is {value}: expected a finite number of at least 0; set it so.")


def check_temperature(key: str, value: float) -> None:
    """A temperature, ``tau``, is finite and above 0.

    Raises:
        UserError: it is not.
    """
    if not 0.0 < value < float("inf"):
        raise UserError(f"{key} is {value}: expected a finite number above 0; set it so.")


def check_class_logits(student: Detector, teacher: Detector, reason: str) -> None:
    """Class distributions of both models on the student's samples can be compared row by row.

    Args:
        reason: what compares them, for messages.

    Raises:
        UserError: the teacher's heads cannot predict there, or a model has no softmax over its classes.
    """
    teacher.check_class_distributions(student, reason)
    check_head_levels(student, teacher, reason)


def check_head_levels(student: Detector, teacher: Detector, reason: str) -> None:
    """The teacher's heads can read its own maps where the student has its samples.

    Args:
        reason: what needs it, for the message.

    Raises:
        UserError: names the levels that the student lacks or has at another stride.
    """
    own, other = student.feature_shapes, teacher.feature_shapes
    unfit = sorted(
        level
        for level in teacher.head_levels
        if level not in own or own[level].stride != other[level].stride
    )
    if unfit:
        raise UserError(
            f"{reason} needs the teacher's heads on the student's samples, and they read {unfit}, which the student's "
            "backbone lacks or has at another stride: name a teacher with the student's FPN levels, or switch that off."
        )


def check_every_class(teacher: Teacher, reason: str) -> None:
    """The teacher knows all of the student's classes, where their names are matched.

    Args:
        reason: what needs it, for the message.

    Raises:
        UserError: names those that it does not know.
    """
    if teacher.detector.known_classes is not None:
        raise UserError(
            f"{reason} needs a teacher that knows every class of the student's, and that of {teacher.source['config_file']} "
            f"has none by the name of {', '.join(teacher.classes.unknown)}: switch that off, or name another teacher, or "
            "the classes in MODEL.TEACHER.CLASSES."
        )


def check_level_names(levels: Sequence[str], key: str) -> None:
    """There is a level, and none is named twice.

    Args:
        key: the config key that names the levels, for messages.

    Raises:
        UserError: says what is wrong.
    """
    if not levels:
        raise UserError(f"{key} is empty: expected FPN levels such as ['p2', 'p3'].")
    if len(set(levels)) < len(levels):
        raise UserError(f"{key} is {list(levels)}, with a level twice: name each of them once.")


def check_vectors(who: str, detector: Detector, reason: str) -> None:
    """A detector makes a vector of each sample, :attr:`Detector.vector_channels`.

    Args:
        who: ``student`` or ``teacher``, for the message.
        reason: what needs it, for the message.

    Raises:
        UserError: it does not.
    """
    if detector.vector_channels is None:
        raise UserError(
            f"{reason}, and the {who} is a {type(detector).__name__} that makes no vector of a proposal: expected a box "
            "head that ends in fully connected layers (MODEL.ROI_BOX_HEAD.NUM_FC above 0); choose such a model, or "
            "switch that off."
        )


def check_stage(key: str, value: str, stages: Sequence[str]) -> None:
    """The stage of a method that first trains a part of its own is one that there is.

    Raises:
        UserError: it is not.
    """
    if value not in stages:
        raise UserError(
            f"{key} is {value!r}: expected one of {', '.join(stages)}; name one of them."
        )


def check_levels(
    student: Detector, teacher: Detector, levels: list[str], key: str
) -> tuple[int, int]:
    """Both models have every level, at equal strides and with one channel count each.

    Args:
        key: the config key that names the levels, for messages.

    Returns:
        Channels of the student's and of the teacher's maps.

    Raises:
        UserError: names the level and what differs.
    """
    shapes = {"student": student.feature_shapes, "teacher": teacher.feature_shapes}
    for who, shape in shapes.items():
        missing = [level for level in levels if level not in shape]
        if missing:
            remedy = ""
            is_key = key.startswith("MODEL.")
            if (
                who == "teacher"
                and is_key
                and can_resample([student.feature_shapes[x] for x in missing], shape)
            ):
                remedy = ", or compare resampled maps (MODEL.DISTILLER.RESAMPLE_LEVELS True)"
            raise UserError(
                f"{key} is {levels}, but the {who}'s backbone has no {missing} (it has {sorted(shape)}): "
                f"list levels that both models have{remedy}."
            )
        channels = {shape[level].channels for level in levels}
        if len(channels) > 1:
            raise UserError(
                f"{key} is {levels}, at which the {who} has {sorted(channels)} channels: one number is "
                "expected at all levels; list levels of an FPN."
            )
    for level in levels:
        strides = {who: shape[level].stride for who, shape in shapes.items()}
        if len(set(strides.values())) > 1:
            raise UserError(
                f"{key} names {level}, which has stride {strides['student']} in the student and "
                f"{strides['teacher']} in the teacher: the FPN levels of both must match; choose a teacher "
                "with the same strides or leave the level out."
            )
    return shapes["student"][levels[0]].channels, shapes["teacher"][levels[0]].channels


def check_heads_on(
    student: Detector, teacher: Detector, levels: list[str], key: str, reason: str
) -> None:
    """The teacher's heads can read estimates of its maps at these levels, by the student's samples.

    Args:
        key, reason: the config key that names the levels and what needs the heads, for messages.

    Raises:
        UserError: says what does not fit.
    """
    teacher.check_judge(student, reason)
    missing = sorted(teacher.head_levels - set(levels))
    if missing:
        raise UserError(
            f"{key} is {levels}: the teacher's heads also read {missing}, and {reason} needs them; add them."
        )
