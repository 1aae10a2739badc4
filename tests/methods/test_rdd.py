"""RDD: weights by hand and against numpy in float64, the mirrored pass, both stages, gradients, and beside ERA."""

import math

import numpy as np
import pytest
import torch
from builders import batch, tiny_model
from detectron2.utils.events import EventStorage

from era.errors import UserError
from era.losses import kd_loss
from era.methods.rdd import SELECTIONS, easiness, is_hard, log_probabilities, mean_of_selected
from era.modeling.detectors import detector_of

RDD = ["MODEL.DISTILLER.METHODS", "('RDD',)"]
NO_KD = ["MODEL.RDD.LAMBDA", "0.0"]
STAGE_1 = ["MODEL.RDD.SWITCH_ITER", "100"]
STAGE_2 = ["MODEL.RDD.SWITCH_ITER", "0"]
CLASS_LOSSES = {"rpn": "loss_rpn_cls", "roi": "loss_cls"}
EMPTINESS = pytest.mark.parametrize(
    "objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"]
)


def losses_at(model, inputs, iteration=0):
    torch.manual_seed(7)
    with EventStorage(iteration) as storage:
        return model(inputs), storage


def recorded(model, inputs):
    """The student's step alone, of the same random state."""
    with model.detector.record() as recording:
        losses_at(model.student, inputs)
    return recording


# ---- the pure functions -----------------------------------------------------------------------------


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def test_easiness_by_hand():
    """p_other = (3/4, 1/4), p = (1/2, 1/2): d = 3/4 ln 3/2 + 1/4 ln 1/2; binary alike; 1 where they agree."""
    d = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    logits, other = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    assert easiness(logits, other).tolist() == pytest.approx([math.exp(-d)])
    one, two = torch.tensor([0.0, 2.0]), torch.tensor([-math.log(3.0), 2.0])
    assert easiness(one, two).tolist() == pytest.approx([math.exp(-d), 1.0])


