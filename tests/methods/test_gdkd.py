"""GDKD and GDKD3: the terms by hand, against numpy in float64, as parts of KD, confident logits, and the keys."""

import math

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_cfg, tiny_model

from era.errors import UserError
from era.losses import group_divergences, kd_loss
from era.methods.gdkd import GDKD, GDKD3, gdkd_terms

GDKD_ON = ["MODEL.DISTILLER.METHODS", "('GDKD',)"]
GDKD3_ON = ["MODEL.DISTILLER.METHODS", "('GDKD3',)"]


def log(*rows):
    """Logits of these probabilities, by row."""
    return torch.tensor(rows, dtype=torch.float64).log()


def kl(*pairs):
    """Sum of p log(p / q)."""
    return sum(p * math.log(p / q) for p, q in pairs)


TEACHER, STUDENT = (1 / 8, 1 / 2, 1 / 8, 1 / 4), (1 / 4, 1 / 4, 1 / 8, 3 / 8)


def test_gdkd_by_hand():
    """k = 2: the teacher's likeliest are the second and the last class, whatever the student's are."""
    groups, top, rest = gdkd_terms(log(STUDENT) - 3, log(TEACHER), (2,), 1.0)
    assert groups.item() == pytest.approx(kl((3 / 4, 5 / 8), (1 / 4, 3 / 8)))
    assert top.item() == pytest.approx(kl((2 / 3, 2 / 5), (1 / 3, 3 / 5)))
    assert rest.item() == pytest.approx(kl((1 / 2, 2 / 3), (1 / 2, 1 / 3)))


def test_gdkd3_by_hand():
    groups, first, second, rest = gdkd_terms(log(STUDENT), log(TEACHER), (1, 1), 1.0)
    assert groups.item() == pytest.approx(kl((1 / 2, 1 / 4), (1 / 4, 3 / 8), (1 / 4, 3 / 8)))
    assert first == 0 and second == 0
    assert rest.item() == pytest.approx(kl((1 / 2, 2 / 3), (1 / 2, 1 / 3)))


@pytest.mark.parametrize("sizes", [(3,), (1, 1), (1, 2)], ids=["top k", "1, 1", "1, 2"])
def test_against_numpy(sizes):
    """Means over rows, of groups that each row has of its own."""
    draw = np.random.default_rng(2)
    student, teacher, tau = draw.normal(0, 2, (5, 7)), draw.normal(0, 3, (5, 7)), 2.0
    terms = []
    for s, t in zip(student / tau, teacher / tau, strict=True):
        p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
        members = np.split(np.argsort(-t), np.cumsum(sizes))
        mass, own = (np.array([x[g].sum() for g in members]) for x in (p, q))
        row = [(mass * np.log(mass / own)).sum()]
        for g, a, b in zip(members, mass, own, strict=True):
            row.append((p[g] / a * np.log((p[g] / a) / (q[g] / b))).sum())
        terms.append(row)
    found = gdkd_terms(torch.from_numpy(student), torch.from_numpy(teacher), sizes, tau)
    np.testing.assert_allclose(torch.stack(found), tau**2 * np.mean(terms, axis=0), atol=1e-10)


def test_the_chain_rule():
    """KL(p_T || p_S) = KL(b_T || b_S) + sum_g b_T^g KL(p_T^g || p_S^g), in each row, of any groups."""
    student, teacher = torch.randn(2, 9, 6, dtype=torch.float64)
    groups = torch.stack([torch.tensor([0, 1, 2, 0, 2, 2])[torch.randperm(6)] for _ in range(9)])
    between, within = group_divergences(student, teacher, groups, 3, 1.5)
    p = (teacher / 1.5).softmax(1)
    mass = torch.stack([(p * (groups == g)).sum(1) for g in range(3)], dim=1)
    expected = [kd_loss(student[i : i + 1], teacher[i : i + 1], 1.5) for i in range(9)]
    torch.testing.assert_close(between + (mass * within).sum(1), torch.stack(expected))


