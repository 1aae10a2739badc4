"""Parity: an exported folder and eager on the same images, compared detection by detection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import cv2
import numpy as np

from era_runtime import Detections, Predictor
from era_runtime.preprocess import InputRules, resized_shape

# Height : width of the test images; with the usual rules each gives another input size, and none of
# them is a multiple of 32 in both edges but the first.
ASPECTS = ((1.0, 1.0), (3.0, 4.0), (4.0, 3.0), (9.0, 16.0), (2.0, 1.0), (1.0, 1.27))
MIN_SIZES = 5


@dataclass(frozen=True)
class Tolerance:
    """The largest difference that passes.

    Attributes:
        box: pixels of the original image, any coordinate.
        score: of a matched detection; also how far from the score threshold, or from the last rank that
            is kept, a detection may be that only one of both sides has.
        mask: of a matched detection's mask probabilities, on any of the cells of its box.
        mask_iou: the least IoU of a matched detection's masks in the image, of both sides.
        matched: 1.0 = every detection. Below it, int8: the share of the detections with a score of at
            least 0.5 that must have a partner of its class with IoU of at least 0.5; box, score and mask
            are then reported and not judged, because quantisation is judged by AP.
    """

    box: float = 0.05
    score: float = 0.001
    mask: float = 0.005
    mask_iou: float = 0.9
    matched: float = 1.0


INT8 = Tolerance(box=math.inf, score=math.inf, mask=math.inf, mask_iou=0.0, matched=0.7)


@dataclass
class Case:
    """One image's comparison.

    Attributes:
        image_size, input_size: height, width in pixels, of the image and of the model's input.
        eager, exported: numbers of detections.
        batch: images of the call.
        box_difference: the largest of matched detections, pixels.
        score_difference: the largest of matched detections.
        mask_difference: the largest of matched detections' mask probabilities; None without masks.
        mask_iou: the least of matched detections' masks in the image; None without masks.
        unmatched: detections that only one side has and no tolerance explains.
    """

    image_size: tuple[int, int]
    input_size: tuple[int, int]
    eager: int
    exported: int
    batch: int = 1
    box_difference: float = 0.0
    score_difference: float = 0.0
    mask_difference: float | None = None
    mask_iou: float | None = None
    unmatched: int = 0


@dataclass
class Report:
    """All cases of one export.

    Attributes:
        empty_checked: how an image without detections was had: ``image`` or, where eager finds something
            on every candidate, ``threshold``: the same model exported with a score threshold of 1.
        problems: one sentence each; none = the export is right.
    """

    tolerance: Tolerance
    cases: list[Case] = field(default_factory=list)
    empty_checked: str = ""
    problems: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """How many images were compared and the largest differences of all, in words."""
        parts = [
            f"{max(case.box_difference for case in self.cases):.2g} pixels",
            f"{max(case.score_difference for case in self.cases):.2g} in score",
        ]
        masks = [c.mask_difference for c in self.cases if c.mask_difference is not None]
        parts += [f"{max(masks):.2g} in mask probability"] if masks else []
        return f"{len(self.cases)} images within {', '.join(parts)}"

    def as_dict(self) -> dict:
        """For JSON; an infinite tolerance becomes null."""
        result = asdict(self)
        limits = result["tolerance"]
        result["tolerance"] = {k: None if math.isinf(v) else v for k, v in limits.items()}
        return result


def compare(
    eager: Predictor,
    exported: Predictor,
    calls: Sequence[Sequence[np.ndarray]],
    *,
    tolerance: Tolerance,
    score_threshold: float,
    max_detections: int,
) -> Report:
    """Run both on every image and compare; the report's ``problems`` say what is out of tolerance.

    Args:
        calls: images that both are given at once, (H, W, 3) uint8, BGR; see :func:`sample_images`, :func:`blank_images` and
            :func:`calls_of`.
        score_threshold, max_detections: of the model.
    """
    report = Report(tolerance)
    for images in calls:
        try:
            found = exported.one_call(list(images))
        except Exception as e:  # every runtime has its own
            reason = " ".join(str(e).split())[:200]
            report.problems.append(f"{_where(images[0], len(images))} it fails ({reason})")
            continue
        for image, of_eager, own in zip(images, eager.one_call(list(images)), found, strict=True):
            case = compare_one(
                of_eager,
                own,
                tolerance=tolerance,
                score_threshold=score_threshold,
                max_detections=max_detections,
            )
            case.batch = len(images)
            case.image_size = tuple(image.shape[:2])
            case.input_size = resized_shape(*image.shape[:2], eager.rules)
            report.cases.append(case)
            where = _where(image, len(images))
            report.problems += [f"{where} {problem}" for problem in _problems(case, tolerance)]
    if len({case.input_size for case in report.cases}) < MIN_SIZES:
        report.problems.append(f"fewer than {MIN_SIZES} image sizes were compared")
    if all(case.eager == 0 for case in report.cases):
        report.problems.append("eager detects nothing on any image, so nothing was compared")
    return report


def _where(image: np.ndarray, batch: int) -> str:
    among = f" in a batch of {batch}" if batch > 1 else ""
    return f"at {image.shape[1]}x{image.shape[0]} pixels{among}"


def calls_of(
    images: Sequence[np.ndarray], blank: np.ndarray | None, batch: int | None
) -> list[list[np.ndarray]]:
    """Images in batches: each alone, of one size and of several, without detections in one, in some and in all of a batch.

    Args:
        blank: an image without detections, or None.
        batch: the most images a call; None = as many as there are.
    """
    most = batch or len(images) + 1
    several = [*images, *([] if blank is None else [blank])]
    calls = [[image] for image in several]
    if most == 1:
        return calls
    calls += [several[i : i + most] for i in range(0, len(several), most)]
    calls.append([images[0]] * (min(most, 6) - 1))  # less than a fixed number
    if blank is not None:
        calls += [[blank, images[1], blank][:most], [blank] * min(most, 3)]
    return calls


def compare_one(
    expected: Detections,
    found: Detections,
    *,
    tolerance: Tolerance,
    score_threshold: float,
    max_detections: int,
) -> Case:
    """Match by class and box, then take the differences; sizes are left at 0."""
    case = Case((0, 0), (0, 0), len(expected), len(found))
    if tolerance.matched < 1.0:
        _compare_loosely(case, expected, found, tolerance)
        return case
    partner = match(expected, found)
    _measure(case, expected, found, partner)
    # A score that rounds to the other side of the threshold, or a tie at the last rank that is kept.
    edges = [score_threshold]
    edges += [float(d.scores.min()) for d in (expected, found) if 0 < max_detections <= len(d)]
    rest = np.concatenate(
        [
            np.delete(expected.scores, list(partner.keys())),
            np.delete(found.scores, list(partner.values())),
        ]
    )
    case.unmatched = sum(
        all(abs(float(score) - edge) > tolerance.score for edge in edges) for score in rest
    )
    return case


def match(expected: Detections, found: Detections) -> dict[int, int]:
    """Index in ``expected`` to index in ``found``: one to one, same class, nearest box, IoU above 0.5.

    Near-tied scores swap order between runtimes, so rank means nothing.
    """
    iou = np.nan_to_num(box_iou(expected.boxes, found.boxes))  # a box of NaN matches nothing
    iou[expected.classes[:, None] != found.classes[None, :]] = 0.0
    partner: dict[int, int] = {}
    taken: set[int] = set()
    for flat in np.argsort(-iou, axis=None, kind="stable"):
        i, j = divmod(int(flat), max(iou.shape[1], 1))
        if not iou[i, j] > 0.5:
            break
        if i not in partner and j not in taken:
            partner[i] = j
            taken.add(j)
    return partner


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low).clip(0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - inter
    return inter / np.maximum(union, 1e-12)


def _compare_loosely(
    case: Case, expected: Detections, found: Detections, tolerance: Tolerance
) -> None:
    partner = match(expected, found)
    sure = np.flatnonzero(expected.scores >= 0.5)
    lost = sum(int(i) not in partner for i in sure)
    case.unmatched = lost if lost > (1 - tolerance.matched) * len(sure) else 0
    _measure(case, expected, found, partner)


def _measure(case: Case, expected: Detections, found: Detections, partner: dict[int, int]) -> None:
    """Set the differences of the matched detections; NaN where one of both sides is."""
    i, j = np.array(list(partner.items()), dtype=int).reshape(-1, 2).T
    case.box_difference = _largest(expected.boxes[i] - found.boxes[j])
    case.score_difference = _largest(expected.scores[i] - found.scores[j])
    if expected.masks is None:
        return
    if found.masks is None:  # such an export has no masks to compare
        case.mask_difference, case.mask_iou = math.inf, 0.0
        return
    case.mask_difference = _largest(expected.mask_probabilities[i] - found.mask_probabilities[j])
    both = (expected.masks[i] & found.masks[j]).sum((1, 2))
    either = (expected.masks[i] | found.masks[j]).sum((1, 2))
    case.mask_iou = float(((both + (either == 0)) / np.maximum(either, 1)).min(initial=1.0))


def _largest(differences: np.ndarray) -> float:
    return float(np.abs(differences).max(initial=0.0))


def _problems(case: Case, tolerance: Tolerance) -> list[str]:
    """What of a case is out of tolerance; written so that NaN is."""
    problems = []
    if not case.box_difference <= tolerance.box:
        problems.append(
            f"a box is off by {case.box_difference:.3g} pixels (at most {tolerance.box:g})"
        )
    if not case.score_difference <= tolerance.score:
        problems.append(
            f"a score is off by {case.score_difference:.3g} (at most {tolerance.score:g})"
        )
    if case.mask_difference is not None and not case.mask_difference <= tolerance.mask:
        problems.append(
            f"a mask is off by {case.mask_difference:.3g} in probability (at most {tolerance.mask:g})"
        )
    if case.mask_iou is not None and not case.mask_iou >= tolerance.mask_iou:
        problems.append(
            f"a mask has IoU {case.mask_iou:.3g} with eager's (at least {tolerance.mask_iou:g})"
        )
    if case.unmatched:
        problems.append(
            f"{case.unmatched} detections have no partner (eager {case.eager}, exported {case.exported})"
        )
    return problems


def sample_images(rules: InputRules, given: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
    """Images in six proportions, larger than the model's input by a quarter.

    Args:
        given: pictures to cut and scale; none = generated ones, shapes on a soft background.
    """
    short = max(round((rules.min_size or 256) * 1.25), 40)
    images = []
    for i, (high, wide) in enumerate(ASPECTS):
        scale = short / min(high, wide)
        height, width = round(high * scale), round(wide * scale)
        if given:
            images.append(_cut(given[i % len(given)], height, width))
        else:
            images.append(_shapes(np.random.default_rng(i), height, width))
    return images


def blank_images(rules: InputRules) -> list[np.ndarray]:
    """Even images, on which a trained detector finds nothing."""
    size = max(round((rules.min_size or 256) * 1.25), 40)
    return [np.full((size, size, 3), value, np.uint8) for value in (0, 128, 255, 64, 192, 104)]


def _cut(image: np.ndarray, height: int, width: int) -> np.ndarray:
    scale = max(height / image.shape[0], width / image.shape[1])
    size = (max(round(image.shape[1] * scale), width), max(round(image.shape[0] * scale), height))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(image[:height, :width])


def _shapes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    image = cv2.resize(
        rng.integers(40, 215, (4, 5, 3)).astype(np.uint8),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    unit = min(height, width)
    for k in range(6):
        size = int(unit * rng.uniform(0.1, 0.25))
        x, y = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        if k % 3 == 0:
            cv2.circle(image, (x, y), size // 2, colour, -1)
        elif k % 3 == 1:
            cv2.rectangle(image, (x, y), (x + size, y + size), colour, -1)
        else:
            corners = np.array([[x, y], [x + size, y], [x + size // 2, y - size]])
            cv2.fillPoly(image, [corners], colour)
    noise = rng.normal(0, 4, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)
