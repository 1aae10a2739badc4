"""The ERA losses on a tiny detector: against stock Detectron2, weights, gradients, statistics."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from builders import batch, losses_of, tiny_model
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from era.errors import UserError
from era.methods.checks import check_levels

TERMS = {
    "loss_era_feature": "MODEL.ERA.FEATURE_WEIGHT",
    "loss_era_residual": "MODEL.ERA.RESIDUAL_WEIGHT",
    "loss_era_twi_rpn": "MODEL.ERA.TWI.RPN_WEIGHT",
    "loss_era_twi_roi": "MODEL.ERA.TWI.ROI_WEIGHT",
    "loss_era_kd": "MODEL.ERA.KD_WEIGHT",
}
ALL_ON = [item for key in TERMS.values() for item in (key, "1.0")]


@pytest.mark.parametrize("name", TERMS)
def test_each_term_has_its_own_weight_and_line(name):
    """Twice the weight gives twice that loss and no other change; weight 0 leaves the term out."""
    inputs = batch()
    ones, _ = losses_of(tiny_model("era", *ALL_ON), inputs)
    twice, _ = losses_of(tiny_model("era", *ALL_ON, TERMS[name], "2.0"), inputs)
    off, _ = losses_of(tiny_model("era", *ALL_ON, TERMS[name], "0.0"), inputs)
    assert set(TERMS) <= set(ones) and set(off) == set(ones) - {name}
    for key, value in ones.items():
        torch.testing.assert_close(twice[key], value * (2 if key == name else 1))
        if key != name:
            torch.testing.assert_close(off[key], value)


def test_feature_and_residual_losses_by_definition():
    """w_f MSE(e_0, F_T), and (w_r/N) sum_i s_i MSE(e_i, F_T), recomputed from public parts."""
    model = tiny_model(
        "era", "MODEL.ERA.NORM", "none", "MODEL.ERA.FEATURE_WEIGHT", "3.0",
        "MODEL.ERA.RESIDUAL_WEIGHT", "5.0", "MODEL.ERA.SCALES", "(1.0, 0.5, 0.25, 0.125)",
    )  # fmt: skip
    inputs = batch()
    losses, storage = losses_of(model, inputs)
    with torch.no_grad():
        images = model.student.preprocess_image(inputs).tensor
        features = model.student.backbone(images)  # BN in train mode, as in the step
        target = model.teacher.features(inputs, features, images.shape[-2:])
        estimates = model.methods["era"].estimator(features).cumulative()
        distances = [
            torch.stack([((e[p] - target[p]) ** 2).mean() for p in target]) for e in estimates
        ]
    expected = sum(s * d.mean() for s, d in zip((1, 0.5, 0.25, 0.125), distances[1:], strict=True))
    torch.testing.assert_close(losses["loss_era_feature"], 3 * distances[0].mean())
    torch.testing.assert_close(losses["loss_era_residual"], 5 / 4 * expected)
    for i, by_level in enumerate(distances):
        for level, value in zip(target, by_level, strict=True):
            logged = storage.latest()[f"era/{level}/residual_e{i}"][0]
            assert logged == pytest.approx(value.item(), rel=1e-4)


def test_a_compiled_estimator_changes_no_number(monkeypatch):
    # tracing only: generating and compiling C++ takes minutes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    inputs, found = batch(), []
    for is_compiled in ("False", "True"):
        model = tiny_model("era", "MODEL.ERA.NORM", "none", "MODEL.ERA.COMPILE", is_compiled)
        losses, _ = losses_of(model, inputs)
        sum(losses.values()).backward()
        found.append([losses, {k: p.grad for k, p in model.named_parameters()}])
    torch.testing.assert_close(found[1], found[0])


def test_twi_losses_are_detectron2s_losses_of_the_teachers_heads():
    """With no branch and an identity adapter, TWI equals a stock detector of student backbone and
    teacher heads: its RPN on the same sampled anchors, its ROI heads on the same proposals."""
    model = tiny_model("era", "MODEL.ERA.NUM_BRANCHES", "0", "MODEL.ERA.SCALES", "[]")
    inputs = batch((2, 3))
    losses, _ = losses_of(model, inputs)

    mixed = tiny_model("plain")
    mixed.load_state_dict(model.student.state_dict())
    sampled = {}
    rpn, roi = mixed.proposal_generator, mixed.roi_heads
    original = roi.label_and_sample_proposals
    roi.label_and_sample_proposals = lambda p, t: sampled.setdefault("proposals", original(p, t))
    losses_of(mixed, inputs)  # the student's own proposals; the same random state samples alike
    teacher = model.teacher.model
    rpn.rpn_head.load_state_dict(teacher.proposal_generator.rpn_head.state_dict())
    roi.box_head.load_state_dict(teacher.roi_heads.box_head.state_dict())
    roi.box_predictor.load_state_dict(teacher.roi_heads.box_predictor.state_dict())
    roi.label_and_sample_proposals = lambda p, t: sampled["proposals"]
    expected, _ = losses_of(mixed, inputs)
    torch.testing.assert_close(
        losses["loss_era_twi_rpn"], expected["loss_rpn_cls"] + expected["loss_rpn_loc"]
    )
    torch.testing.assert_close(
        losses["loss_era_twi_roi"], expected["loss_cls"] + expected["loss_box_reg"]
    )


@pytest.mark.parametrize("term", TERMS)
def test_gradients_reach_what_they_should_and_no_teacher(term):
    """Each term alone: into the student's backbone and what it uses, never into a teacher weight."""
    off = [item for key in TERMS.values() for item in (key, "0.0")]
    model = tiny_model(
        "era", *off, TERMS[term], "1.0", teacher_opts=["MODEL.FPN.OUT_CHANNELS", "24"]
    )
    losses, _ = losses_of(model, batch())
    losses[term].backward()

    def reached(module):
        return [p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters()]

    estimator = model.methods["era"].estimator
    uses_branches = term not in ("loss_era_feature", "loss_era_kd")
    uses_adapter = term in ("loss_era_feature", "loss_era_twi_rpn", "loss_era_twi_roi")
    assert any(reached(model.student.backbone.bottom_up))
    # a bias before BN has no gradient, so not every weight of a branch; but every branch
    for branch in estimator.mbrnet.branches:
        assert any(reached(branch)) == uses_branches
    for projection in estimator.mbrnet.up_projections:
        assert all(reached(projection)) == uses_branches
    assert all(reached(estimator.adapter)) == uses_adapter
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


