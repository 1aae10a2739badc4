"""Further views of a step's pictures: same geometry, repeatable, apart from the global random state and the cache."""

import pytest
import torch
from builders import batch, tiny_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from era.errors import UserError
from era.modeling.step import Step
from era.modeling.teacher_cache.cache import PICTURE_KEY
from era.modeling.views import FLIP, SAME_GEOMETRY, VIEWS, changed, check_view, mirrored

MEAN = [100.0, 110.0, 120.0]


def step_of(model, inputs):
    torch.manual_seed(7)
    with model.detector.record() as recording:
        model.student(inputs)
    return Step(inputs, recording, model.detector, model.teacher)


@pytest.mark.parametrize("name", VIEWS)
def test_pixels_change_and_everything_else_stays(name):
    inputs = [{**item, PICTURE_KEY: "a"} for item in batch()]
    before = torch.get_rng_state()
    with EventStorage(5):
        found, again = changed(inputs, name, MEAN), changed(inputs, name, MEAN)
    with EventStorage(6):
        later = changed(inputs, name, MEAN)
    assert torch.equal(torch.get_rng_state(), before)
    for item, own, same, other in zip(inputs, found, again, later, strict=True):
        assert own["image"].shape == item["image"].shape and own["image"].dtype == torch.float32
        assert own["image"].min() >= 0 and own["image"].max() <= 255
        assert not torch.equal(own["image"], item["image"])
        assert torch.equal(own["image"], same["image"])
        assert torch.equal(own["image"], other["image"]) == (name == FLIP)
        assert own["instances"] is item["instances"] and own[PICTURE_KEY] is None


def test_cutout_paints_one_rectangle_in_the_mean():
    image = torch.zeros(3, 40, 60)
    with EventStorage(0):
        (found,) = changed([{"image": image}], "cutout", MEAN)
    painted = (found["image"] == torch.tensor(MEAN)[:, None, None]).all(0)
    rows, columns = painted.any(1).sum(), painted.any(0).sum()
    assert painted.sum() == rows * columns
    assert 0.01 < painted.float().mean() < 0.25 and (found["image"][:, ~painted] == 0).all()


def test_mirrored_boxes_by_hand():
    own = Instances((20, 100))
    own.proposal_boxes = Boxes(torch.tensor([[10.0, 2.0, 30.0, 8.0]]))
    own.gt_classes = torch.tensor([3])
    found = mirrored(own)
    assert found.proposal_boxes.tensor.tolist() == [[70.0, 2.0, 90.0, 8.0]]
    assert found.gt_classes.tolist() == [3] and own.proposal_boxes.tensor[0, 0] == 10


@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_the_models_own_answer_to_its_pixels(name, objects):
    model = tiny_model("era")
    with EventStorage(3):
        step = step_of(model, batch(objects))
        view = step.view(name)
        assert step.view(name) is view
        expected = model.student.backbone(
            model.student.preprocess_image(view.batched_inputs).tensor
        )
        torch.testing.assert_close(view.features, expected)
        assert view.features["p3"].requires_grad and not view.teacher_features["p3"].requires_grad
        rows = len(step.student.predictions.class_logits)
        assert len(view.predictions.class_logits) == len(view.teacher_predictions.class_logits)
        assert len(view.predictions.class_logits) == rows
        assert (view.samples is step.student.samples) == (name != FLIP)


def test_flipping_twice_is_the_picture_and_mirrored_rows_say_what_a_flipped_batch_says():
    model = tiny_model("era").eval()
    with EventStorage(0):
        step = step_of(model.train(), batch((2, 1), size=(64, 64)))
        view = step.view(FLIP)
        flipped = [{**item, "image": item["image"].flip(2)} for item in step.batched_inputs]
        size = step.student.images.tensor.shape[-2:]
        maps = model.teacher.features(flipped, step.student.features, tuple(size))
        expected = model.teacher.predict(maps, [mirrored(x) for x in step.student.samples])
    torch.testing.assert_close(view.teacher_predictions, expected)


def test_no_gpu_is_seeded(monkeypatch):
    """Only the CPU's state is put back afterwards, and on a GPU Detectron2 samples by the GPU's."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with EventStorage(0):
        changed(batch(), "strong", MEAN)
    assert seeded == []


def test_an_unknown_view_is_one_sentence():
    check_view("strong", "MODEL.X.VIEW")
    with pytest.raises(UserError, match=r"MODEL\.X\.VIEW is 'weak': expected one of photometric"):
        check_view("weak", "MODEL.X.VIEW")
    with pytest.raises(UserError, match=r"is 'flip': expected one of photometric, cutout, strong;"):
        check_view(FLIP, "MODEL.X.VIEW", SAME_GEOMETRY)
