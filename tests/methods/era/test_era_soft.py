"""ERA's standardised target and soft judges: numbers by hand, identities, gradients, empty batches."""

import math
from types import SimpleNamespace

import pytest
import torch
from builders import batch, losses_of, tiny_cfg, tiny_model
from detectron2.utils.events import EventStorage

from era.errors import UserError
from era.methods.era import ERA
from era.methods.era.losses import feature_terms, standardised
from era.methods.era.standardise import SMALLEST_PART, TeacherDeviation
from era.methods.era.twi import SoftJudges, soft_twi_loss
from era.modeling.detectors import Detector, Predictions, detector_of
from era.modeling.detectors.rcnn import RCNN
from era.modeling.detectors.rcnn_soft import soft_anchor_losses, soft_proposal_losses

SOFT = ["MODEL.ERA.TWI.SOFT_RPN_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", "1.0"]
SAMPLED = [*SOFT, "MODEL.ERA.TWI.SOFT_POSITIONS", "sampled"]
STANDARDIZE = ["MODEL.ERA.STANDARDIZE", "teacher"]
NO_HARD = ["MODEL.ERA.TWI.RPN_WEIGHT", "0.0", "MODEL.ERA.TWI.ROI_WEIGHT", "0.0"]
TERMS = {"loss_era_soft_rpn", "loss_era_soft_roi"}
ROI = ["MODEL.ERA.ROI.SOFT_WEIGHT", "1.0"]
ROI_TERMS = {"roi_feature", "roi_residual", "roi_twi", "roi_soft"}

# ---- the teacher's deviation ------------------------------------------------------------------------


def test_the_deviation_is_a_mean_at_first_and_then_exponential():
    """Two channels of variance 1 and 4, then 9 and 16, then 25 and 0, momentum 0.4: by hand."""
    deviation = TeacherDeviation(["p3"], 2, momentum=0.4)
    signs = torch.tensor([-1.0, 1.0, 1.0, -1.0]).view(1, 1, 2, 2)
    for scales, expected in [
        ((1.0, 2.0), (1.0, 4.0)),
        ((3.0, 4.0), (5.0, 10.0)),  # the mean of both
        ((5.0, 0.0), (0.6 * 5 + 0.4 * 25, 0.6 * 10)),  # 1/3 would be less than the momentum
    ]:
        maps = 7 + torch.tensor(scales).view(1, 2, 1, 1) * signs.repeat(3, 1, 1, 1)
        found = deviation({"p2": maps * 9, "p3": maps})
        assert found["p3"].square().tolist() == pytest.approx(expected, rel=1e-5)
        assert list(found) == ["p3"]
    assert deviation.batches == 3 and not list(deviation.parameters())


def test_a_channel_that_never_changes_is_bounded():
    deviation = TeacherDeviation(["p3", "p4"], 2)
    maps = torch.randn(2, 2, 4, 4)
    maps[:, 1] = 3.0
    found = deviation({"p3": maps, "p4": maps[:1, :, :1, :1]})
    mean = maps[:, 0].var(correction=0).item() / 4
    for value in (found["p3"][1], *found["p4"]):
        assert value.item() == pytest.approx(math.sqrt(SMALLEST_PART * mean), rel=1e-4)
    assert all(x.min() > 0 for x in TeacherDeviation(["p3"], 2)({"p3": maps * 0}).values())


def test_two_processes_have_one_deviation(monkeypatch):
    """The mean of what each sees of its own: this one variance 1, the other 9."""
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda own: own.add_(9.0))
    deviation = TeacherDeviation(["p3"], 1)
    found = deviation({"p3": torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)})
    assert found["p3"].square().item() == pytest.approx((1 + 9) / 2)


# ---- the standardised losses ------------------------------------------------------------------------


def test_standardised_losses_by_hand():
    """One channel, N = 1, sigma 2: MSE((e_0 - F) / 2), MSE((d_1 - (F - e_0)) / 2)."""
    zeroth, step, target = ({"p3": torch.full((1, 1, 1, 1), v)} for v in (3.0, 1.0, 7.0))
    estimates = [zeroth, {"p3": zeroth["p3"] + step["p3"]}]
    deviation = {"p3": torch.tensor([2.0])}
    terms, measured = feature_terms(estimates, [step], target, [0.5], deviation)
    assert terms["feature"] == 4.0 and terms["residual"] == 0.5 * 2.25
    assert measured.tolist() == [[4.0, 2.25]]
    raw, _ = feature_terms(estimates, [step], target, [0.5])
    assert raw["feature"] == 16.0 and raw["residual"] == 0.5 * 9.0
    assert standardised(target, None) is target