def test_residual_loss_of_one_branch_leaves_the_others_alone():
    """Parallel branches: scale 0 for all but branch 2 gives gradient to branch 2 only."""
    model = tiny_model(
        "era", "MODEL.ERA.ACCUMULATED_INPUTS", "False", "MODEL.ERA.SCALES", "[0.0, 1.0, 0.0, 0.0]",
    )  # fmt: skip
    losses, _ = losses_of(model, batch())
    losses["loss_era_residual"].backward()
    sums = [
        sum(p.grad.abs().sum().item() for p in branch.parameters())
        for branch in model.methods["era"].estimator.mbrnet.branches
    ]
    assert sums[1] > 0 and sums[0] == sums[2] == sums[3] == 0


@pytest.mark.parametrize("norm", ["none", "GN", "BN"])
def test_residual_distance_falls_with_training(norm):
    """Plain SGD at a detector's learning rate, as in training: within some steps on one batch the
    branches bring the estimate clearly nearer to the teacher than ``e_0`` is."""
    model = tiny_model("era", "MODEL.ERA.NORM", norm)
    optimizer = torch.optim.SGD(model.methods.parameters(), lr=0.03, momentum=0.9)
    inputs = batch()
    with EventStorage(0) as storage:
        for _ in range(40):
            optimizer.zero_grad()
            losses = model(inputs)
            sum(v for k, v in losses.items() if k.startswith("loss_era")).backward()
            optimizer.step()
            logged = {k: v[0] for k, v in storage.latest().items() if "/residual_e" in k}
    distances = [logged[f"era/p3/residual_e{i}"] for i in range(5)]
    assert distances[4] < 0.95 * distances[0]
    assert distances[1] < distances[0]


def test_nothing_but_losses_is_summed():
    losses, storage = losses_of(tiny_model("era", *ALL_ON), batch())
    assert all(name.startswith("loss_") and value.dim() == 0 for name, value in losses.items())
    assert any(name.startswith("era/p3/residual_e") for name in storage.latest())
    # the student's own statistics are those of plain training
    _, plain = losses_of(tiny_model("plain"), batch())
    for name, value in plain.latest().items():
        assert storage.latest()[name] == value, name


def test_levels_can_be_chosen():
    off = ["MODEL.ERA.TWI.RPN_WEIGHT", "0.0", "MODEL.ERA.TWI.ROI_WEIGHT", "0.0"]
    model = tiny_model("era", *off, "MODEL.ERA.LEVELS", "['p3', 'p5']")
    _, storage = losses_of(model, batch())
    assert {k.split("/")[1] for k in storage.latest() if "residual_e" in k} == {"p3", "p5"}


def test_strides_must_match():
    def detector(stride):
        return SimpleNamespace(feature_shapes={"p2": ShapeSpec(channels=4, stride=stride)})

    assert check_levels(detector(4), detector(4), ["p2"], "MODEL.ERA.LEVELS") == (4, 4)
    with pytest.raises(
        UserError, match="p2, which has stride 4 in the student and 8 in the teacher"
    ):
        check_levels(detector(4), detector(8), ["p2"], "MODEL.ERA.LEVELS")


class HostWaits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: reading a number, or a size that depends on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in ("nonzero", "_local_scalar_dense", "masked_select"):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_host_waits_do_not_grow_with_the_branches():
    """On top of the student's own about 50 a step, at most 15, however many estimates are judged."""
    counts = []
    for model in (
        tiny_model("plain"),
        *(
            tiny_model(
                "era", "MODEL.ERA.NORM", "none", "MODEL.ERA.KD_WEIGHT", "1.0",
                "MODEL.ERA.NUM_BRANCHES", n, "MODEL.ERA.SCALES", [1.0] * n,
                "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "8",
            )
            for n in (1, 4)
        ),
    ):  # fmt: skip
        model.train()
        torch.manual_seed(0)
        with EventStorage(5), HostWaits() as waits:
            model(batch((2, 1)))
        counts.append(waits.count)
    plain, one, four = counts
    assert one == four and 0 < four - plain <= 15
