"""The teacher: preprocessed for itself, aligned with the student's maps, loaded exactly."""

from functools import partial

import pytest
import torch
from builders import batch, tiny_cfg, tiny_model
from detectron2.structures import Boxes, Instances

from era.errors import UserError
from era.modeling.teacher import Teacher


def test_images_are_preprocessed_for_each_model():
    """An RGB student with its own mean and std; the teacher gets BGR, its own mean and std."""
    rgb = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]"]
    teacher_opts = ["MODEL.PIXEL_MEAN", "[10.0, 20.0, 30.0]", "MODEL.PIXEL_STD", "[2.0, 4.0, 5.0]"]
    model = tiny_model("era", *rgb, teacher_opts=teacher_opts)
    image = torch.zeros(3, 40, 64)
    image[0], image[1], image[2] = 100.0, 60.0, 20.0  # R, G, B
    images = model.teacher.preprocess([{"image": image}], 64, 64)
    assert images.tensor.shape == (1, 3, 64, 64) and images.image_sizes == [(40, 64)]
    inside = images.tensor[0, :, :40].reshape(3, -1)
    assert inside.unique(dim=1).squeeze().tolist() == [(20 - 10) / 2, (60 - 20) / 4, (100 - 30) / 5]
    assert images.tensor[0, :, 40:].abs().sum() == 0  # padding is 0 after normalisation


def test_equal_formats_give_what_the_stock_teacher_sees():
    model = tiny_model()
    inputs = batch((1, 1), size=(50, 70))
    stock = model.teacher.model.preprocess_image(inputs)
    own = model.teacher.preprocess(inputs, *stock.tensor.shape[-2:])
    torch.testing.assert_close(own.tensor, stock.tensor)
    assert own.image_sizes == stock.image_sizes


def test_features_are_cut_to_the_students_maps():
    """A teacher that pads further than the student is cut back, aligned at the top left."""
    model = tiny_model()
    inputs = batch((1,), size=(64, 96))
    images = model.student.preprocess_image(inputs)
    like = model.student.backbone(images.tensor)
    plain = model.teacher.features(inputs, like, images.tensor.shape[-2:])
    assert all(plain[level].shape[-2:] == like[level].shape[-2:] for level in like)
    model.teacher.model.backbone._size_divisibility = 128
    cut = model.teacher.features(inputs, like, images.tensor.shape[-2:])
    assert all(cut[level].shape == plain[level].shape for level in like)
    with pytest.raises(ValueError, match="p3"):
        model.teacher.features(inputs, {"p3": torch.zeros(1, 1, 99, 99)}, (64, 96))


def test_predictions_on_given_proposals_align_and_have_no_gradient():
    model = tiny_model()
    inputs = batch((1, 1))
    images = model.student.preprocess_image(inputs)
    maps = model.teacher.features(
        inputs, model.student.backbone(images.tensor), images.tensor.shape[-2:]
    )
    proposals = []
    for count in (3, 2):
        instances = Instances((64, 64))
        instances.proposal_boxes = Boxes(torch.tensor([[4.0, 4.0, 30.0, 40.0]]).repeat(count, 1))
        proposals.append(instances)
    logits, deltas = model.teacher.predict(maps, proposals)
    assert logits.shape == (5, 9) and deltas.shape == (5, 32)
    assert not logits.requires_grad and not deltas.requires_grad


def test_the_teacher_itself_detects_in_its_own_channel_order():
    """On an RGB student's inputs it finds what it finds on BGR inputs by itself."""
    bgr = tiny_model("era")
    rgb = tiny_model("era", "INPUT.FORMAT", "RGB")
    inputs = batch((1,))
    flipped = [{**item, "image": item["image"].flip(0)} for item in inputs]
    a, b = bgr.teacher(inputs)[0]["instances"], rgb.teacher(flipped)[0]["instances"]
    assert len(a) > 0 and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_a_distilled_students_config_can_describe_a_teacher():
    """Chains of teachers: the config of a distilled run builds its plain student."""
    cfg = tiny_cfg("era")
    cfg.MODEL.TEACHER.CONFIG_FILE = cfg.MODEL.TEACHER.CONFIG_FILE.replace("teacher", "era")
    teacher = Teacher(cfg)
    assert type(teacher.model).__name__ == "GeneralizedRCNN"


def test_weights_are_really_loaded(tmp_path):
    first = tiny_model(seed=1)
    path = str(tmp_path / "teacher.pth")
    torch.save({"model": first.teacher.model.state_dict()}, path)
    second = tiny_model("era", "MODEL.TEACHER.WEIGHTS", path, seed=2)
    assert second.teacher.sha256 == first.teacher.sha256 != tiny_model(seed=3).teacher.sha256


def test_random_weights_must_be_meant():
    with pytest.raises(UserError, match="ALLOW_RANDOM"):
        tiny_model("era", "MODEL.TEACHER.ALLOW_RANDOM", "False")


def test_channels_last_and_compile_change_no_number(monkeypatch):
    """Only speed: the same features, the same weights by name, nothing new in the state dict."""
    # tracing only: generating and compiling C++ takes minutes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    inputs = batch((1, 1))
    plain = tiny_model("era", "MODEL.TEACHER.CHANNELS_LAST", "never")
    images = plain.student.preprocess_image(inputs)
    like = plain.student.backbone(images.tensor)
    expected = plain.teacher.features(inputs, like, images.tensor.shape[-2:])
    other = tiny_model(
        "era", "MODEL.TEACHER.CHANNELS_LAST", "always", "MODEL.TEACHER.COMPILE", "True"
    )
    found = other.teacher.features(inputs, like, images.tensor.shape[-2:])
    for level, value in expected.items():
        torch.testing.assert_close(found[level], value, rtol=1e-4, atol=1e-4)
        assert found[level].is_contiguous()
    assert other.teacher.sha256 == plain.teacher.sha256
    formats = [m.teacher.memory_format for m in (plain, other, tiny_model())]
    assert formats[0] == torch.contiguous_format and formats[1] == torch.channels_last
    assert formats[2] == torch.channels_last, "auto, on a CPU"