def test_a_standardised_step_by_definition():
    """From public parts; the second step divides by the mean variance of both batches."""
    model = tiny_model("era", *STANDARDIZE, "MODEL.ERA.FEATURE_WEIGHT", "5.0")
    variances = []
    for seed in range(2):
        inputs = batch((2, 1), seed=seed)
        losses, storage = losses_of(model, inputs)
        with torch.no_grad():
            images = model.student.preprocess_image(inputs).tensor
            features = model.student.backbone(images)
            target = model.teacher.features(inputs, features, images.shape[-2:])
            estimates = model.methods["era"].estimator(features).cumulative()
        variances.append(torch.stack([target[p].var((0, 2, 3), correction=0) for p in target]))
        variance = sum(variances) / len(variances)
        variance = variance.clamp(min=SMALLEST_PART * variance.mean().item())
        by_estimate = [
            torch.stack(
                [((e[p] - target[p]) ** 2 / v[:, None, None]).mean() for p, v in zip(target, variance, strict=True)]
            )
            for e in estimates
        ]  # fmt: skip
        torch.testing.assert_close(losses["loss_era_feature"], 5 * by_estimate[0].mean())
        scales = (1, 0.5, 0.25, 0.125)
        residual = sum(s * d.mean() for s, d in zip(scales, by_estimate[1:], strict=True)) / 4
        torch.testing.assert_close(losses["loss_era_residual"], residual)
        logged = storage.latest()["era/p4/residual_e2"][0]
        assert logged == pytest.approx(by_estimate[2][1].item(), rel=1e-4)


def test_other_losses_know_nothing_of_it():
    raw, _ = losses_of(tiny_model("era", "MODEL.ERA.KD_WEIGHT", "1.0"), batch())
    found, _ = losses_of(tiny_model("era", "MODEL.ERA.KD_WEIGHT", "1.0", *STANDARDIZE), batch())
    assert found.keys() == raw.keys()
    for key in raw.keys() - {"loss_era_feature", "loss_era_residual"}:
        assert torch.equal(found[key], raw[key]), key
    assert found["loss_era_feature"] != raw["loss_era_feature"]


def test_the_deviation_is_saved_only_where_it_is_used():
    plain, own = tiny_model("era"), tiny_model("era", *STANDARDIZE)
    added = own.state_dict().keys() - plain.state_dict().keys()
    assert added == {"methods.era.deviation.variance", "methods.era.deviation.batches"}
    losses_of(own, batch())
    again = tiny_model("era", *STANDARDIZE)
    again.load_state_dict(own.state_dict())
    found = [losses_of(m, batch(seed=1))[0] for m in (own, again)]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


# ---- soft judgements by hand ------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("count", [5, 1], ids=["sum above 1", "sum below 1"])
def test_soft_anchor_losses_by_hand(count):
    target = Predictions(torch.randn(count) - (count == 1) * 2, torch.randn(count, 4))
    logits, deltas = torch.randn(2, count), torch.randn(2, count, 4)
    found = soft_anchor_losses(logits, deltas, target)
    for k in range(2):
        total = mass = 0.0
        for a in range(count):
            p, q = sigmoid(target.class_logits[a].item()), sigmoid(logits[k, a].item())
            total += abs(p - q) * -(p * math.log(q) + (1 - p) * math.log(1 - q))
            total += p * sum(abs(x) for x in (deltas[k, a] - target.box_deltas[a]).tolist())
            mass += p
        assert (mass > 1) == (count == 5)
        assert found[k].item() == pytest.approx(total / max(mass, 1), rel=1e-5)


