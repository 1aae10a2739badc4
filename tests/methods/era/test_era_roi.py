"""ERA at the ROI feature: numbers by hand, its losses by definition, gradients, few proposals, a user's mistakes."""

import copy

import pytest
import torch
from builders import batch, losses_of, tiny_cfg, tiny_model
from detectron2.utils.events import EventStorage

from era.errors import UserError
from era.losses import kd_loss
from era.methods.era import ERA
from era.methods.era.mbrnet import MBRNet
from era.methods.era.roi import BlendedMBRNet, from_config
from era.modeling.detectors import Detector, detector_of
from era.modeling.step import Step
from era.runs.series import chart_series

TERMS = {
    "feature": "MODEL.ERA.ROI.FEATURE_WEIGHT",
    "residual": "MODEL.ERA.ROI.RESIDUAL_WEIGHT",
    "twi": "MODEL.ERA.ROI.TWI_WEIGHT",
    "soft": "MODEL.ERA.ROI.SOFT_WEIGHT",
}
ALL_ON = [item for key in TERMS.values() for item in (key, "1.0")]
NO_MAPS = [
    item
    for key in ("FEATURE_WEIGHT", "RESIDUAL_WEIGHT", "TWI.RPN_WEIGHT", "TWI.ROI_WEIGHT")
    for item in (f"MODEL.ERA.{key}", "0.0")
]
# a teacher whose maps and vectors are wider than the student's
WIDER = ["MODEL.FPN.OUT_CHANNELS", "24", "MODEL.ROI_BOX_HEAD.FC_DIM", "48"]


# ---- inputs of the branches -------------------------------------------------------------------------


def multiplying(net, *gains):
    """Branches that multiply by a number, so that outputs can be worked by hand."""
    for branch, gain in zip(net.branches, gains, strict=True):
        torch.nn.init.constant_(branch[0].weight, gain)
    return net


def test_blended_inputs_by_hand():
    """Gains 2, 3, 5 of F_S = 1: x_2 = 0.5 + 2 * 2, x_3 = 0.25 + 3 * 2 - 1 * 13.5."""
    net = BlendedMBRNet(
        in_channels=1, out_channels=1, num_branches=3, num_blocks=1, norm="none", beta=0.0
    )
    multiplying(net, 2.0, 3.0, 5.0)
    features = torch.ones(1, 1, 1, 1)
    assert [d.item() for d in net(features)] == [2, 3, 5]
    for vector, value in zip([*net.alphas, *net.betas], (0.5, 0.25, 2.0, 3.0, -1.0), strict=True):
        torch.nn.init.constant_(vector, value)
    assert [d.item() for d in net(features)] == [2, 13.5, 5 * (0.25 + 6 - 13.5)]


@pytest.mark.parametrize("beta, accumulated", [(0.0, False), (1.0, True)])
def test_blended_inputs_start_as_parallel_or_accumulated_ones(beta, accumulated):
    own = {"in_channels": 6, "out_channels": 4, "num_branches": 4, "hidden_channels": 5}
    net = BlendedMBRNet(**own, beta=beta)
    other = MBRNet(**own, accumulated_inputs=accumulated)
    found = other.load_state_dict(net.state_dict(), strict=False)
    assert found.missing_keys == [] and len(found.unexpected_keys) == 3 + 6
    features = torch.randn(7, 6, 1, 1)
    torch.testing.assert_close(net(features), other(features))
    sum(d.square().sum() for d in net(features)).backward()
    assert all(p.grad.abs().sum() > 0 for p in [*net.alphas, *net.betas])


@pytest.mark.parametrize("count", [0, 1])
def test_few_branches_have_nothing_to_blend(count):
    net = BlendedMBRNet(in_channels=2, out_channels=3, num_branches=count, beta=0.0)
    assert len(net(torch.randn(3, 2, 1, 1))) == count and len(net.alphas) == len(net.betas) == 0


# ---- the losses -------------------------------------------------------------------------------------


def awake(model):
    """The teacher's last layers far from 0, so that what they say differs."""
    for p in model.teacher.model.roi_heads.box_predictor.parameters():
        p.data.normal_(std=0.2)
    return model


