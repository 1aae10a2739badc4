"""What may be switched on beyond ERA's defaults: numbers by hand, neutral values, gradients, checkpoints."""

from pathlib import Path

import pytest
import torch
from builders import NOTHING_SAMPLED, batch, losses_of, tiny_cfg, tiny_model
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from era.errors import UserError
from era.methods.era import ERA
from era.methods.era.fast.factored import ends_linear
from era.methods.era.losses import feature_terms
from era.methods.era.mbrnet import FeatureEstimator, MBRNet
from era.methods.era.standardise import emphasis
from era.modeling.detectors import Detector, detector_of
from era.modeling.detectors.rcnn import RCNN
from era.runs.series import chart_series

# ---- what the branches remove -----------------------------------------------------------------------


def test_the_fraction_removed_by_hand():
    """Distances 8, 6 and 2 at p3: three quarters are gone; at p4 the branches do harm; at p5 nothing was left."""
    era = tiny_model("era").methods["era"]
    distances = torch.tensor([[8.0, 6.0, 2.0], [4.0, 3.0, 5.0], [0.0, 0.0, 0.0]])
    with EventStorage(0) as storage:
        era._log(["p3", "p4", "p5"], distances)
    found = {k: v[0] for k, v in storage.latest().items() if k.endswith("/removed")}
    assert found == {"era/p3/removed": 0.75, "era/p4/removed": -0.25}
    assert storage.latest()["era/p5/residual_e2"][0] == 0


@pytest.mark.parametrize("count", [0, 2])
def test_the_fraction_removed_follows_from_the_distances(count):
    model = tiny_model("era", "MODEL.ERA.NUM_BRANCHES", count, "MODEL.ERA.SCALES", [1.0] * count)
    _, storage = losses_of(model, batch())
    logged = {name: value[0] for name, value in storage.latest().items()}
    (chart,) = (c for c in ERA.charts if "remove" in c.title)
    curves = chart_series([{"iteration": 0, **logged}], chart)
    assert [name for name, _, _ in curves] == (["p3", "p4", "p5", "p6"] if count else [])
    for level, _, values in curves:
        first, last = (logged[f"era/{level}/residual_e{i}"] for i in (0, count))
        assert values.tolist() == [pytest.approx(1 - last / first)]


# ---- branches with context --------------------------------------------------------------------------


def test_the_first_conv_sees_its_surroundings_and_the_last_does_not():
    """1 everywhere, kernels of 1: nine neighbours inside, four at a corner, then x 2 and x 3."""
    net = MBRNet(
        in_channels=1, out_channels=1, num_branches=1, num_blocks=3, norm="none", context_kernel=3
    )
    convs = list(net.branches[0])[::2]
    assert [conv.kernel_size for conv in convs] == [(3, 3), (1, 1), (1, 1)]
    for conv, gain in zip(convs, (1.0, 2.0, 3.0), strict=True):
        torch.nn.init.constant_(conv.weight, gain)
    (found,) = net(torch.ones(1, 1, 3, 3))
    assert found[0, 0].tolist() == [[24, 36, 24], [36, 54, 36], [24, 36, 24]]
    assert ends_linear(net)


@pytest.mark.parametrize("norm", ["none", "GN", "BN"])
@pytest.mark.parametrize("channels", [16, 24], ids=["equal width", "up-projected"])
def test_a_zero_start_adds_nothing_and_learns(norm, channels):
    """All e_i are e_0 at first, and after one step of plain SGD a gradient reaches every weight of every branch."""
    model = tiny_model(
        "era", "MODEL.ERA.ZERO_START", "True", "MODEL.ERA.CONTEXT_KERNEL", "3", "MODEL.ERA.NORM", norm,
        teacher_opts=["MODEL.FPN.OUT_CHANNELS", channels],
    )  # fmt: skip
    net = model.methods["era"].estimator.mbrnet
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for is_first in (True, False):
        losses, storage = losses_of(model, batch())
        distances = [storage.latest()[f"era/p3/residual_e{i}"][0] for i in range(5)]
        assert (distances[1:] == pytest.approx([distances[0]] * 4, rel=1e-6)) == is_first
        optimizer.zero_grad()
        sum(v for k, v in losses.items() if k.startswith("loss_era")).backward()
        assert all(p.grad is not None for p in net.parameters())  # DDP waits for none
        last = [branch[-1].weight for branch in net.branches]
        assert all(w.grad.abs().sum() > 0 for w in (last if is_first else net.parameters()))
        optimizer.step()