@pytest.mark.parametrize("sizes", [(1, 1), (2,), (1,)])
def test_of_two_classes(sizes):
    """There is KD and nothing else: between the groups, or, with no rest beside two likeliest, within the first."""
    student, teacher = torch.randn(2, 4, 2)
    student.requires_grad_()
    terms = gdkd_terms(student, teacher, sizes, 1.0)
    torch.testing.assert_close(sum(terms), kd_loss(student, teacher, 1.0))
    assert terms[-1] == 0
    sum(terms).backward()
    assert student.grad.abs().sum() > 0 and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_confident_logits(dtype):
    """Each sure of another class: b_T = (1, 0) and b_S = (2 e^-z, 1) for k = 1, of logits that float16 just holds."""
    z = 60000.0
    student = torch.tensor([[z, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, z, 0.0]], dtype=dtype)
    groups, top, rest = gdkd_terms(student, teacher, (1,), 0.5)
    assert groups.item() == pytest.approx(0.25 * 2 * z, rel=1e-6)
    assert top == 0 and rest.item() == pytest.approx(0.25 * (2 * z * 0.5 - math.log(2)), rel=1e-6)
    (groups + rest).backward()
    assert torch.isfinite(student.grad).all() and student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["GDKD", "GDKD3"])
@pytest.mark.parametrize("objects", [(2, 1), (0, 0)], ids=["full", "empty"])
def test_of_the_proposals_on_objects(name, objects):
    opts = ["MODEL.DISTILLER.METHODS", f"('{name}',)", f"MODEL.{name}.PROPOSALS", "fg"]
    model = tiny_model("era", *opts, f"MODEL.{name}.WEIGHT", "2.0")
    with model.detector.record() as seen:
        losses_of(model.student, batch(objects))
    found, _ = losses_of(model, batch(objects))
    size = seen.images.tensor.shape[-2:]
    maps = model.teacher.features(batch(objects), seen.features, size)
    rows = seen.classes < 8
    assert rows.any() == any(objects)
    own, other = (
        x.class_logits[rows] for x in (seen.predictions, model.teacher.predict(maps, seen.samples))
    )
    sizes = (5,) if name == "GDKD" else (1, 1)
    terms = gdkd_terms(own, other, sizes, 1.0)
    weights = {"groups": (0, 2.0), "rest": (-1, 0.5)}
    weights |= {"top": (1, 0.25)} if name == "GDKD" else {}
    for term, (i, weight) in weights.items():
        value = found[f"loss_{name.lower()}_{term}"]
        torch.testing.assert_close(value, weight * terms[i])
        assert value.requires_grad and (value > 0) == any(objects)


def test_labels_are_needed_to_tell_objects():
    for method in (GDKD, GDKD3):
        name = method.__name__
        assert not method.needs(tiny_cfg("era")).labels
        assert method.needs(tiny_cfg("era", f"MODEL.{name}.PROPOSALS", "fg")).labels


def test_of_one_class():
    one = ["MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    model = tiny_model("era", *GDKD_ON, "MODEL.GDKD.TOPK", "1", *one, teacher_opts=one)
    losses, _ = losses_of(model, batch(num_classes=1))
    assert losses["loss_gdkd_groups"] > 0
    assert losses["loss_gdkd_top"] == losses["loss_gdkd_rest"] == 0
    losses, _ = losses_of(
        tiny_model("era", *GDKD3_ON, *one, teacher_opts=one), batch(num_classes=1)
    )
    assert losses["loss_gdkd3_groups"] > 0 and losses["loss_gdkd3_rest"] == 0
    words = r"MODEL\.GDKD\.TOPK is 5, and the models tell 2 classes apart.*from 1 to 1"
    with pytest.raises(UserError, match=words):
        tiny_model("era", *GDKD_ON, *one, teacher_opts=one)


@pytest.mark.parametrize("k", ["9", "0"])
def test_groups_that_would_have_no_class(k):
    tiny_model("era", *GDKD_ON, "MODEL.GDKD.TOPK", "8")
    with pytest.raises(UserError, match=rf"MODEL\.GDKD\.TOPK is {k}.*9 classes.*from 1 to 8"):
        tiny_model("era", *GDKD_ON, "MODEL.GDKD.TOPK", k)


def test_unknown_proposals():
    with pytest.raises(
        UserError, match=r"MODEL\.GDKD3\.PROPOSALS is 'bg': expected 'all', or 'fg'"
    ):
        tiny_model("era", *GDKD3_ON, "MODEL.GDKD3.PROPOSALS", "bg")