@pytest.mark.parametrize("teacher", [[], WIDER], ids=["equal widths", "a wider teacher"])
def test_the_losses_by_definition(teacher):
    """On vectors, with plain linear layers in the place of 1x1 convs, two branches, tau 2."""
    model = awake(
        tiny_model(
            "era", *ALL_ON, "MODEL.ERA.ROI.NUM_BRANCHES", "2", "MODEL.ERA.ROI.SCALES", "[1.0, 0.5]",
            "MODEL.ERA.ROI.BETA", "1.0", "MODEL.ERA.KD_TEMPERATURE", "2.0", teacher_opts=teacher,
        )
    )  # fmt: skip
    inputs = batch((2, 3))
    with model.detector.record() as recording:
        losses_of(model.student, inputs)
    step = Step(inputs, recording, model.detector, model.teacher)
    roi, judge = model.methods["era"].roi, model.teacher.detector
    estimator = copy.deepcopy(roi.estimator)
    with EventStorage(0), torch.no_grad():
        found, measured = roi(step)

        heads = judge.model.roi_heads
        maps = [step.teacher_features[level] for level in heads.box_in_features]
        target = heads.box_head(
            heads.box_pooler(maps, [p.proposal_boxes for p in recording.proposals])
        )
        own = recording.vectors
        assert own.shape[1] == 32 and target.shape[1] == (48 if teacher else 32)

        def linear(conv, x):
            return x @ conv.weight[:, :, 0, 0].T + (0 if conv.bias is None else conv.bias)

        def norm(bn, x):
            x = (x - x.mean(0)) / (x.var(0, correction=0) + bn.eps).sqrt()
            return x * bn.weight + bn.bias

        estimates, outputs = [linear(estimator.adapter, own)], []
        if not teacher:
            torch.testing.assert_close(estimates[0], own)  # P starts as the identity
        for i, branch in enumerate(estimator.mbrnet.branches):
            hidden = norm(branch[1], linear(branch[0], sum(outputs, own))).relu()
            outputs.append(norm(branch[4], linear(branch[3], hidden)))
            d = outputs[-1]
            if teacher:
                d = linear(estimator.mbrnet.up_projections[i], d)
            estimates.append(estimates[-1] + d)
        distances = [(e - target).square().mean() for e in estimates]
        torch.testing.assert_close(measured[0], torch.stack(distances))
        torch.testing.assert_close(found["feature"], distances[0])
        torch.testing.assert_close(found["residual"], (distances[1] + 0.5 * distances[2]) / 2)

        classes = torch.cat([p.gt_classes for p in recording.proposals])
        goal_logits, goal_deltas = heads.box_predictor(target)
        hard = soft = 0.0
        for weight, e in zip((1.0, 0.5, 0.25), estimates, strict=True):
            logits, deltas = heads.box_predictor(e)
            losses = heads.box_predictor.losses((logits, deltas), recording.proposals)
            assert losses["loss_cls"].item() == pytest.approx(
                torch.nn.functional.cross_entropy(logits, classes).item(), rel=1e-5
            )
            hard += weight * sum(losses.values())
            p = goal_logits.softmax(1)[:, :-1].repeat_interleave(4, dim=1)
            box = (p * (deltas - goal_deltas).abs()).sum(1).mean()
            soft += weight * (kd_loss(logits, goal_logits, 2.0) + box)
    torch.testing.assert_close(found["twi"], hard)
    torch.testing.assert_close(found["soft"], soft)


@pytest.mark.parametrize("name", TERMS)
def test_each_term_has_its_own_weight_and_line(name):
    inputs = batch()
    off, _ = losses_of(tiny_model("era"), inputs)
    ones, _ = losses_of(tiny_model("era", *ALL_ON), inputs)
    twice, _ = losses_of(tiny_model("era", *ALL_ON, TERMS[name], "2.0"), inputs)
    without, _ = losses_of(tiny_model("era", *ALL_ON, TERMS[name], "0.0"), inputs)
    names = {f"loss_era_roi_{term}" for term in TERMS}
    assert ones.keys() - off.keys() == names <= ERA.loss_labels.keys()
    assert without.keys() == ones.keys() - {f"loss_era_roi_{name}"}
    for key, value in ones.items():
        factor = 2 if key == f"loss_era_roi_{name}" else 1
        torch.testing.assert_close(twice[key], value * factor)
        if key in off:  # the losses of before are not touched, bit for bit
            assert torch.equal(value, off[key]), key