def test_context_and_zero_start_rename_no_weight():
    plain = tiny_model("era").state_dict()
    found = tiny_model("era", "MODEL.ERA.CONTEXT_KERNEL", "3", "MODEL.ERA.ZERO_START", "True")
    assert found.state_dict().keys() == plain.keys()


@pytest.mark.parametrize("value", ["2", "-1"])
def test_a_context_kernel_is_odd(value):
    with pytest.raises(UserError, match=rf"CONTEXT_KERNEL is {value}: expected an odd number"):
        tiny_model("era", "MODEL.ERA.CONTEXT_KERNEL", value)


# ---- the learned projection P -----------------------------------------------------------------------

PROJECTION = ["MODEL.ERA.PROJECTION", "always"]


def test_estimates_with_a_projection_by_hand():
    """F_S = 3, P = 2 F_S + 1, one branch of 5 F_S: e_0 = 7, e_1 = 7 + 15; the branch reads F_S, not e_0."""
    net = MBRNet(in_channels=1, out_channels=1, num_branches=1, num_blocks=1, norm="none")
    torch.nn.init.constant_(net.branches[0][0].weight, 5.0)
    estimator = FeatureEstimator(
        levels=["p3"], in_channels=1, out_channels=1, mbrnet=net, always_project=True
    )
    features = {"p3": torch.full((1, 1, 1, 1), 3.0)}
    assert [e["p3"].item() for e in estimator(features).cumulative()] == [3, 18]  # P starts as 1
    torch.nn.init.constant_(estimator.adapter.weight, 2.0)
    torch.nn.init.constant_(estimator.adapter.bias, 1.0)
    assert [e["p3"].item() for e in estimator(features).cumulative()] == [7, 22]
    assert estimator.final(features)["p3"].item() == 22


def test_a_projection_changes_nothing_at_first_and_is_learned():
    inputs = batch()
    plain, _ = losses_of(tiny_model("era"), inputs)
    model = tiny_model("era", *PROJECTION)
    losses, _ = losses_of(model, inputs)
    torch.testing.assert_close(losses, plain)
    adapter = model.methods["era"].estimator.adapter
    for name in ("loss_era_feature", "loss_era_twi_rpn", "loss_era_twi_roi"):
        gradients = torch.autograd.grad(losses[name], [*adapter.parameters()], retain_graph=True)
        assert all(g.abs().sum() > 0 for g in gradients), name
    (untouched,) = torch.autograd.grad(
        losses["loss_era_residual"], [adapter.weight], materialize_grads=True
    )
    assert untouched.abs().sum() == 0  # e_0 is a constant in a branch's target


def test_a_projection_is_saved_only_where_it_is_used():
    plain = tiny_model("era").state_dict().keys()
    added = tiny_model("era", *PROJECTION).state_dict().keys() - plain
    assert added == {f"methods.era.estimator.adapter.{name}" for name in ("weight", "bias")}
    # where the channels differ there has always been one
    other = {"teacher_opts": ["MODEL.FPN.OUT_CHANNELS", "24"]}
    states = [tiny_model("era", *opts, **other).state_dict() for opts in ([], PROJECTION)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_projection_without_a_loss_is_frozen():
    off = [item for key in ("FEATURE_WEIGHT", "TWI.RPN_WEIGHT", "TWI.ROI_WEIGHT")
           for item in (f"MODEL.ERA.{key}", "0.0")]  # fmt: skip
    estimator = tiny_model("era", *PROJECTION, *off).methods["era"].estimator
    assert not any(p.requires_grad for p in estimator.adapter.parameters())
    assert all(p.requires_grad for p in estimator.mbrnet.parameters())  # the residual loss is on


def test_inference_above_alpha_0_goes_through_the_projection():
    model = tiny_model("era", *PROJECTION, "MODEL.ERA.ALPHA", "1.0").eval()
    seen = []
    deployed = model.deployable()
    for adapter in (model.methods["era"].estimator.adapter, deployed.backbone.estimator.adapter):
        torch.nn.init.constant_(adapter.bias, 0.5)
        adapter.register_forward_hook(lambda _m, args, out: seen.append((out - args[0]).mean()))
    inputs = batch()
    found = model.inference(inputs, do_postprocess=False)
    assert len(seen) == 4
    other = deployed.inference(inputs, do_postprocess=False)
    assert [value.item() for value in seen] == pytest.approx([0.5] * 8, rel=1e-4)
    for a, b in zip(found, other, strict=True):
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)


