"""OKDHP: ramp, ensemble and KL by hand and in numpy; boxes and keypoints on a step's own tensors; no teacher."""

import math

import numpy as np
import pytest
import torch
from builders import TINY, TOY, batch, losses_of, tiny_cfg, tiny_model, train_history
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_loss
from detectron2.structures import Keypoints
from detectron2.utils.events import EventStorage

from era.engine.launch import train_net
from era.errors import UserError
from era.losses import divergence
from era.methods.okdhp import Gate, consensus_loss, ensemble, ramp
from era.modeling.distiller import needs_teacher
from era.modeling.step import Step
from era.modeling.unlabeled import UNLABELED

OPTS = ["MODEL.DISTILLER.METHODS", "('OKDHP',)", "MODEL.OKDHP.RAMP", "0.0"]
JOINTS = 3
KEYPOINTS = [
    "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", str(JOINTS),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[8]", "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", "7",
    "MODEL.ROI_HEADS.NUM_CLASSES", "1",
]  # fmt: skip
BOXES = {"loss_okdhp_heads", "loss_okdhp_ensemble", "loss_okdhp_kd"}
POSES = {name.replace("okdhp_", "okdhp_keypoint_") for name in BOXES}


def weights(heads, together, kd):
    return [
        "MODEL.OKDHP.HEAD_WEIGHT", str(heads), "MODEL.OKDHP.ENSEMBLE_WEIGHT", str(together),
        "MODEL.OKDHP.KD_WEIGHT", str(kd),
    ]  # fmt: skip


def posed(objects, *, seed=0):
    """A batch with three visible joints in every box."""
    inputs = batch(objects, seed=seed, num_classes=1)
    for item in inputs:
        boxes = item["instances"].gt_boxes.tensor
        at = torch.tensor([0.25, 0.5, 0.75])[None, :, None]
        points = boxes[:, None, :2] + at * (boxes[:, None, 2:] - boxes[:, None, :2])
        visible = torch.full((len(boxes), JOINTS, 1), 2.0)
        item["instances"].gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
    return inputs


def recorded(model, inputs, iteration=0):
    """The student's step and what the method says of it."""
    torch.manual_seed(7)
    with EventStorage(iteration) as storage, model.detector.record() as recording:
        own = model.student(inputs)
        step = Step(inputs, recording, model.detector, None)
        return step, model.methods["okdhp"].losses(step), own, storage


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


# ---- the formulas ----------------------------------------------------------------------------------


def test_the_ramp_by_hand():
    assert ramp(0, 100) == pytest.approx(math.exp(-5))
    assert ramp(50, 100) == pytest.approx(math.exp(-1.25))
    assert ramp(100, 100) == ramp(1000, 100) == ramp(0, 0) == 1


def test_the_ensemble_by_hand():
    """One row of two heads with weights 1/4 and 3/4; heatmaps of two joints, the second by the second head alone."""
    boxes = ensemble(
        [torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 8.0]])], torch.tensor([[0.25, 0.75]])
    )
    assert boxes.tolist() == [[1, 6]]
    one, two = torch.full((1, 2, 1, 2), 4.0), torch.full((1, 2, 1, 2), 8.0)
    maps = ensemble([one, two], torch.tensor([[[0.25, 0.0], [0.75, 1.0]]]))
    assert maps.tolist() == [[[[7, 7]], [[8, 8]]]]


def test_the_divergence_against_numpy_with_both_gradients():
    draw = np.random.default_rng(0)
    own, target = draw.normal(0, 3, (5, 4)), draw.normal(0, 3, (5, 4))
    p, q = softmax(target / 2, 1), softmax(own / 2, 1)
    expected = 4 * np.mean((p * np.log(p / q)).sum(1))
    tensors = [torch.from_numpy(x).requires_grad_() for x in (own, target)]
    found = divergence(*tensors, 2.0)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: divergence(a, b, 2.0), tensors)
    none = [torch.zeros(0, 4, requires_grad=True) for _ in range(2)]
    divergence(*none, 2.0).backward()
    assert all(x.grad is not None for x in none)


def test_the_consensus_of_heatmaps_is_a_softmax_over_positions():
    """Mean over joints of all objects, sum over heads; numpy in float64."""
    draw = np.random.default_rng(1)
    heads, target = draw.normal(0, 2, (3, 2, 4, 5, 6)), draw.normal(0, 2, (2, 4, 5, 6))
    p = softmax(target.reshape(8, 30), 1)
    parts = [np.mean((p * np.log(p / softmax(h.reshape(8, 30), 1))).sum(1)) for h in heads]
    found = consensus_loss(
        [torch.from_numpy(h) for h in heads], torch.from_numpy(target), 1.0, detach=True
    )
    assert found.item() == pytest.approx(sum(parts), rel=1e-12)