@pytest.mark.parametrize("name", TERMS)
def test_gradients_reach_what_they_should_and_no_teacher(name):
    """Each term alone: the student as far as its box head, and of ERA's own weights all that the term reads and
    nothing that is frozen, so that DDP waits for none."""
    model = awake(tiny_model("era", *NO_MAPS, TERMS[name], "1.0", teacher_opts=WIDER))
    losses, _ = losses_of(model, batch())
    assert [k for k in losses if k.startswith("loss_era")] == [f"loss_era_roi_{name}"]
    losses[f"loss_era_roi_{name}"].backward()
    student, roi = model.student, model.methods["era"].roi
    for module in (student.backbone.bottom_up, student.roi_heads.box_head):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    for module in (student.proposal_generator, student.roi_heads.box_predictor):
        assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    uses = {"adapter": name != "residual", "mbrnet": name != "feature"}
    for part, is_used in uses.items():
        parameters = [*getattr(roi.estimator, part).parameters()]
        assert all(p.requires_grad == is_used for p in parameters)
        assert all((p.grad is not None) == is_used for p in parameters)
    if uses["mbrnet"]:
        # the last norm's gain and shift, the projection and what blends the inputs of every branch
        for branch in roi.estimator.mbrnet.branches:
            assert branch[-1].weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in model.methods["era"].estimator.parameters())


@pytest.mark.parametrize("objects", [(2, 3), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_pictures_without_objects(objects):
    model = tiny_model("era", *ALL_ON)
    losses, _ = losses_of(model, batch(objects))
    assert all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.methods.parameters())


@pytest.mark.parametrize("norm", ["BN", "none"])
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_proposals_give_0_and_a_gradient_everywhere(count, norm):
    model = tiny_model("era", *ALL_ON, "MODEL.ERA.ROI.NORM", norm)
    inputs = batch()
    with model.detector.record() as recording:
        losses_of(model.student, inputs)
    recording.proposals = [recording.proposals[0][:count], recording.proposals[1][:0]]
    recording.vectors = recording.vectors[:count]
    found, measured = model.methods["era"].roi(
        Step(inputs, recording, model.detector, model.teacher)
    )
    assert measured is None and found == dict.fromkeys(TERMS, 0)
    sum(found.values()).backward()
    parameters = [
        *model.methods["era"].roi.parameters(),
        *model.student.roi_heads.box_head.parameters(),
    ]
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in parameters)


@pytest.mark.parametrize("count", [0, None], ids=["no proposal", "all"])
def test_without_labels_no_term_looks_at_ground_truth(count):
    model = tiny_model("era", *ALL_ON)
    inputs = batch()
    with model.detector.record() as recording:
        losses_of(model.student, inputs)
    recording.proposals = [p[:count] for p in recording.proposals]
    recording.vectors = recording.vectors[:count]
    for p in recording.proposals:
        p.remove("gt_classes")
    step = Step(inputs, recording, model.detector, model.teacher, labeled=False)
    found, _ = model.methods["era"].roi(step)
    assert found.keys() == TERMS.keys() - {"twi"}


@pytest.mark.parametrize("name", TERMS)
def test_which_terms_need_labels(name):
    cfg = tiny_cfg("era", *NO_MAPS, TERMS[name], "1.0")
    assert ERA.needs(cfg).labels == (name == "twi")


def test_last_layers_judge_no_vector_with_0():
    detector = detector_of(tiny_model("plain"))
    nothing = torch.zeros(0, 32, requires_grad=True)
    goal = detector.predict_vectors(nothing.detach())
    loss = detector.soft_prediction_loss(detector.predict_vectors(nothing), goal, 1.0)
    loss.backward()
    assert loss == 0 and nothing.grad.shape == (0, 32)


def test_predictions_are_the_last_layers_of_the_vectors():
    """Of the student's own step too, whose vectors the recording holds."""
    detector = detector_of(tiny_model("plain"))
    with detector.record() as recording:
        losses_of(detector.model, batch())
    assert detector.vector_channels == recording.vectors.shape[1] == 32
    assert recording.vectors.requires_grad
    found = detector.predict_vectors(recording.vectors)
    torch.testing.assert_close(found, recording.predictions)
    with EventStorage(0):
        found = detector.prediction_loss(found, recording)
        expected = detector.head_loss("roi", recording.features, recording)
    torch.testing.assert_close(found, expected)


# ---- what is kept and shown -------------------------------------------------------------------------


def test_its_weights_are_saved_only_where_it_is_used():
    plain = tiny_model("era").state_dict()
    own = tiny_model("era", *ALL_ON, "MODEL.ERA.ROI.NORM", "none").state_dict()
    added = {k.removeprefix("methods.era.roi.estimator.") for k in own.keys() - plain.keys()}
    expected = {
        f"mbrnet.branches.{i}.{k}" for i in range(4) for k in ("0.weight", "0.bias", "2.weight")
    }
    expected |= {f"mbrnet.alphas.{i}" for i in range(3)} | {f"mbrnet.betas.{i}" for i in range(6)}
    assert added == expected | {"adapter.weight", "adapter.bias"}
    for key, value in plain.items():  # and those of the maps start as they would without it
        assert torch.equal(own[key], value), key