# ---- positions weighted by the judge ----------------------------------------------------------------

WEIGHTED = ["MODEL.ERA.POSITION_WEIGHT", "teacher"]


def test_weighted_positions_by_hand():
    """Two channels, two positions of w = 0.6 and 0.2, sigma 2: sum w |(e - F) / 2|^2 / (2 sum w) and its gradient."""
    target = {"p3": torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])}
    zeroth = {"p3": (target["p3"] + torch.tensor([[[[2.0, 4.0]], [[0.0, 6.0]]]])).requires_grad_()}
    step = {"p3": torch.tensor([[[[-2.0, -2.0]], [[2.0, -2.0]]]], requires_grad=True)}
    estimates = [zeroth, {"p3": zeroth["p3"] + step["p3"]}]
    by_position = emphasis({"p3": torch.tensor([[[[0.6, 0.2]]]])})
    sigma = {"p3": torch.tensor([2.0, 2.0])}
    terms, measured = feature_terms(estimates, [step], target, [0.5], sigma, by_position)
    first = (0.6 * (1 + 0) + 0.2 * (4 + 9)) / (2 * 0.8)
    second = (0.6 * (0 + 1) + 0.2 * (1 + 4)) / (2 * 0.8)
    assert terms["feature"].item() == pytest.approx(first)
    assert terms["residual"].item() == pytest.approx(0.5 * second)
    assert measured[0].tolist() == pytest.approx([first, second])
    (gradient,) = torch.autograd.grad(terms["feature"], [zeroth["p3"]])
    expected = torch.tensor([[0.6 * 2, 0.2 * 4], [0.0, 0.2 * 6]]) * 2 / (2 * 0.8) / 4
    torch.testing.assert_close(gradient[0, :, 0], expected)
    (gradient,) = torch.autograd.grad(terms["residual"], [step["p3"]])
    expected = torch.tensor([[0.0, 0.2 * 2], [0.6 * 2, 0.2 * 4]]) * 2 / (2 * 0.8) / 4 * 0.5
    torch.testing.assert_close(gradient[0, :, 0], expected)


def maps(*shape):
    return {"p3": torch.randn(shape), "p4": torch.randn(*shape[:2], 2, 1)}


def test_uniform_weights_change_nothing_and_none_at_all_leaves_0():
    estimates, target = [maps(2, 3, 4, 5) for _ in range(2)], maps(2, 3, 4, 5)
    args = (estimates, [maps(2, 3, 4, 5)], target, [1.0])
    expected = feature_terms(*args)
    uniform = {level: torch.full_like(x[:, :1], 0.3) for level, x in target.items()}
    torch.testing.assert_close(feature_terms(*args, None, emphasis(uniform)), expected)
    terms, _ = feature_terms(*args, None, emphasis({k: w * 0 for k, w in uniform.items()}))
    assert terms == {"feature": 0, "residual": 0}


def test_levels_count_alike_however_little_is_seen_on_them():
    estimates, target = [maps(1, 2, 4, 4)], maps(1, 2, 4, 4)
    weights = {"p3": torch.rand(1, 1, 4, 4), "p4": torch.rand(1, 1, 2, 1)}
    found, _ = feature_terms(estimates, [], target, [], None, emphasis(weights))
    weights["p4"] *= 1e-6
    again, _ = feature_terms(estimates, [], target, [], None, emphasis(weights))
    torch.testing.assert_close(again, found)


def test_two_processes_weight_by_one_mean(monkeypatch):
    """This one has 0.2 and 0.4, the other a mean of 0.9: the mean of all four is 0.6."""
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda own: own.add_(0.9))
    found = emphasis({"p3": torch.tensor([0.2, 0.4]).view(1, 1, 1, 2)})
    assert found["p3"].square().flatten().tolist() == pytest.approx([0.2 / 0.6, 0.4 / 0.6])