def predictor(sigmoid=False):
    return SimpleNamespace(
        use_sigmoid_ce=sigmoid, box2box_transform=SimpleNamespace(weights=(10.0, 10.0, 5.0, 5.0))
    )


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_proposal_losses_by_hand(agnostic, temperature):
    """3 classes and background, 4 proposals."""
    width = 4 if agnostic else 12
    target = Predictions(torch.randn(4, 4), torch.randn(4, width))
    logits, deltas = torch.randn(2, 4, 4), torch.randn(2, 4, width)
    found = soft_proposal_losses(predictor(), logits, deltas, target, temperature)

    def softmax(values, tau):
        exps = [math.exp(v / tau) for v in values]
        return [e / sum(exps) for e in exps]

    for k in range(2):
        for r in range(4):
            z = target.class_logits[r].tolist()
            p, q = softmax(z, temperature), softmax(logits[k, r].tolist(), temperature)
            expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            weights = softmax(z, 1.0)[:3]
            distance = (deltas[k, r] - target.box_deltas[r]).abs().tolist()
            if agnostic:
                expected += sum(weights) * sum(distance)
            else:
                expected += sum(w * sum(distance[4 * c : 4 * c + 4]) for c, w in enumerate(weights))
            assert found[k, r].item() == pytest.approx(expected, rel=1e-4)