def test_easiness_against_numpy():
    draw = np.random.default_rng(0)
    a, b = draw.normal(0, 2, (6, 5)), draw.normal(0, 2, (6, 5))
    p, q = softmax(a), softmax(b)
    expected = np.exp(-(q * np.log(q / p)).sum(1))
    found = easiness(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_logits_that_overflow_half_precision():
    huge = torch.tensor([60000.0, -60000.0]).half()
    assert torch.isfinite(log_probabilities(huge)).all()
    assert easiness(huge, -huge).tolist() == [0.0, 0.0]
    assert easiness(huge, huge).tolist() == [1.0, 1.0]
    assert is_hard(huge, torch.tensor([1, 1]), 0.7, 0.0).tolist() == [False, True]


@pytest.mark.parametrize(
    "threshold, part, expected",
    [
        (0.7, 0.0, [True, True, False, False]),  # p(truth) up to 0.7
        (0.7, 0.7, [True, True, True, False]),  # 2.8 of 4, so the 3rd smallest
        (0.05, 0.2, [True, False, False, False]),  # the 1st smallest is above the threshold
        (0.7, 0.25, [True, True, False, False]),  # the 1st smallest is below it
    ],
)
def test_is_hard_by_hand(threshold, part, expected):
    p = torch.tensor([0.1, 0.6, 0.8, 0.9])
    rows, truth = torch.tensor([2, 0, 3, 1]), torch.tensor([0, 2, 1, 0])
    p, expected = p[rows], torch.tensor(expected)[rows]
    probabilities = torch.stack([p, (1 - p) / 2, (1 - p) / 2], dim=1)
    probabilities = torch.stack(
        [own.roll(int(t)) for own, t in zip(probabilities, truth, strict=True)]
    )
    assert torch.equal(is_hard(probabilities.log(), truth, threshold, part), expected)
    signs = torch.tensor([1, 0, 1, 0])
    logits = (p / (1 - p)).log() * (2 * signs - 1)
    assert torch.equal(is_hard(logits, signs, threshold, part), expected)


def test_nothing_is_hard_of_nothing():
    assert is_hard(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 0.7, 0.5).shape == (0,)
    assert easiness(torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert mean_of_selected(torch.zeros(0, dtype=torch.bool)).shape == (0,)


def test_the_mean_of_selected_by_hand():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    weights = mean_of_selected(torch.tensor([True, False, True, False]))
    assert weights.tolist() == [2.0, 0.0, 2.0, 0.0] and (values * weights).mean() == 2.0
    assert mean_of_selected(torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_selections():
    student, teacher = torch.tensor([[True, True, False, False], [True, False, True, False]])
    found = {name: select(student, teacher).tolist() for name, select in SELECTIONS.items()}
    assert found == {
        "xor": [False, True, True, False],
        "or": [True, True, True, False],
        "and": [True, False, False, False],
        "ohem": [True, True, False, False],
    }


# ---- the mirrored pass ------------------------------------------------------------------------------


def test_position_j_is_mirrored_to_width_over_stride_minus_j(monkeypatch):
    """With maps that are the pixels at j * stride: there is the pixel that mirrors that place, and for j = 0
    padding. The width is a multiple of the largest stride, though the pictures are not."""
    teacher = tiny_model("era", *RDD).teacher
    strides = {level: shape.stride for level, shape in teacher.detector.feature_shapes.items()}

    def sampled(images):
        return {level: images.tensor[..., ::s, ::s] for level, s in strides.items()}

    monkeypatch.setattr(teacher, "_maps", sampled)
    inputs = batch((1, 1), size=(64, 90))
    maps, width = teacher.mirrored_maps(inputs, (64, 96))
    assert width == 128
    pixels = teacher.preprocess(inputs, 64, width).tensor
    for level, s in strides.items():
        assert maps[level].shape[-1] > width // s
        for j in range(1, width // s):
            expected = pixels[..., ::s, j * s - 1]
            assert torch.equal(maps[level][..., width // s - j], expected)
        assert not maps[level][..., width // s].eq(pixels[..., ::s, 0]).all()


def test_a_symmetric_rpn_says_the_same_of_mirrored_maps():
    model = tiny_model("plain")
    detector, rpn = detector_of(model), model.proposal_generator
    weight = rpn.rpn_head.conv.weight
    weight.data.copy_(weight + weight.flip(-1))
    rpn.rpn_head.objectness_logits.weight.data.mul_(100)
    with detector.record() as recording:
        losses_at(model, batch((2, 1), size=(64, 128)))
    mirrored = {}
    for level, maps in recording.features.items():
        width = maps.shape[-1]
        mirrored[level] = torch.zeros(*maps.shape[:-1], width + 1)
        mirrored[level][..., 1:] = maps.detach().flip(-1)
    found = detector.head_parts["rpn"].mirrored_logits(mirrored, recording, 128)
    expected = detector.soft_targets("rpn", recording.features, recording, positions="sampled")
    torch.testing.assert_close(found, expected.class_logits)
    assert found.std() > 0.01 and not found.requires_grad


def test_proposals_are_mirrored(monkeypatch):
    model = tiny_model("plain")
    detector = detector_of(model)
    with detector.record() as recording:
        losses_at(model, batch())
    recording.proposals[0].proposal_boxes.tensor[0] = torch.tensor([10.0, 5.0, 30.0, 20.0])
    seen = []
    predict = detector.predict
    monkeypatch.setattr(
        detector, "predict", lambda maps, samples: seen.extend(samples) or predict(maps, samples)
    )
    logits = detector.head_parts["roi"].mirrored_logits(recording.features, recording, 128)
    assert seen[0].proposal_boxes.tensor[0].tolist() == [98.0, 5.0, 118.0, 20.0]
    assert len(logits) == sum(map(len, recording.proposals)) and not logits.requires_grad


# ---- the method -------------------------------------------------------------------------------------


@EMPTINESS
def test_rows_are_those_of_the_losses(objects):
    """The cross-entropy of a part's own logits and truth is its loss of classes, row by row."""
    model = tiny_model("plain")
    detector = detector_of(model)
    with detector.record() as recording:
        losses_at(model, batch(objects))
    task = detector.task_losses(recording)
    for name, part in detector.head_parts.items():
        assert part.class_loss == CLASS_LOSSES[name] and part.exclusive
        own = log_probabilities(part.own_logits(recording))
        values = -own.gather(1, part.truth(recording)[:, None])[:, 0]
        torch.testing.assert_close(values, task[part.class_loss].values)


def parts_by_definition(model, inputs, recording):
    """By part: the losses row by row, their divisor, and the teacher's logits on its own and on mirrored maps."""
    teacher, size = model.teacher, recording.images.tensor.shape[-2:]
    maps = teacher.features(inputs, recording.features, size)
    mirrored = teacher.mirrored_maps(inputs, size)
    task = model.detector.task_losses(recording)
    for name, part in teacher.detector.head_parts.items():
        loss = task[part.class_loss]
        logits = teacher.detector.soft_targets(name, maps, recording, positions="sampled")
        other = part.mirrored_logits(mirrored[0], recording, mirrored[1])
        yield name, loss, logits.class_logits, other


@EMPTINESS
def test_the_first_stage_by_definition(objects):
    model = tiny_model("era", *RDD, *STAGE_1)
    inputs = batch(objects)
    recording = recorded(model, inputs)
    plain, _ = losses_at(model.student, inputs)
    found, storage = losses_at(model, inputs, iteration=99)
    for name, loss, logits, other in parts_by_definition(model, inputs, recording):
        weights = easiness(logits, other)
        assert weights.min() > 0 and weights.max() <= 1 and weights.unique().numel() > 1
        expected = (loss.values * weights).sum() / loss.normaliser
        torch.testing.assert_close(found[CLASS_LOSSES[name]], expected)
        logged = storage.latest()[f"rdd/{name}/easiness"][0]
        assert logged == pytest.approx(weights.mean().item())
    for name in ("loss_box_reg", "loss_rpn_loc"):
        assert torch.equal(found[name], plain[name])


@pytest.mark.parametrize(
    "select, objects",
    [
        ("xor", (2, 1)),
        ("xor", (2, 0)),
        ("xor", (0, 0)),
        ("or", (2, 1)),
        ("and", (2, 1)),
        ("ohem", (2, 1)),
    ],
)
def test_the_second_stage_by_definition(select, objects, monkeypatch):
    """Its losses are means over the selected samples, and the mirrored pictures are not looked at."""
    opts = ["MODEL.RDD.SELECT", select, "MODEL.RDD.MIN_HARD", "0.3", "MODEL.RDD.THRESHOLD", "0.1"]
    model = tiny_model("era", *RDD, "MODEL.RDD.SWITCH_ITER", "100", *opts)
    inputs = batch(objects)
    recording = recorded(model, inputs)
    parts = list(parts_by_definition(model, inputs, recording))
    monkeypatch.delattr(type(model.teacher), "mirrored_maps")
    found, storage = losses_at(model, inputs, iteration=100)
    for name, loss, logits, _ in parts:
        part = model.detector.head_parts[name]
        truth = part.truth(recording)
        p_student, p_teacher = (
            log_probabilities(x).exp().detach().numpy()[np.arange(len(truth)), truth]
            for x in (part.own_logits(recording), logits)
        )
        count = math.ceil(0.3 * len(truth))
        hard = [p <= max(np.sort(p)[count - 1], np.float32(0.1)) for p in (p_student, p_teacher)]
        chosen = {
            "xor": hard[0] != hard[1],
            "or": hard[0] | hard[1],
            "and": hard[0] & hard[1],
            "ohem": hard[0],
        }[select]
        values = loss.values.detach()[torch.from_numpy(chosen)]
        expected = values.mean() * len(truth) / loss.normaliser if len(values) else torch.zeros(())
        torch.testing.assert_close(found[CLASS_LOSSES[name]].detach(), expected)
        logged = storage.latest()[f"rdd/{name}/selected"][0]
        assert logged == pytest.approx(chosen.mean())


@pytest.mark.parametrize("objects", [(2, 1), (0, 0)], ids=["full", "empty"])
def test_where_none_is_selected_the_losses_are_a_connected_0(objects):
    """Up to p(truth) = 1 all samples are hard for both models."""
    model = tiny_model("era", *RDD, *STAGE_2, *NO_KD, "MODEL.RDD.THRESHOLD", "1.0")
    losses, _ = losses_at(model, batch(objects))
    assert losses["loss_cls"] == 0 and losses["loss_rpn_cls"] == 0
    sum(losses.values()).backward()
    for head in (model.student.proposal_generator.rpn_head, model.student.roi_heads):
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


def test_stages_and_blend():
    opts = ["SOLVER.MAX_ITER", "200", *STAGE_1]
    method = tiny_model("era", *RDD, *opts).methods["rdd"]
    assert [method.first_stage_share(i) for i in (0, 99, 100, 199)] == [1.0, 1.0, 0.0, 0.0]
    model = tiny_model("era", *RDD, *opts, "MODEL.RDD.BLEND", "True")
    method = model.methods["rdd"]
    found = [method.first_stage_share(i) for i in (0, 99, 100, 125, 199, 200)]
    assert found == pytest.approx([1.0, 1.0, 1.0, 0.75, 0.01, 0.0])
    pure = tiny_model("era", *RDD, *opts)
    by_share = {share: losses_at(pure, batch(), i)[0] for share, i in ((1, 0), (0, 100))}
    blended, storage = losses_at(model, batch(), 125)
    for name in CLASS_LOSSES.values():
        expected = 0.75 * by_share[1][name] + 0.25 * by_share[0][name]
        torch.testing.assert_close(blended[name], expected)
    assert {"rdd/rpn/easiness", "rdd/roi/selected"} < storage.latest().keys()


@EMPTINESS
def test_the_kl_of_roi_classes(objects):
    opts = [
        "MODEL.RDD.LAMBDA",
        "3.0",
        "MODEL.RDD.TEMPERATURE",
        "2.0",
        "MODEL.RDD.REWEIGHT",
        "False",
    ]
    model = tiny_model("era", *RDD, *opts)
    inputs = batch(objects)
    recording = recorded(model, inputs)
    plain, _ = losses_at(model.student, inputs)
    found, _ = losses_at(model, inputs)
    maps = model.teacher.features(inputs, recording.features, recording.images.tensor.shape[-2:])
    logits = model.teacher.predict(maps, recording.proposals).class_logits
    expected = 3 * kd_loss(recording.predictions.class_logits, logits, 2.0)
    torch.testing.assert_close(found.pop("loss_rdd_kd"), expected)
    assert found == plain


def test_switched_off_it_is_plain_training():
    plain, _ = losses_at(tiny_model("plain"), batch())
    model = tiny_model("era", *RDD, *NO_KD, "MODEL.RDD.REWEIGHT", "False")
    assert losses_at(model, batch())[0] == plain and not list(model.methods.parameters())


@pytest.mark.parametrize(
    "stage", [STAGE_1, [*STAGE_2, "MODEL.RDD.SELECT", "or"]], ids=["stage 1", "stage 2"]
)
def test_gradients_reach_the_student_and_no_teacher(stage):
    model = tiny_model("era", *RDD, *stage)
    losses, _ = losses_at(model, batch())
    (losses["loss_cls"] + losses["loss_rpn_cls"] + losses["loss_rdd_kd"]).backward()
    student = model.student
    for module in (student.backbone, student.roi_heads.box_head, student.proposal_generator):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())


def test_pictures_without_labels_have_the_kl_alone():
    model = tiny_model("era", *RDD)
    assert model.label_free == ("rdd",)
    assert tiny_model("era", *RDD, *NO_KD).label_free == ()
    inputs = batch((2, 1))
    inputs[1]["unlabeled"] = True
    losses, _ = losses_at(model, inputs)
    assert all(torch.isfinite(x) for x in losses.values()) and losses["loss_rdd_kd"] > 0


def test_half_precision_stays_finite():
    for stage in (STAGE_1, STAGE_2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, _ = losses_at(tiny_model("era", *RDD, *stage), batch())
        assert all(torch.isfinite(x) and x.dtype == torch.float32 for x in losses.values())


def test_with_era_the_losses_add_up():
    """ERA's losses are what they are alone; the student's are RDD's."""
    alone = {}
    for methods in ("('ERA',)", "('RDD',)"):
        alone |= losses_at(tiny_model("era", "MODEL.DISTILLER.METHODS", methods), batch())[0]
    both, _ = losses_at(tiny_model("era", "MODEL.DISTILLER.METHODS", "('ERA', 'RDD')"), batch())
    assert both.keys() == alone.keys() and {"loss_era_feature", "loss_rdd_kd"} < both.keys()
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.RDD.LAMBDA", "-1.0"], r"MODEL\.RDD\.LAMBDA is -1\.0"),
        (["MODEL.RDD.TEMPERATURE", "0.0"], r"MODEL\.RDD\.TEMPERATURE is 0\.0"),
        (
            ["MODEL.RDD.THRESHOLD", "1.5"],
            r"MODEL\.RDD\.THRESHOLD is 1\.5: expected a number from 0",
        ),
        (
            ["MODEL.RDD.MIN_HARD", "-0.1"],
            r"MODEL\.RDD\.MIN_HARD is -0\.1: expected a number from 0",
        ),
        (["MODEL.RDD.SWITCH_ITER", "-1"], r"MODEL\.RDD\.SWITCH_ITER is -1"),
        (["MODEL.RDD.SELECT", "nor"], r"MODEL\.RDD\.SELECT is 'nor': expected one of xor, or, and"),
        (
            ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"],
            "the student, a RCNN, has heads of sigmoids",
        ),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64]]"], "anchors differ"),
    ],
)
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=words):
        tiny_model("era", *RDD, *opts)