def test_foreground_is_the_highest_objectness_over_a_positions_anchors():
    student = tiny_model("plain")
    detector = detector_of(student)
    torch.nn.init.normal_(student.proposal_generator.rpn_head.objectness_logits.weight, std=0.5)
    features = student.backbone(student.preprocess_image(batch()).tensor)
    assert detector.foreground_levels == {"p3", "p4", "p5", "p6"}
    logits, _ = student.proposal_generator.rpn_head([features["p5"], features["p3"]])
    found = detector.foreground({level: features[level] for level in ("p5", "p3")})
    assert list(found) == ["p5", "p3"]
    for level, expected in zip(found, logits, strict=True):
        assert not found[level].requires_grad and found[level].shape[1] == 1
        torch.testing.assert_close(found[level][:, 0], expected.sigmoid().max(1).values)
    with pytest.raises(NotImplementedError, match="RCNN does not say what is foreground"):
        Detector.foreground(detector, features)
    assert Detector.foreground_levels.fget(detector) == set()


@pytest.mark.parametrize("fast", ["True", "False"])
def test_a_weighted_step_by_definition(fast):
    model = tiny_model("era", *WEIGHTED, "MODEL.ERA.FEATURE_WEIGHT", "5.0", "MODEL.ERA.FAST", fast)
    head = model.teacher.model.proposal_generator.rpn_head
    torch.nn.init.normal_(head.objectness_logits.weight, std=0.5)  # weights that differ
    inputs = batch()
    losses, storage = losses_of(model, inputs)
    with torch.no_grad():
        images = model.student.preprocess_image(inputs).tensor
        features = model.student.backbone(images)
        target = model.teacher.features(inputs, features, images.shape[-2:])
        found = []
        for e in model.methods["era"].estimator(features).cumulative():
            by_level = []
            for level, goal in target.items():
                w = head([goal])[0][0].sigmoid().max(1, keepdim=True).values
                square = (e[level] - goal).square()
                by_level.append((w * square).sum() / (goal.shape[1] * w.sum()))
            found.append(torch.stack(by_level))
    torch.testing.assert_close(losses["loss_era_feature"], 5 * found[0].mean())
    residual = sum(s * x.mean() for s, x in zip((1, 0.5, 0.25, 0.125), found[1:], strict=True))
    torch.testing.assert_close(losses["loss_era_residual"], residual / 4)
    logged = storage.latest()["era/p4/residual_e2"][0]
    assert logged == pytest.approx(found[2][1].item(), rel=1e-4)


def test_weighted_positions_touch_no_other_loss_no_weight_and_no_teacher():
    plain, model = tiny_model("era"), tiny_model("era", *WEIGHTED)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.nn.init.normal_(
        model.teacher.model.proposal_generator.rpn_head.objectness_logits.weight, std=0.01
    )
    plain.teacher.model.load_state_dict(model.teacher.model.state_dict())
    expected, _ = losses_of(plain, batch())
    losses, _ = losses_of(model, batch())
    assert losses.keys() == expected.keys()
    for key in losses.keys() - {"loss_era_feature", "loss_era_residual"}:
        assert torch.equal(losses[key], expected[key]), key
    assert losses["loss_era_feature"] != expected["loss_era_feature"]
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize("objects", [(2, 0), (0, 0)], ids=["half", "empty"])
def test_weighted_positions_need_no_object(objects):
    losses, _ = losses_of(tiny_model("era", *WEIGHTED), batch(objects))
    assert all(torch.isfinite(x) for x in losses.values()) and losses["loss_era_residual"] > 0


def test_levels_that_the_judge_does_not_see_are_refused(monkeypatch):
    monkeypatch.setattr(RCNN, "foreground_levels", {"p3", "p4"})
    with pytest.raises(UserError, match=r"POSITION_WEIGHT is 'teacher' .* at \['p5', 'p6'\]"):
        tiny_model("era", *WEIGHTED)
    tiny_model("era")


# ---- which estimates are judged ---------------------------------------------------------------------

ENDS = ["MODEL.ERA.TWI.ESTIMATES", "ends"]