def test_the_ensemble_is_a_constant_unless_the_code_is_followed():
    for detach in (True, False):
        own, target = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
        consensus_loss([own], target, 1.0, detach=detach).backward()
        assert own.grad.abs().sum() > 0 and (target.grad is None) == detach


def test_half_precision_does_not_overflow():
    big = torch.full((2, 4), 6e4, dtype=torch.float16)
    together = ensemble([big, -big], torch.full((2, 2), 0.5))
    assert together.dtype == torch.float32 and together.abs().max() == 0
    loss = consensus_loss([big * torch.tensor([1, -1, 1, 1])], together, 1.0, detach=True)
    assert torch.isfinite(loss) and loss.dtype == torch.float32


@pytest.mark.parametrize("joints", [0, 5])
def test_the_gate_is_a_distribution_over_heads(joints):
    gate = Gate(8, heads=3, joints=joints)
    found = gate(torch.randn(4, 8, 7, 7))
    assert found.shape == ((4, 3, 5) if joints else (4, 3))
    torch.testing.assert_close(found.sum(1), torch.ones_like(found.sum(1)))
    assert gate(torch.randn(0, 8, 7, 7)).shape[0] == 0


def test_the_gate_in_numpy():
    """Three receptive fields on a map of one position: only the middle of every kernel is seen."""
    gate = Gate(4, heads=2)
    x = torch.randn(3, 4, 1, 1)
    seen = sum(
        np.maximum(
            x[..., 0, 0].numpy() * v.weight[:, 0, size // 2, size // 2].detach().numpy()
            + v.bias.detach().numpy(),
            0,
        )
        for v, size in zip(gate.views, (3, 5, 7), strict=True)
    )
    parts = [p.detach().numpy() for p in (*gate.squeeze.parameters(), *gate.scores.parameters())]
    hidden = np.maximum(seen @ parts[0].T + parts[1], 0)
    np.testing.assert_allclose(
        gate(x).detach().numpy(), softmax(hidden @ parts[2].T + parts[3], 1), rtol=1e-5
    )


# ---- the method on a step --------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_the_losses_of_boxes_are_those_of_the_steps_own_tensors(objects):
    model = tiny_model("era", *OPTS, *weights(0.5, 3.0, 2.0))
    step, losses, _, _ = recorded(model, batch(objects))
    assert losses.keys() == BOXES
    method, recording = model.methods["okdhp"], step.student
    with torch.no_grad(), EventStorage(0):
        further = [head(recording.roi_features) for head in method.box_heads]
        stock = [sum(h.predictor.losses(tuple(p), recording.proposals).values())
                 for h, p in zip(method.box_heads, further, strict=True)]  # fmt: skip
        gate = method.box_gate(recording.roi_features).double().numpy()
    logits = [recording.predictions.class_logits.detach(), *(p.class_logits for p in further)]
    logits = np.stack([x.double().numpy() for x in logits])
    together = np.einsum("rb,brc->rc", gate, logits)
    rows = np.arange(len(together)), recording.classes.numpy()
    p = softmax(together, 1)
    kd = sum(np.mean((p * np.log(p / softmax(z, 1))).sum(1)) for z in logits)
    expected = {
        "heads": 0.5 * sum(stock).item(),
        "ensemble": 3 * np.mean(-np.log(p[rows])),
        "kd": 2 * kd,
    }
    for name, value in expected.items():
        assert losses[f"loss_okdhp_{name}"].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_the_losses_of_keypoints_are_those_of_the_steps_own_tensors(objects):
    model = tiny_model("era", *OPTS, *KEYPOINTS, *weights(0.5, 3.0, 2.0))
    inputs = posed(objects)
    step, losses, _, storage = recorded(model, inputs)
    assert losses.keys() == BOXES | POSES
    keypoints, method = step.student.keypoints, model.methods["okdhp"]
    assert keypoints.heatmaps.shape == (len(keypoints.features), JOINTS, 28, 28)
    if objects == (0, 0):
        assert all(losses[name] == 0 and losses[name].requires_grad for name in POSES)
        assert storage.latest()["kpts_num_skipped_batches"][0] > 0  # the student's own
        assert not any("teacher_heads/kpts" in name for name in storage.latest())
        return
    with torch.no_grad(), EventStorage(0):
        heatmaps = [
            keypoints.heatmaps,
            *(h.layers(keypoints.features) for h in method.keypoint_heads),
        ]
        gate = method.keypoint_gate(keypoints.features)
        together = torch.einsum("nbj,bnjyx->njyx", gate, torch.stack(heatmaps))

        def task(maps):
            return keypoint_rcnn_loss(maps, keypoints.proposals, None).item()

        expected = {"heads": 0.5 * sum(map(task, heatmaps[1:])), "ensemble": 3 * task(together)}
    p = softmax(together.double().numpy().reshape(-1, 28 * 28), 1)
    qs = [softmax(x.detach().double().numpy().reshape(-1, 28 * 28), 1) for x in heatmaps]
    expected["kd"] = 2 * sum(np.mean((p * np.log(p / q)).sum(1)) for q in qs)
    for name, value in expected.items():
        found = losses[f"loss_okdhp_keypoint_{name}"].item()
        assert found == pytest.approx(value, rel=1e-4), name


def test_under_autocast_the_losses_stay_float32():
    model = tiny_model("era", *OPTS, *KEYPOINTS)
    with torch.autocast("cpu", torch.bfloat16):
        _, losses, _, _ = recorded(model, posed((2, 1)))
    assert losses.keys() == BOXES | POSES
    assert all(x.dtype == torch.float32 and torch.isfinite(x) for x in losses.values())


@pytest.mark.parametrize("visible", ["True", "False"])
def test_the_keypoint_loss_is_the_students_own_whatever_its_settings(visible):
    opts = [
        "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", visible,
        "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT", "3.0",
    ]  # fmt: skip
    model = tiny_model("era", *OPTS, *KEYPOINTS, *opts)
    step, _, own, _ = recorded(model, posed((2, 1)))
    with EventStorage(0):
        again = model.detector.keypoint_loss(step.student.keypoints.heatmaps, step.student)
    torch.testing.assert_close(again, own["loss_keypoint"])


def test_the_ramp_follows_the_iteration():
    opts = ["MODEL.OKDHP.RAMP", "0.5", "SOLVER.MAX_ITER", "40"]
    model = tiny_model("era", *OPTS, *opts)
    found = [recorded(model, batch(), iteration) for iteration in (0, 10, 20, 30)]
    kd = [losses["loss_okdhp_kd"] / found[2][1]["loss_okdhp_kd"] for _, losses, _, _ in found]
    torch.testing.assert_close(
        torch.stack(kd),
        torch.tensor([math.exp(-5), math.exp(-1.25), 1.0, 1.0]),
        rtol=1e-4,
        atol=1e-6,
    )
    assert found[1][3].latest()["okdhp/ramp"][0] == pytest.approx(math.exp(-1.25))


def test_heads_are_of_the_students_form_with_weights_of_their_own():
    model = tiny_model("era", *OPTS, *KEYPOINTS, "MODEL.OKDHP.NUM_HEADS", "4")
    method, heads = model.methods["okdhp"], model.student.roi_heads
    own = [*heads.box_head.parameters(), *heads.box_predictor.parameters()]
    assert len(method.box_heads) == len(method.keypoint_heads) == 3
    for head in method.box_heads:
        assert [p.shape for p in head.parameters()] == [p.shape for p in own]
        assert not torch.equal(
            head.predictor.cls_score.weight, heads.box_predictor.cls_score.weight
        )
    for head in method.keypoint_heads:
        assert {k: v.shape for k, v in head.state_dict().items()} == {
            k: v.shape for k, v in heads.keypoint_head.state_dict().items()
        }
    assert not any("okdhp" in name for name in model.student.state_dict())


@pytest.mark.parametrize("on", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("detach", ["True", "False"])
def test_all_that_trains_has_a_gradient_and_nothing_of_weight_0_is_there(on, detach):
    opts = [*weights(*map(float, on)), "MODEL.OKDHP.DETACH_ENSEMBLE", detach]
    model = tiny_model("era", *OPTS, *KEYPOINTS, *opts)
    _, losses, _, _ = recorded(model, posed((2, 1)))
    names = [n for n, w in zip(("heads", "ensemble", "kd"), on, strict=True) if w]
    assert losses.keys() == {f"loss_okdhp_{k}{n}" for n in names for k in ("", "keypoint_")}
    sum(losses.values()).backward()
    for name, p in model.methods.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    assert any(p.grad is not None for p in model.student.backbone.parameters())
    own = model.student.roi_heads.box_predictor
    assert (own.cls_score.weight.grad is not None) == (on[1:] != (0, 0))
    assert own.bbox_pred.weight.grad is None


@pytest.mark.parametrize("opts", [[], KEYPOINTS], ids=["boxes", "keypoints"])
def test_weights_of_0_are_plain_training_step_by_step(opts):
    def inputs(objects, seed=0):
        return posed(objects, seed=seed)

    plain = train_history("plain", *opts, inputs=inputs)
    assert ("loss_keypoint" in plain[0]) == bool(opts)
    assert train_history("era", *OPTS, *weights(0.0, 0.0, 0.0), *opts, inputs=inputs) == plain


def test_nothing_is_left_on_the_student_after_a_step():
    model = tiny_model("era", *OPTS, *KEYPOINTS)
    head = model.student.roi_heads.keypoint_head
    recorded(model, posed((2, 1)))
    assert "layers" not in vars(head) and not head._forward_pre_hooks


def test_pictures_without_labels_teach_by_the_ensemble_alone():
    """Their keypoint heads do not run; a teacher chooses where to look."""
    mixed = posed((2, 1, 1))
    mixed[2][UNLABELED] = True
    opts = [*KEYPOINTS, "DATASETS.UNLABELED", "('somewhere',)", "SOLVER.UNLABELED_PER_BATCH", "1"]
    model = tiny_model("era", *OPTS, *opts, teacher_opts=["MODEL.ROI_HEADS.NUM_CLASSES", "1"])
    losses, _ = losses_of(model, mixed)
    alone = tiny_model("era", *OPTS, *KEYPOINTS)
    alone.methods.load_state_dict(model.methods.state_dict())
    labelled, _ = losses_of(alone, mixed[:2])
    assert losses.keys() == labelled.keys() > BOXES | POSES
    for name in labelled.keys() - {"loss_okdhp_kd"}:
        torch.testing.assert_close(losses[name], labelled[name])
    assert losses["loss_okdhp_kd"] != labelled["loss_okdhp_kd"]


def test_there_is_no_teacher_and_the_students_own_head_detects():
    cfg = tiny_cfg("era", *OPTS)
    cfg.MODEL.TEACHER.CONFIG_FILE = ""
    assert not needs_teacher(cfg)
    model = build_model(cfg).eval()
    assert model.teacher is None and model.deployable() is model.student
    with torch.no_grad():
        found, plain = model(batch()), model.student(batch())
    torch.testing.assert_close(found[0]["instances"].scores, plain[0]["instances"].scores)


def test_a_run_without_a_teacher_trains_and_its_student_is_a_plain_one(tiny_data, tmp_path):
    config = ["--config-file", str(TOY / "methods" / "okdhp.yaml"), *TINY, *tiny_data]
    train_net([*config, "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "2"])
    trained = torch.load(tmp_path / "model_final.pth")["model"]
    student = torch.load(tmp_path / "student" / "model_final.pth")["model"]
    assert any(name.startswith("methods.okdhp.box_gate") for name in trained)
    assert student.keys() == tiny_model("plain").state_dict().keys()


def test_with_another_method_the_losses_add_up():
    names, alone = ("ERA", "OKDHP"), {}
    opts = [*OPTS[2:], "MODEL.ERA.LEVELS", "['p3', 'p4', 'p5', 'p6']"]
    model = tiny_model("era", "MODEL.DISTILLER.METHODS", str(names), *opts)
    for name in names:
        single = tiny_model("era", "MODEL.DISTILLER.METHODS", f"('{name}',)", *opts)
        alone |= losses_of(single, batch())[0]
        model.methods[name.lower()].load_state_dict(single.methods[name.lower()].state_dict())
    both, _ = losses_of(model, batch())
    assert both.keys() == alone.keys() and {"loss_era_feature", *BOXES} < both.keys()
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.OKDHP.NUM_HEADS", "1"], "NUM_HEADS is 1: an ensemble needs at least 2 heads"),
        (["MODEL.OKDHP.KD_WEIGHT", "-1.0"], r"KD_WEIGHT is -1\.0"),
        (["MODEL.OKDHP.TEMPERATURE", "0.0"], r"TEMPERATURE is 0\.0"),
        (["MODEL.OKDHP.RAMP", "1.5"], r"RAMP is 1\.5"),
        (["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"], "USE_SIGMOID_CE is True in the student"),
    ],
)
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=words):
        tiny_model("era", *OPTS, *opts)
