"""What is chosen from data, devices and time, a pure function each; what none of them says is in :mod:`~era.distil.configs`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from era.errors import UserError

# Validation, where there is none: this part of the pictures, and the smaller part where there are many.
PART, SMALL_PART, MANY, MOST_KEPT = 0.2, 0.1, 500, 5000

LARGEST = {"cuda": 800, "cpu": 480}  # pixels of a shorter edge; Detectron2's recipes have 800
SEEN = 16.0  # pixels: objects that most are larger than after enlarging, the edge of FPN's finest cells times 4
ENLARGED = 2.0  # at most
SEVERAL_SIZES = 320  # from this size on, a training sees smaller forms of the pictures too

PICTURES_A_STEP = 16  # of the public recipes
GIB_A_PICTURE = (
    3.5  # of 800 x 1333 pixels in training, with its teacher: R101 teaches R50 in float32
)
CPU_PIXELS = 130_000  # of a step's pictures together on a CPU

COCO, COCO_PASSES, MOST_PASSES = 118_000, 12, 100  # pictures and epochs of the 1x schedule
LEAST_SEEN = 8000  # pictures of any training
SPARE = 0.95  # of a given time is planned
STRETCHED = 3.0  # a given time makes a schedule at most so many times the usual one
LEAST_ITERATIONS = 100
WARM_UP = 1000  # iterations, of the public recipes
FROM_RANDOM = 2.0  # schedule of a student without pretrained weights, and its rate
TEACHER_PART = 0.5  # of a student's schedule; it goes on from a detector
TEACHER_RATE = 0.25

EVALUATIONS = (4, 20)  # least and most of a training
EVALUATION_PART = 0.1  # of its time that they may take before there are fewer


def kept_for_validation(pictures: int) -> int:
    """How many of so many pictures a validation set of its own gets; at least 1, and one is left to train on."""
    part = PART if pictures < MANY else SMALL_PART
    return min(max(1, round(part * pictures)), MOST_KEPT, pictures - 1)


def input_size(sides: np.ndarray, objects: np.ndarray, device: str) -> tuple[int, int]:
    """Pixels of the shorter edge in inference, and of the longer at most.

    The pictures' own size, enlarged at most twice where a tenth of the objects is smaller than 16 pixels, up to the
    largest size of the device; multiples of 32.

    Args:
        sides: (n, 2), width and height of the pictures in pixels.
        objects: (m,), square roots of the objects' areas in the same pixels.
        device: "cuda" or "cpu".
    """
    shorter = sides.min(axis=1)
    small = float(np.quantile(objects, 0.1)) if len(objects) else SEEN
    factor = min(max(SEEN / max(small, 1.0), 1.0), ENLARGED)
    size = to_32(min(float(np.median(shorter)) * factor, LARGEST[device]))
    form = min(float(np.quantile(sides.max(axis=1) / shorter, 0.95)), 5 / 3)
    return size, max(size, to_32(size * form))


def training_sizes(size: int) -> tuple[int, ...]:
    """Shorter edges in training, one of which is drawn for each picture: steps of 32 from four fifths on, as in COCO's
    recipes; of a small size that alone."""
    if size < SEVERAL_SIZES:
        return (size,)
    return tuple(range(to_32(0.8 * size), size + 1, 32))


def to_32(pixels: float) -> int:
    """The nearest multiple of 32, at least 64."""
    return max(64, round(pixels / 32) * 32)


def batch_size(size: tuple[int, int], pictures: int, devices: int, memory_gib: float | None) -> int:
    """Pictures of an optimiser step over all devices, in equal parts: 16, or as many as fit.

    Args:
        size: of :func:`input_size`.
        pictures: to train on.
        devices: GPUs, or 1 on a CPU.
        memory_gib: of one GPU; None on a CPU, where a step is to be done in a few seconds.
    """
    pixels = size[0] * size[1]
    if memory_gib is None:
        fit, most = CPU_PIXELS // pixels, PICTURES_A_STEP // 2
    else:
        fit = int(memory_gib / (GIB_A_PICTURE * pixels / (800 * 1333)))
        most = max(1, PICTURES_A_STEP // devices)
    each = max(1, min(fit, most, pictures // devices))
    return each * devices


def learning_rate(recipe: float, batch: int, *, from_random: bool, is_teacher: bool) -> float:
    """The public recipe's rate in proportion to the batch: twice that for a student from random weights, a quarter for a
    teacher that goes on from a detector.

    Args:
        recipe: at 16 pictures a step.
    """
    rate = recipe * batch / PICTURES_A_STEP
    return rate * (TEACHER_RATE if is_teacher else FROM_RANDOM if from_random else 1.0)


def usual_iterations(pictures: int, batch: int, *, from_random: bool, is_teacher: bool) -> int:
    """Optimiser steps without a given time.

    COCO's 1x schedule is 12 passes over 118,000 pictures; a smaller set gets more passes, by the square root of how much
    smaller it is, at most 100, and in all no fewer than 8,000 pictures.
    """
    passes = min(max(COCO_PASSES * (COCO / pictures) ** 0.5, COCO_PASSES), MOST_PASSES)
    seen = max(pictures * passes, LEAST_SEEN)
    seen *= TEACHER_PART if is_teacher else FROM_RANDOM if from_random else 1.0
    return max(LEAST_ITERATIONS, round(seen / batch))


def in_time(
    iterations: Sequence[int], step_seconds: Sequence[float], besides: float, limit: float
) -> list[int]:
    """The trainings' iterations, all shortened or lengthened alike so that everything is done in time.

    Args:
        iterations: usual ones, by training.
        step_seconds: of a step, by training.
        besides: seconds of all that is no step.
        limit: seconds that are given.

    Raises:
        UserError: the time is not enough for 100 iterations each.
    """
    steps = sum(n * seconds for n, seconds in zip(iterations, step_seconds, strict=True))
    factor = min((SPARE * limit - besides) / steps, STRETCHED)
    found = [int(n * factor) for n in iterations]
    if min(found) < LEAST_ITERATIONS:
        least = (besides + steps * LEAST_ITERATIONS / min(iterations)) / SPARE
        raise UserError(
            f"--time is {in_words(limit)}, too short: expected at least {in_words(least)}, for {LEAST_ITERATIONS} iterations of "
            f"every training and {in_words(besides)} of all else; give more, or leave it out."
        )
    return found


def warm_up(iterations: int) -> int:
    """Iterations in which the learning rate rises: 1,000, or a tenth of a shorter training."""
    return min(WARM_UP, iterations // 10)


def evaluations(iterations: int, step_seconds: float, evaluation_seconds: float) -> int:
    """How often a training evaluates: 20 times, or as often as takes a tenth of its time, and at least 4 times."""
    few, many = EVALUATIONS
    affordable = EVALUATION_PART * iterations * step_seconds / max(evaluation_seconds, 1e-9)
    return min(max(few, min(many, int(affordable))), iterations)


def patience(count: int) -> int:
    """Evaluations without a better one after which a training ends: half of them, for a rate that falls along a cosine
    brings most of its gain late."""
    return max(2, count // 2)


def in_words(seconds: float) -> str:
    """A duration, as ``2 h 05 min``, ``14 min`` or ``40 s``; short ones rounded up to 10 seconds."""
    if seconds < 95:
        return f"{max(10, int(-(-seconds // 10)) * 10)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
