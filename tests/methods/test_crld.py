"""CRLD: both terms against numpy in float64 and by hand, its gate and its two means, its gradients, and beside ERA."""

import math

import numpy as np
import pytest
import torch
from builders import batch, losses_of, tiny_model

from era.errors import UserError
from era.losses import kd_loss
from era.methods.crld import crld_terms
from era.modeling.step import Step

CRLD = ["MODEL.DISTILLER.METHODS", "('CRLD',)"]
OPEN = {"temperature": 1.0, "confidence": (0.0, 0.0), "background_weight": 1.0}


def logits(*rows):
    """Whose softmax is each row."""
    return torch.tensor(rows).log()


def reference(student, teacher, temperature, confidence, background_weight):
    """Row by row, in float64."""

    def softmax(z):
        e = np.exp(z - z.max())
        return e / e.sum()

    def kd(other, own):
        p, q = softmax(other / temperature), softmax(own / temperature)
        return temperature**2 * sum(p * (np.log(p) - np.log(q)))

    values = {True: ([], []), False: ([], [])}
    for own_w, own_s, other_w, other_s in zip(*student, *teacher, strict=True):
        is_object = bool(other_w.argmax() < len(other_w) - 1)
        within, across = values[is_object]
        sure = [max(softmax(z)[:-1]) if is_object else softmax(z)[-1] for z in (other_w, other_s)]
        m_w, m_s = (p >= limit for p, limit in zip(sure, confidence, strict=True))
        within.append(m_w * (kd(other_w, own_w) + kd(other_s, own_s)))
        across.append(m_s * (kd(other_s, own_w) + kd(other_w, own_s)))
    b = background_weight
    return [(np.mean(values[True][i]) + b * np.mean(values[False][i])) / (1 + b) for i in (0, 1)]


@pytest.mark.parametrize("confidence", [(0.0, 0.0), (0.6, 0.3), (0.9, 0.2)])
def test_against_numpy_on_random_logits(confidence):
    draw = np.random.default_rng(0)
    student, teacher = (tuple(draw.normal(0, 2, (2, 40, 5))) for _ in range(2))
    settings = {"temperature": 2.5, "confidence": confidence, "background_weight": 0.3}
    found = crld_terms(*(tuple(map(torch.from_numpy, x)) for x in (student, teacher)), **settings)
    expected = reference(student, teacher, **settings)
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-9)
    assert min(expected) > 0


def test_by_hand():
    """An object row and a background row, the student undecided: KL(p || uniform) = ln 2 - H(p), and 0 for p uniform."""
    weak, strong = logits([0.75, 0.25], [0.5, 0.5000001]), logits([0.5, 0.5], [0.1, 0.9])
    student = (torch.zeros(2, 2), torch.zeros(2, 2))
    objects = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    others = math.log(2) + 0.1 * math.log(0.1) + 0.9 * math.log(0.9)
    within, across = crld_terms(student, (weak, strong), **OPEN)
    assert within.item() == pytest.approx((objects + others) / 2, rel=1e-5)
    assert across.item() == pytest.approx((objects + others) / 2, rel=1e-5)
    # tau_w 0.6 leaves the object row in, 0.8 neither; tau_s 0.8 leaves background in.
    gated = {**OPEN, "confidence": (0.6, 0.8)}
    found = [x.item() for x in crld_terms(student, (weak, strong), **gated)]
    assert found == pytest.approx([objects / 2, others / 2], rel=1e-5)
    gated = {**OPEN, "confidence": (0.8, 0.95)}
    assert [x.item() for x in crld_terms(student, (weak, strong), **gated)] == [0, 0]


def test_each_mask_gates_both_parts_of_its_term():
    """The weak view's confidence the within-view parts of BOTH views, the strong one's both cross-view parts."""
    sure, unsure, student = logits([0.9, 0.1]), logits([0.6, 0.4]), torch.zeros(1, 2)
    gate = {**OPEN, "confidence": (0.8, 0.8), "background_weight": 0.0}
    both = kd_loss(student, sure, 1.0) + kd_loss(student, unsure, 1.0)
    within, across = crld_terms((student, student), (sure, unsure), **gate)
    torch.testing.assert_close(within, both)
    assert across == 0
    within, across = crld_terms((student, student), (unsure, sure), **gate)
    torch.testing.assert_close(across, both)
    assert within == 0


def test_an_object_that_the_strong_view_covers_teaches_nothing_across():
    """There the teacher is sure of background, not of an object."""
    weak, covered, student = logits([0.9, 0.1]), logits([0.01, 0.99]), torch.zeros(1, 2)
    gate = {**OPEN, "confidence": (0.9, 0.2)}
    within, across = crld_terms((student, student), (weak, covered), **gate)
    assert within > 0 and across == 0


