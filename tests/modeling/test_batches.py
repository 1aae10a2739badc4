"""Inference over a batch in one piece: the same detections as picture by picture, in both forms."""

from __future__ import annotations

import pytest
import torch
from builders import MASKS, tiny_model
from detectron2.layers import batched_nms
from detectron2.structures import ImageList

from era.errors import UserError
from era.modeling.detectors import batches, detector_of
from era.modeling.detectors.batches import LOWEST, choose, pool, rois_of, suppress


def crowd(seed: int, pictures: int = 2, count: int = 150):
    """Boxes of many sizes that overlap, their falling scores and their classes."""
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(pictures, count, 2, generator=draw) * 60
    size = torch.rand(pictures, count, 2, generator=draw) * 50 + 1
    scores = torch.rand(pictures, count, generator=draw).sort(1, descending=True).values
    return (
        torch.cat([corner, corner + size], 2),
        scores,
        torch.randint(0, 3, (pictures, count), generator=draw),
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
def test_suppression_is_the_greedy_one_of_each_picture(fixed, by_class, threshold):
    boxes, scores, classes = crowd(0)
    scores[1, 100:] = LOWEST  # no candidates
    kept, settled = suppress(
        boxes, scores, threshold, fixed=fixed, classes=classes if by_class else None, num_classes=3
    )
    for picture, count in enumerate((150, 100)):
        groups = classes[picture, :count] if by_class else torch.zeros(count)
        expected = batched_nms(boxes[picture, :count], scores[picture, :count], groups, threshold)
        assert 5 < len(expected) < count
        assert kept[picture].nonzero()[:, 0].tolist() == sorted(expected.tolist())
    assert settled.all()


def chain(length: int):
    """Boxes that each overlap the next one alone: every second one is kept."""
    start = torch.arange(length) * 4.0
    boxes = torch.stack([start, torch.zeros(length), start + 6, torch.ones(length)], 1)
    return boxes[None], torch.arange(length, 0, -1.0)[None]


@pytest.mark.parametrize("length", [2, 12, batches.ROUNDS, batches.ROUNDS + 1])
def test_a_chain_longer_than_the_rounds_is_told(length):
    boxes, scores = chain(length)
    kept, settled = suppress(boxes, scores, 0.1, fixed=True)
    expected = torch.arange(length) % 2 == 0
    assert suppress(boxes, scores, 0.1, fixed=False)[0][0].equal(expected)
    assert settled.tolist() == [length <= batches.ROUNDS]
    # what the rounds have come to is right in any case
    first = min(length, batches.ROUNDS)
    assert kept[0, :first].equal(expected[:first])


def chosen(scores: list[float], most: int, monkeypatch, candidates: int = 4):
    """Of boxes far apart in the fixed form, when ``candidates`` are looked at."""
    monkeypatch.setattr(batches, "CANDIDATES", candidates)
    scores = torch.tensor([scores])
    boxes = torch.arange(scores.shape[1])[None, :, None] * 10.0 + torch.tensor([0.0, 0, 5, 5])
    return choose(
        scores,
        lambda rows: batches.take(boxes, rows),
        torch.zeros_like,
        num_classes=1,
        score_threshold=0.25,
        nms_threshold=0.5,
        max_detections=most,
        fixed=True,
    )


@pytest.mark.parametrize(
    ("scores", "most", "complete"),
    [
        ([0.9, 0.1, 0.8, 0.2, 0.7], 100, True),  # three pass
        ([0.9, 0.6, 0.8, 0.5, 0.7], 100, False),  # five pass, four are looked at
        ([0.9, 0.6, 0.8, 0.5, 0.7], 3, True),  # and three are wanted, which are there
        ([0.9, 0.6, 0.8, 0.5, 0.7], -1, False),  # or all
        ([0.1, 0.2, 0.0, 0.25, 0.1], 100, True),  # none passes: at the threshold is below
    ],
)
def test_what_the_cut_leaves_out_is_told(scores, most, complete, monkeypatch):
    found = chosen(scores, most, monkeypatch)
    expected = sorted((s for s in scores if s > 0.25), reverse=True)[: most if most > 0 else 4][:4]
    assert found.complete.tolist() == [complete]
    assert found.scores[found.is_found].tolist() == pytest.approx(expected)
    places = [scores.index(pytest.approx(s)) * 10.0 for s in expected]
    assert found.boxes[found.is_found][:, 0].tolist() == places
    assert (found.scores[~found.is_found] == 0).all()


def test_pooling_over_a_batch_is_that_of_the_lists():
    """Each box on the level of its size, on the maps of its own picture."""
    model = tiny_model("plain").eval()
    pooler = model.roi_heads.box_pooler
    maps = [torch.rand(3, 16, 48 // 2**i, 64 // 2**i) for i in range(len(pooler.level_poolers))]
    boxes = crowd(1, pictures=3, count=20)[0] * torch.tensor([1.0, 1, 3, 3])
    from detectron2.structures import Boxes

    expected = pooler(maps, [Boxes(own) for own in boxes])
    for fixed in (False, True):
        assert torch.equal(pool(pooler, maps, rois_of(boxes), fixed=fixed), expected)


def livened(config: str, *opts):
    """A tiny random model that finds something."""
    model = tiny_model(config, *opts, seed=1).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        heads = model.head if hasattr(model, "head") else model.roi_heads
        for p in heads.parameters():
            if p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    detector_of(model).set_score_threshold(0.15)
    return model


CONFIGS = {
    "faster": ("plain",),
    "masks": ("plain", *MASKS),
    "cascade": ("cascade_plain",),
    "retinanet": ("retinanet_plain", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "60"),
    "fcos": ("fcos_plain", "MODEL.FCOS.TOPK_CANDIDATES_TEST", "60"),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_detections_of_a_batch_are_detectron2s(family, fixed):
    """Of pictures of three sizes, padded as Detectron2 pads them, bit for bit but for the order of ties."""
    model = livened(*CONFIGS[family])
    detector = detector_of(model)
    draw = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, *s, generator=draw) * 255 for s in ((64, 96), (50, 70), (96, 60))]
    images = model.preprocess_image([{"image": picture} for picture in pictures])
    features = model.backbone(images.tensor)
    expected = detector.detect_on(features, images)
    sizes = torch.tensor(images.image_sizes, dtype=torch.float32)
    found = detector.detect_batch(features, sizes, fixed=fixed)
    assert found.complete.all() and sum(map(len, expected)) > 10
    for i, own in enumerate(expected):
        rows = found.is_found[i]
        assert rows.sum() == len(own)
        torch.testing.assert_close(found.scores[i, rows], own.scores, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.boxes[i, rows], own.pred_boxes.tensor, atol=1e-4, rtol=0)
        assert found.classes[i, rows].equal(own.pred_classes)
        if family == "masks":
            rois = torch.cat([torch.full((len(own), 1), float(i)), found.boxes[i, rows]], 1)
            masks = detector.masks_at(features, rois, found.classes[i, rows], fixed=fixed)
            torch.testing.assert_close(masks, own.pred_masks[:, 0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_picture_of_nan_is_a_picture_without_detections():
    model = livened("plain")
    detector = detector_of(model)
    tensor = torch.rand(2, 3, 64, 96)
    tensor[1] = float("nan")
    images = ImageList(tensor, [(64, 96)] * 2)
    features = model.backbone(tensor)
    expected = detector.detect_on(features, images)
    sizes = torch.tensor(images.image_sizes, dtype=torch.float32)
    for fixed in (False, True):
        found = detector.detect_batch(features, sizes, fixed=fixed)
        assert found.is_found.sum(1).tolist() == [len(own) for own in expected]
        assert len(expected[0]) > 0 == len(expected[1])


def test_heads_of_another_form_are_refused_in_a_sentence():
    model = tiny_model("plain")
    model.proposal_generator = torch.nn.Identity()
    with pytest.raises(
        UserError, match=r"the student has Identity and StandardROIHeads, .*one picture a call"
    ):
        detector_of(model).check_batches()
    masks = tiny_model("plain", *MASKS)
    masks.roi_heads.mask_head = torch.nn.Identity()
    with pytest.raises(
        UserError, match=r"the student has a Identity, .*Mask R-CNN's own mask head"
    ):
        detector_of(masks).check_batches()