def test_soft_proposal_losses_of_sigmoid_heads_by_hand():
    target = Predictions(torch.tensor([[0.5, -1.0, 9.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    logits, deltas = torch.tensor([[[0.0, 2.0, -9.0]]]), torch.tensor([[[0.0, 0.0, 3.0, 0.0]]])
    found = soft_proposal_losses(predictor(True), logits, deltas, target, 1.0)
    expected = sigmoid(0.5) * 4  # the most likely class, times |1| + |3|
    for z, x in ((0.5, 0.0), (-1.0, 2.0)):  # the last logit means nothing here
        p, q = sigmoid(z), sigmoid(x)
        expected += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_nothing_to_judge_is_0_and_connected():
    logits, deltas = torch.zeros(2, 0, requires_grad=True), torch.zeros(2, 0, 4, requires_grad=True)
    soft_anchor_losses(
        logits, deltas, Predictions(torch.zeros(0), torch.zeros(0, 4))
    ).sum().backward()
    assert logits.grad.shape == (2, 0)


# ---- soft judgements by a detector ------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    """A teacher with heads far from 0, a recorded step, and the teacher's maps of it."""
    model = tiny_model("era")
    teacher = model.teacher
    for p in [
        *teacher.model.proposal_generator.parameters(),
        *teacher.model.roi_heads.parameters(),
    ]:
        p.data.normal_(std=0.2)
    inputs = batch((2, 3))
    with model.detector.record() as recording:
        losses_of(model.student, inputs)
    size = tuple(recording.images.tensor.shape[-2:])
    return teacher.detector, recording, teacher.features(inputs, recording.features, size)


@pytest.mark.parametrize("positions", ["all", "sampled"])
@pytest.mark.parametrize("part", ["rpn", "roi"])
def test_on_the_teachers_own_maps_there_is_nothing_to_learn(judged, part, positions):
    detector, recording, maps = judged
    targets = detector.soft_targets(part, maps, recording, positions=positions)
    assert not any(x.requires_grad for x in targets)
    own = {level: x.clone().requires_grad_() for level, x in maps.items()}
    loss = detector.soft_head_loss(part, own, targets, recording, positions=positions)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(x.grad is None or x.grad.abs().max() < 1e-6 for x in own.values())
    other = {level: x + 0.1 for level, x in maps.items()}
    assert detector.soft_head_loss(part, other, targets, recording, positions=positions) > 1e-3


def test_sampled_positions_are_the_students(judged):
    """What is outside the sampled anchors' sight changes nothing; all anchors are more."""
    detector, recording, maps = judged
    logits, deltas = (torch.cat(x, dim=1) for x in detector.predict_anchors(maps))
    every = detector.soft_targets("rpn", maps, recording)
    assert torch.equal(every.class_logits, logits.flatten()) and every.box_deltas.shape[1] == 4
    some = detector.soft_targets("rpn", maps, recording, positions="sampled")
    rows = torch.cat(recording.anchor_labels) >= 0
    assert torch.equal(some.class_logits, logits.flatten()[rows])
    assert torch.equal(some.box_deltas, deltas.flatten(0, 1)[rows])


def test_a_part_of_the_proposals_stands_for_all(judged):
    """Shares and means of the strata, and e_0 on all of them."""
    detector, recording, maps = judged
    estimates = [{level: x + 0.1 * i for level, x in maps.items()} for i in (1, 2)]
    with torch.no_grad():
        found = soft_twi_loss(
            detector, "roi", estimates, [1.0, 0.5], maps, recording,
            samples_per_image=6, soft=SoftJudges(("roi",)),
        )  # fmt: skip
        expected, example = 0.0, detector.predict(maps, recording.samples)
        for weight, estimate, count in ((1.0, estimates[0], 0), (0.5, estimates[1], 6)):
            own = detector.predict(estimate, recording.samples)
            values = soft_proposal_losses(
                detector.model.roi_heads.box_predictor, *(x[None] for x in own), example, 1.0
            )[0]
            sample = recording.sample(count)
            assert len(sample.rows) == (12 if count else len(values))
            for s in sample.strata:
                expected += weight * s.share * values[sample.rows[s.indices]].mean()
    torch.testing.assert_close(found, expected)


# ---- soft judges in a step --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TERMS))
def test_each_soft_term_has_its_own_weight_and_line(name):
    key = f"MODEL.ERA.TWI.SOFT_{name[-3:].upper()}_WEIGHT"
    inputs = batch()
    off, _ = losses_of(tiny_model("era"), inputs)
    ones, _ = losses_of(tiny_model("era", *SAMPLED), inputs)
    twice, _ = losses_of(tiny_model("era", *SAMPLED, key, "2.0"), inputs)
    without, _ = losses_of(tiny_model("era", *SAMPLED, key, "0.0"), inputs)
    assert ones.keys() - off.keys() == TERMS and without.keys() == ones.keys() - {name}
    for key, value in ones.items():
        assert torch.equal(twice[key], value * (2 if key == name else 1))
        if key in off:  # the losses of before are not touched, bit for bit
            assert torch.equal(value, off[key]), key
    assert tuple(off) == tuple(k for k in ones if k not in TERMS)


def test_without_soft_judges_heads_are_not_asked(monkeypatch):
    monkeypatch.setattr(RCNN, "soft_targets", None)
    losses, _ = losses_of(tiny_model("era"), batch())
    assert not TERMS & losses.keys()


@pytest.mark.parametrize("fast", ["True", "False"])
@pytest.mark.parametrize("positions", ["all", "sampled"])
def test_the_examples_are_computed_once_a_step_and_without_gradient(fast, positions, monkeypatch):
    """However many estimates are judged."""
    calls = []
    original = RCNN.soft_targets

    def counted(self, part, *args, **options):
        found = original(self, part, *args, **options)
        assert not any(x.requires_grad for x in found)
        calls.append(part)
        return found

    monkeypatch.setattr(RCNN, "soft_targets", counted)
    opts = [*SOFT, "MODEL.ERA.TWI.SOFT_POSITIONS", positions, "MODEL.ERA.FAST", fast]
    losses_of(tiny_model("era", *opts), batch())
    is_sparse = fast == "True" and positions == "sampled"  # which needs no dense output
    assert calls == (["roi"] if is_sparse else ["rpn", "roi"])


@pytest.mark.parametrize("part", ["RPN", "ROI"])
@pytest.mark.parametrize("positions", ["all", "sampled"])
def test_soft_gradients_reach_student_adapter_and_branches_and_no_teacher(part, positions):
    """Alone, without hard judges or other losses."""
    model = tiny_model(
        "era", *NO_HARD, "MODEL.ERA.FEATURE_WEIGHT", "0.0", "MODEL.ERA.RESIDUAL_WEIGHT", "0.0",
        f"MODEL.ERA.TWI.SOFT_{part}_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_POSITIONS", positions,
        teacher_opts=["MODEL.FPN.OUT_CHANNELS", "24"],
    )  # fmt: skip
    losses, _ = losses_of(model, batch())
    losses[f"loss_era_soft_{part.lower()}"].backward()
    estimator = model.methods["era"].estimator
    for module in (model.student.backbone.bottom_up, estimator.adapter, *estimator.mbrnet.branches):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert any(g.abs().sum() > 0 for g in gradients)
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    heads = (model.student.proposal_generator, model.student.roi_heads)
    assert all(p.grad is None for head in heads for p in head.parameters())


@pytest.mark.parametrize("positions", ["all", "sampled"])
@pytest.mark.parametrize("objects", [(2, 3), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_pictures_without_objects_are_judged_too(objects, positions):
    """No label is needed."""
    model = tiny_model("era", *SOFT, *STANDARDIZE, "MODEL.ERA.TWI.SOFT_POSITIONS", positions)
    losses, _ = losses_of(model, batch(objects))
    assert all(torch.isfinite(x) for x in losses.values())
    assert all(losses[name] > 0 for name in TERMS)
    sum(losses.values()).backward()


def test_no_proposal_at_all(judged):
    detector, recording, maps = judged
    empty = [p[:0] for p in recording.proposals]
    nothing = type(recording)(proposals=empty, num_classes=recording.num_classes)
    own = {level: x.clone().requires_grad_() for level, x in maps.items()}
    targets = detector.soft_targets("roi", maps, nothing)
    loss = detector.soft_head_loss("roi", own, targets, nothing)
    loss.backward()
    assert loss == 0


def test_the_soft_loss_falls_with_training():
    """On one batch, with nothing but soft judges, of every estimate."""
    model = tiny_model("era", *NO_HARD, *SAMPLED)
    heads = model.teacher.model.roi_heads
    for p in (*model.teacher.model.proposal_generator.parameters(), *heads.parameters()):
        p.data.normal_(std=0.2)  # a random teacher says next to nothing
    optimizer = torch.optim.SGD(
        [*model.student.backbone.parameters(), *model.methods.parameters()], lr=1e-4, momentum=0.9
    )
    found, inputs = [], batch()
    with EventStorage(0):
        for _ in range(15):
            torch.manual_seed(0)  # the same samples
            losses = model(inputs)
            loss = sum(losses[name] for name in TERMS)
            found.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert found[-1] < 0.7 * found[0]


# ---- rows of tools/benchmark.py ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts, row, expected",
    [
        ([], "with soft judges", {"twi_rpn", "twi_roi", "soft_rpn", "soft_roi"}),
        ([], "with soft judges alone", {"soft_rpn", "soft_roi"}),
        ([], "with a standardised target", {"twi_rpn", "twi_roi"}),
        (SOFT, "without soft judges", {"twi_rpn", "twi_roi"}),
        ([*SOFT, *STANDARDIZE], "feature mimic alone", set()),
        ([], "positions weighted", {"twi_rpn", "twi_roi"}),
        ([], "with the ROI feature", {"twi_rpn", "twi_roi", *ROI_TERMS}),
        (ROI, "feature mimic alone", set()),
    ],
)
def test_benchmark_rows(opts, row, expected):
    cfg, model = tiny_cfg("era", *opts), tiny_model("era", *opts)
    rows = ERA.benchmark_rows(cfg)
    assert ("without soft judges" in rows) == ("MODEL.ERA.TWI.SOFT_RPN_WEIGHT" in opts)
    model.methods["era"] = rows[row](cfg, model.detector, model.teacher)
    losses, _ = losses_of(model, batch())
    found = {name.removeprefix("loss_era_") for name in losses if name.startswith("loss_era_")}
    others = {"feature"} if row == "feature mimic alone" else {"feature", "residual"}
    assert found == expected | others
    assert set(losses) >= {name for name in ERA.loss_labels if name[9:] in expected}


# ---- a user's mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.ERA.STANDARDIZE", "batch", r"STANDARDIZE is 'batch': expected one of none, teacher"),
        ("MODEL.ERA.TWI.SOFT_POSITIONS", "some", r"SOFT_POSITIONS is 'some': expected one of all, sampled"),
        ("MODEL.ERA.TWI.SOFT_RPN_WEIGHT", "-1.0", r"SOFT_RPN_WEIGHT is -1\.0: expected a finite number"),
    ],
)  # fmt: skip
def test_wrong_values_are_one_sentence(key, value, message):
    with pytest.raises(UserError, match=message):
        tiny_model("era", key, value)


def test_heads_that_cannot_judge_softly_are_refused(monkeypatch):
    monkeypatch.setattr(RCNN, "soft_parts", ("roi",))
    with pytest.raises(UserError, match=r"SOFT_RPN_WEIGHT is 1\.0, .* no soft judge 'rpn'"):
        tiny_model("era", *SOFT)
    with pytest.raises(UserError, match=r"MODEL\.ERA\.LEVELS is .* the teacher's heads also read"):
        tiny_model(
            "era", *NO_HARD, "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", "1.0", "MODEL.ERA.LEVELS", "['p3']"
        )


def test_other_families_say_that_they_do_not_judge_softly():
    detector = detector_of(tiny_model("plain"))
    with pytest.raises(NotImplementedError, match="RCNN does not judge by its own outputs"):
        Detector.soft_targets(detector, "rpn", {}, None)
    with pytest.raises(NotImplementedError, match="RCNN does not judge by its own outputs"):
        Detector.soft_head_loss(detector, "rpn", {}, None, None)