def test_of_equal_views_and_open_gates_it_is_kd_of_objects_and_of_background():
    student, teacher = torch.randn(30, 4), torch.randn(30, 4)
    is_object = teacher.argmax(1) < 3
    parts = [kd_loss(student[rows], teacher[rows], 2.0) for rows in (is_object, ~is_object)]
    settings = {**OPEN, "temperature": 2.0}
    for b, expected in ((1.0, sum(parts)), (0.0, 2 * parts[0])):
        for found in crld_terms(
            (student, student), (teacher, teacher), **{**settings, "background_weight": b}
        ):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_compare_is_a_connected_zero(rows):
    student = torch.randn(rows, 4, requires_grad=True)
    closed = {**OPEN, "confidence": (1.0, 1.0)}
    for found in crld_terms((student, student), (torch.zeros(rows, 4),) * 2, **closed):
        assert found == 0
        found.backward(retain_graph=True)
    assert student.grad.abs().sum() == 0


def test_no_gradient_into_the_teacher_and_float32_from_half():
    student, teacher = (torch.randn(2, 6, 4, requires_grad=True) for _ in range(2))
    sum(crld_terms(tuple(student), tuple(teacher), **OPEN)).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    halves = [tuple((x.detach() * 1e4).half()) for x in (student, teacher)]
    for found in crld_terms(*halves, **OPEN):  # squares of these are beyond half precision
        assert found.dtype == torch.float32 and found.isfinite()


@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_the_method_compares_four_passes_on_the_weak_views_proposals(objects):
    opts = ["MODEL.CRLD.VIEW", "photometric", "MODEL.CRLD.CONFIDENCE_WEAK", "0.1"]
    model = tiny_model("era", *CRLD, *opts)
    with model.detector.record() as recording:
        _, storage = losses_of(model.student, batch(objects))
    with storage:
        step = Step(batch(objects), recording, model.detector, model.teacher)
        found = model.methods["crld"].losses(step)
        view = step.view("photometric")
        within, across = crld_terms(
            (recording.predictions.class_logits, view.predictions.class_logits),
            (step.teacher_predictions.class_logits, view.teacher_predictions.class_logits),
            temperature=1.0,
            confidence=(0.1, 0.2),
            background_weight=1.0,
        )
        strong = model.detector.prediction_loss(view.predictions, recording)
    expected = {"within": 2 * within, "cross": 0.5 * across, "strong": strong}
    assert found.keys() == {f"loss_crld_{name}" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"loss_crld_{name}"], value)
    assert len(view.predictions.class_logits) == len(recording.predictions.class_logits)
    sum(found.values()).backward()
    assert any(p.grad is not None for p in model.student.backbone.parameters())
    assert all(p.grad is not None for p in model.student.roi_heads.parameters())
    assert all(p.grad is None for p in model.student.proposal_generator.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())


def test_weight_0_is_plain_training():
    plain, _ = losses_of(tiny_model("plain"), batch())
    zero = [
        x for term in ("WITHIN", "CROSS", "STRONG") for x in (f"MODEL.CRLD.{term}_WEIGHT", "0.0")
    ]
    model = tiny_model("era", *CRLD, *zero)
    assert losses_of(model, batch())[0] == plain
    assert list(model.methods["crld"].parameters()) == []


@pytest.mark.parametrize("term", ["WITHIN", "CROSS", "STRONG"])
def test_a_term_of_weight_0_is_left_out_and_plain_losses_stay(term):
    plain, _ = losses_of(tiny_model("plain"), batch())
    found, _ = losses_of(tiny_model("era", *CRLD, f"MODEL.CRLD.{term}_WEIGHT", "0.0"), batch())
    assert {k: v for k, v in found.items() if "crld" not in k} == plain
    assert len(found) == len(plain) + 2 and f"loss_crld_{term.lower()}" not in found


def test_on_pictures_without_labels_the_strong_views_own_losses_are_left_out():
    model = tiny_model("era", *CRLD)
    with model.detector.record() as recording:
        _, storage = losses_of(model.student, batch())
    with storage:
        step = Step(batch(), recording, model.detector, model.teacher, labeled=False)
        found = model.methods["crld"].losses(step)
    assert found.keys() == {"loss_crld_within", "loss_crld_cross"}


def test_with_era_the_losses_add_up():
    alone = {}
    for methods in ("('ERA',)", "('CRLD',)"):
        alone |= losses_of(tiny_model("era", "MODEL.DISTILLER.METHODS", methods), batch())[0]
    both, _ = losses_of(tiny_model("era", "MODEL.DISTILLER.METHODS", "('ERA', 'CRLD')"), batch())
    assert both.keys() == alone.keys() and {"loss_era_feature", "loss_crld_within"} < both.keys()
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.CRLD.VIEW", "flip"], r"CRLD\.VIEW is 'flip': expected one of photometric, cutout"),
        (["MODEL.CRLD.CROSS_WEIGHT", "-1.0"], r"MODEL\.CRLD\.CROSS_WEIGHT is -1\.0"),
        (["MODEL.CRLD.BACKGROUND_WEIGHT", "-1.0"], r"MODEL\.CRLD\.BACKGROUND_WEIGHT is -1\.0"),
        (["MODEL.CRLD.TEMPERATURE", "0.0"], r"MODEL\.CRLD\.TEMPERATURE is 0\.0"),
        (["MODEL.CRLD.CONFIDENCE_WEAK", "90.0"], r"CONFIDENCE_WEAK is 90\.0: expected a prob"),
        (["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"], r"USE_SIGMOID_CE.*CRLD needs a softmax"),
    ],
)
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=words):
        tiny_model("era", *CRLD, *opts)