def test_its_distances_are_logged_apart_from_those_of_the_maps():
    _, storage = losses_of(tiny_model("era", *ALL_ON), batch())
    logged = {name: value[0] for name, value in storage.latest().items()}
    _, of_maps = losses_of(tiny_model("era"), batch())
    left, removed = (chart_series([{"iteration": 0, **logged}], chart) for chart in ERA.charts)
    expected = chart_series(
        [{"iteration": 0, **{k: v[0] for k, v in of_maps.latest().items()}}], ERA.charts[0]
    )
    assert [float(y[0]) for _, _, y in left] == [float(y[0]) for _, _, y in expected]
    assert [name for name, _, _ in removed] == ["p3", "p4", "p5", "p6", "roi"]
    assert {f"era/roi/residual_e{i}" for i in range(5)} <= logged.keys()


@pytest.mark.parametrize("norm", ["BN", "none"])
def test_the_distance_falls_with_training(norm):
    """From a start at 0 on one batch, by plain SGD, and further with the branches than without."""
    model = tiny_model(
        "era", *NO_MAPS, *ALL_ON, TERMS["twi"], "0.0", TERMS["soft"], "0.0",
        "MODEL.ERA.ROI.NORM", norm, "MODEL.ERA.ZERO_START", "True",
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.methods["era"].roi.parameters(), lr=0.05, momentum=0.9)
    found, inputs = [], batch()
    with EventStorage(0) as storage:
        for _ in range(30):
            torch.manual_seed(0)
            losses = model(inputs)
            found.append([storage.latest()[f"era/roi/residual_e{i}"][0] for i in range(5)])
            optimizer.zero_grad()
            (losses["loss_era_roi_feature"] + losses["loss_era_roi_residual"]).backward()
            optimizer.step()
    assert found[0] == pytest.approx([found[0][0]] * 5)
    assert found[-1][0] < 0.95 * found[0][0] and found[-1][4] < found[-1][0]


# ---- a user's mistakes ------------------------------------------------------------------------------

ON = [TERMS["feature"], "1.0"]
CONV_HEAD = [
    "MODEL.ROI_BOX_HEAD.NUM_FC", "0", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.CONV_DIM", "8",
]  # fmt: skip


@pytest.mark.parametrize(
    "opts, message",
    [
        ([TERMS["soft"], "-1.0"], r"ROI\.SOFT_WEIGHT is -1\.0: expected a finite number"),
        (["MODEL.ERA.ROI.NUM_BRANCHES", "2"], r"ROI\.SCALES has 4 numbers and .*ROI\.NUM_BRANCHES is 2"),
        (["MODEL.ERA.ROI.NORM", "LN"], r"ROI\.NORM is 'LN': expected one of none, BN"),
        (["MODEL.ERA.ROI.HIDDEN_CHANNELS", "-1"], r"ROI\.HIDDEN_CHANNELS is -1: expected at least 0"),
        ([*ON, *CONV_HEAD], r"the student is a RCNN that makes no vector .*MODEL\.ROI_BOX_HEAD\.NUM_FC above 0"),
    ],
)  # fmt: skip
def test_wrong_values_are_one_sentence(opts, message):
    with pytest.raises(UserError, match=message):
        tiny_model("era", *opts)


def test_a_teacher_that_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(UserError, match="the teacher is a RCNN that makes no vector"):
        tiny_model("era", *ON, teacher_opts=CONV_HEAD)
    without_p6 = property(lambda self: {"p3": None, "p4": None, "p5": None})
    model = tiny_model("era")
    monkeypatch.setattr(type(model.detector), "feature_shapes", without_p6)
    with pytest.raises(UserError, match=r"heads read \['p6'\], which the student's backbone lacks"):
        from_config(tiny_cfg("era", *ON), model.detector, model.teacher.detector)


def test_other_families_say_that_they_make_no_vectors():
    detector = detector_of(tiny_model("plain"))
    assert Detector.vector_channels.fget(detector) is None
    for name, arguments in {
        "vectors": ({}, None), "predict_vectors": (None,), "prediction_loss": (None, None),
        "soft_prediction_loss": (None, None, 1.0),
    }.items():  # fmt: skip
        with pytest.raises(NotImplementedError, match="RCNN makes no vector of a sample"):
            getattr(Detector, name)(detector, *arguments)
