"""The sparse pass of a dense head against its definition: losses and gradients in float64, and what it saves."""

import pytest
import torch
from builders import batch, losses_of, tiny_cfg, tiny_model
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.utils.flop_counter import FlopCounterMode

from era.methods.era import ERA
from era.methods.era.fast.dense import FastDense, knows_dense_head, reach
from era.methods.era.fast.factored import FactoredEstimates
from era.methods.era.fast.levers import Levers
from era.methods.era.twi import SoftJudges
from era.modeling.detectors import dense_record, detector_of

NARROW = ["MODEL.ERA.HIDDEN_CHANNELS", "4"]
# Options of the student, and of the teacher.
CASES = {
    "default": (NARROW, []),
    "another width": (["MODEL.FPN.OUT_CHANNELS", "12", *NARROW], []),
    "a norm at the end": (["MODEL.ERA.NORM", "GN"], []),
    "ends": ([*NARROW, "MODEL.ERA.TWI.ESTIMATES", "ends"], []),
    "no branches": (["MODEL.ERA.NUM_BRANCHES", "0", "MODEL.ERA.SCALES", "[]"], []),
    "one conv": (
        [*NARROW, "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.FCOS.NUM_CONVS", "1"],
        ["MODEL.RETINANET.NUM_CONVS", "1", "MODEL.FCOS.NUM_CONVS", "1"],
    ),
    "beside the ground truth": ([*NARROW, "MODEL.ERA.TWI.DENSE_WEIGHT", "0.5"], []),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_positions(monkeypatch):
    monkeypatch.setattr(dense_record, "POSITIONS_PER_IMAGE", 12)


def found_of(name, opts, teacher_opts, objects, *, fast):
    """Losses of a step in float64, and the gradient of ERA's."""
    model = tiny_model(
        f"{name}_era", *opts, "MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "1.0", "MODEL.ERA.FAST", str(fast),
        teacher=f"{name}_teacher", teacher_opts=teacher_opts,
    ).double()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (*model.teacher.model.head.parameters(), *model.methods.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    inputs = batch(objects, size=(64, 96))
    for item in inputs:
        item["image"] = item["image"].double()
        item["instances"].gt_boxes.tensor = item["instances"].gt_boxes.tensor.double()
    losses, _ = losses_of(model, inputs)
    own = {k: v for k, v in losses.items() if k.startswith("loss_era_")}
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(own.values()), parameters, allow_unused=True)
    return own, gradients


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
@pytest.mark.parametrize("objects", [(2, 0, 3), (0, 0)], ids=["half", "empty"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_definition(case, objects, name):
    (fast, own), (slow, other) = (
        found_of(name, *CASES[case], objects, fast=fast) for fast in (True, False)
    )
    assert fast.keys() == slow.keys() and "loss_era_soft_dense" in fast
    for key, value in slow.items():
        torch.testing.assert_close(fast[key], value, rtol=1e-9, atol=1e-12)
    for a, b in zip(own, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_each_conv_runs_where_it_is_read():
    """One position in the middle, one in a corner of a 7x7 map; each layer before reaches one further."""
    where = (torch.tensor([0, 1]), torch.tensor([3, 0]), torch.tensor([3, 0]))
    found = reach([where], [torch.zeros(2, 5, 7, 7)], 3)
    image, y, x = found.first[0]
    assert ((image == 0).sum(), (image == 1).sum()) == (25, 9)
    assert (y[image == 1].max(), x[image == 1].max(), y[image == 0].min()) == (2, 2, 1)
    assert [tuple(n.shape) for n in found.neighbours] == [(9 + 4, 9), (2, 9)]
    assert found.neighbours[1][0].tolist() == list(range(9))
    outside, first = 13, 9  # the second image's rows begin there; its position is a corner
    assert found.neighbours[1][1].tolist() == [
        outside, outside, outside, outside, first, first + 1, outside, first + 2, first + 3,
    ]  # fmt: skip


def test_which_heads_it_knows():
    soft = SoftJudges(("dense",), "sampled")
    retinanet, fcos = (detector_of(tiny_model(f"{name}_plain")) for name in ("retinanet", "fcos"))
    for judge in (retinanet, fcos):
        assert FastDense(judge, soft=soft).knows_soft("dense")
        assert "sparse" in FastDense(judge, soft=soft).describe()
        assert not FastDense(judge, soft=soft).knows("dense")
        assert not FastDense(judge, soft=SoftJudges(("dense",), "all")).knows_soft("dense")
        assert not FastDense(judge, Levers(sparse_dense=False), soft).knows_soft("dense")
    norms = tiny_cfg("fcos_plain", "MODEL.FCOS.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "32")
    assert not knows_dense_head(detector_of(build_model(norms)))
    retinanet.model.head.cls_subnet[0].stride = (2, 2)
    assert not knows_dense_head(retinanet)


def test_a_norm_in_the_head_is_judged_as_defined():
    """GroupNorm looks at all positions, so FCOS's own head runs at all."""
    wide = ["MODEL.FCOS.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "64"]
    model = tiny_model(
        "fcos_era", *wide, "MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "1.0",
        teacher="fcos_teacher", teacher_opts=wide,
    )  # fmt: skip
    assert not model.methods["era"].fast_terms.heads.knows_soft("dense")
    losses, _ = losses_of(model, batch())
    assert losses["loss_era_soft_dense"] > 0
    sum(losses.values()).backward()


def test_a_sample_of_positions_costs_a_part_of_all(monkeypatch):
    """Arithmetic of the soft judge of one estimate, forward and backward: 64 positions of 5,456 of an image of 512x512."""
    monkeypatch.setattr(dense_record, "POSITIONS_PER_IMAGE", 64)
    student = tiny_model("retinanet_plain", "MODEL.RETINANET.NUM_CONVS", "4")
    with torch.no_grad():
        for p in student.head.parameters():
            p.mul_(10)
    with detector_of(student).record() as step:
        losses_of(student, batch((4,), size=(512, 512)))
    judge = detector_of(student.requires_grad_(False).eval())
    target = {k: v.detach() for k, v in step.features.items()}

    def flops(positions, levers):
        maps = {k: (v + 0.1).requires_grad_() for k, v in target.items()}
        soft = SoftJudges(("dense",), positions)
        fast = FastDense(judge, levers, soft)
        with EventStorage(0), FlopCounterMode(display=False) as counter:
            if fast.knows_soft("dense"):
                estimates = FactoredEstimates(maps, {}, None, 0, torch.nn.Identity())
                loss = fast.losses("dense", estimates, [1.0], step, target=target)["soft"]
            else:
                goal = judge.soft_targets("dense", target, step, positions=positions)
                loss = judge.soft_head_loss("dense", maps, goal, step, positions=positions)
            loss.backward()
        return counter.get_total_flops(), loss.item()

    (sparse, loss), (dense, expected), (whole, _) = (
        flops(positions, Levers(sparse_dense=on))
        for positions, on in (("sampled", True), ("sampled", False), ("all", True))
    )
    assert loss == pytest.approx(expected, rel=1e-4)
    assert dense == whole and sparse < 0.4 * whole, sparse / whole


def test_benchmark_rows_are_of_the_family():
    opts = ["MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "1.0", *NARROW]
    cfg = tiny_cfg("retinanet_era", *opts, teacher="retinanet_teacher")
    rows = ERA.benchmark_rows(cfg)
    assert {"sparse_dense off", "with TWI of the dense head", "without soft judges"} < set(rows)
    assert not {name for name in rows if "RPN" in name or "ROI" in name or "rpn" in name}
    assert "sparse_dense off" not in ERA.benchmark_rows(tiny_cfg("era"))
    model = tiny_model("retinanet_era", *opts, teacher="retinanet_teacher")
    for row, expected in (
        ("with soft judges at all anchors", {"feature", "residual", "soft_dense"}),
        ("with TWI of the dense head", {"feature", "residual", "soft_dense", "twi_dense"}),
        ("without soft judges", {"feature", "residual"}),
        ("feature mimic alone", {"feature"}),
    ):
        model.methods["era"] = rows[row](cfg, model.detector, model.teacher)
        losses, _ = losses_of(model, batch())
        assert {k.removeprefix("loss_era_") for k in losses if "era" in k} == expected, row
        assert {k for k in losses if "era" in k} < set(ERA.loss_labels)