@pytest.mark.parametrize("fast", ["True", "False"])
def test_the_ends_have_the_weights_of_all(fast):
    """Where the branches add nothing every e_i is e_0, so that it does not matter which are judged; and each
    judgement of the ends is one of e_0 with weight 1 and one of e_N with weight (1 + 1/2 + 1/4 + 1/8) / 4."""
    start = ["MODEL.ERA.ZERO_START", "True", "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "0"]
    of_all, of_ends, of_zeroth = (
        losses_of(tiny_model("era", *start, *opts, "MODEL.ERA.FAST", fast), batch())[0]
        for opts in ([], ENDS, ["MODEL.ERA.NUM_BRANCHES", "0", "MODEL.ERA.SCALES", "[]"])
    )
    for part in ("rpn", "roi"):
        name = f"loss_era_twi_{part}"
        torch.testing.assert_close(of_ends[name], of_all[name], rtol=1e-4, atol=1e-6)
        expected = (1 + 1.875 / 4) * of_zeroth[name]
        torch.testing.assert_close(of_ends[name], expected, rtol=1e-4, atol=1e-6)


def test_the_ends_reach_every_branch():
    """The judges' gradient comes to B_1..B_N through e_N, as each d_i is part of it."""
    off = ["MODEL.ERA.FEATURE_WEIGHT", "0.0", "MODEL.ERA.RESIDUAL_WEIGHT", "0.0"]
    model = tiny_model("era", *ENDS, *off)
    losses, _ = losses_of(model, batch())
    sum(loss for name, loss in losses.items() if "twi" in name).backward()
    last = [branch[-1].weight.grad for branch in model.methods["era"].estimator.mbrnet.branches]
    assert len(last) == 4 and all(grad.abs().max() > 0 for grad in last)


@pytest.mark.parametrize("key", ["POSITION_WEIGHT", "PROJECTION", "TWI.ESTIMATES"])
def test_other_values_are_one_sentence(key):
    with pytest.raises(UserError, match=rf"MODEL\.ERA\.{key} is 'some': expected one of"):
        tiny_model("era", f"MODEL.ERA.{key}", "some")


# ---- all of them ------------------------------------------------------------------------------------


def test_neutral_values_are_values_of_keys_and_bring_no_weight():
    """Every one is a key of that type, and with all of them there is no weight but those of version 0.1."""
    cfg = tiny_cfg("era")
    for key, value in ERA.neutral.items():
        node, name = cfg, key.split(".")
        for part in name[:-1]:
            node = node[part]
        assert type(node[name[-1]]) is type(value), key
    opts = [item for pair in ERA.neutral.items() for item in pair]
    names = {name for name in tiny_model("era", *opts).state_dict() if name.startswith("methods.")}
    parts = {f"branches.{i}.{x}" for i in range(4) for x in ("0.weight", "0.bias", "2.weight")}
    assert names == {f"methods.era.estimator.mbrnet.{part}" for part in parts}


# ---- everything at once, in two processes -----------------------------------------------------------

EVERYTHING = [
    *PROJECTION, *WEIGHTED, "MODEL.ERA.CONTEXT_KERNEL", "3", "MODEL.ERA.ZERO_START", "True",
    "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "0", "MODEL.ERA.ROI.NORM", "none",
    "MODEL.ERA.ROI.FEATURE_WEIGHT", "1.0", "MODEL.ERA.ROI.RESIDUAL_WEIGHT", "1.0",
    "MODEL.ERA.ROI.TWI_WEIGHT", "1.0", "MODEL.ERA.ROI.SOFT_WEIGHT", "1.0",
    *NOTHING_SAMPLED,
]  # fmt: skip
IMAGES = batch((2, 2), seed=4)


def gradients_of(inputs):
    """Losses of a step and the gradient of every weight that is trained, averaged over processes if there are two."""
    model = tiny_model("era", *EVERYTHING)
    head = model.teacher.model.proposal_generator.rpn_head
    torch.nn.init.normal_(head.objectness_logits.weight, std=0.5)  # weights that differ
    wrapped = model
    if comm.get_world_size() > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    losses, _ = losses_of(wrapped, inputs)
    sum(losses.values()).backward()
    return (
        comm.get_rank(),
        losses,
        {k: p.grad for k, p in model.named_parameters() if p.requires_grad},
    )


def _of_one_image(folder):
    rank, losses, gradients = gradients_of([IMAGES[comm.get_rank()]])
    losses = {key: value.detach() for key, value in losses.items()}
    torch.save((losses, gradients), Path(folder) / f"{rank}.pth")


def test_with_everything_on_two_processes_equal_one(tmp_path):
    """No weight without a gradient, equal gradients, and the losses of one process on both images."""
    torch.set_num_threads(1)
    launch(_of_one_image, 2, dist_url="auto", args=(str(tmp_path),))
    (a, first), (b, second) = (torch.load(tmp_path / f"{r}.pth") for r in (0, 1))
    _, losses, gradients = gradients_of(IMAGES)
    assert {
        key for key in losses if key.startswith("loss_era_roi_")
    } and None not in gradients.values()
    for key, value in losses.items():
        torch.testing.assert_close((a[key] + b[key]) / 2, value.detach(), rtol=1e-4, atol=1e-6)
    for key, value in gradients.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5)
