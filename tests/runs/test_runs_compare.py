"""Runs compared image by image, on boxes laid out by hand."""

import pytest

from era.runs import compare


def box(x: float, category: int = 0, score: float = 1.0) -> compare.Box:
    return compare.Box((x, 0.0, x + 10.0, 10.0), category, score)


def example(image_id: int, first: int, second: int) -> compare.Example:
    """Four objects, of which two runs find so many."""
    objects = tuple(box(30.0 * i) for i in range(4))
    judged = {
        name: compare.judge([box(30.0 * i, score=0.9) for i in range(count)], objects)
        for name, count in {"first": first, "second": second}.items()
    }
    lead = judged["second"].f1 - judged["first"].f1
    return compare.Example(image_id, "", objects, judged, lead)


def test_detections_are_judged_as_coco_does():
    objects = [box(0), box(50), box(90, category=1)]
    found = [box(1, score=0.9), box(0, score=0.8), box(50, category=1, score=0.7), box(90, 1, 0.6)]
    judged = compare.judge(found, objects)
    # right, found twice, wrong class, right; the object at 50 is missed
    assert judged.right == (True, False, False, True)
    assert judged.missed == (objects[1],)
    assert judged.f1 == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert compare.judge([], []).f1 == 1.0 and compare.judge([box(0)], []).f1 == 0.0
    assert compare.iou(box(0), box(5)) == pytest.approx(1 / 3)


def test_chosen_images_show_losses_as_well_as_gains():
    examples = [example(i, 1, 3) for i in range(1, 10)]
    examples += [example(20, 2, 2), example(21, 3, 2), example(22, 4, 1)]
    chosen = compare.choose(examples, 6)
    assert [e.image_id for e in chosen] == [1, 2, 3, 4, 22, 21]
    assert [e.image_id for e in compare.choose(examples[-3:], 6)] == [22, 21]
    assert [e.image_id for e in compare.choose(examples[9:10], 6)] == [20]
    text = compare.summary(examples, "A", "B")
    assert text.startswith("Of all 12 ") and "B has the higher F1 in 9, A in 2; in 1 they" in text
