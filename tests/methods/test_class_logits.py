"""What the methods on the proposals' class logits have in common: which rows are compared, weights, gradients, labels,
batches of every kind, and what they refuse."""

import pytest
import torch
from builders import TOY, batch, losses_of, tiny_cfg, tiny_model
from detectron2.utils.events import EventStorage

from era.errors import UserError
from era.losses import kd_loss
from era.methods.dist import dist_terms
from era.methods.dkd import dkd_terms
from era.methods.gdkd import gdkd_terms
from era.modeling.step import Step
from era.registry import METHOD_REGISTRY


def gdkd3(own, other, classes, tau):
    groups, _, _, rest = gdkd_terms(own, other, (1, 1), tau)
    return groups, rest


# By method: its losses, by the name of the term, with the default weight of each; and how the terms are computed.
METHODS = {
    "KD": {"classes": 1.0},
    "DKD": {"target": 1.0, "others": 0.25},
    "GDKD": {"groups": 1.0, "top": 0.125, "rest": 0.25},
    "GDKD3": {"groups": 1.0, "rest": 0.25},
    "DIST": {"inter": 1.0, "intra": 1.0},
}
TERMS = {
    "KD": lambda own, other, classes, tau: (kd_loss(own, other, tau),),
    "DKD": dkd_terms,
    "GDKD": lambda own, other, classes, tau: gdkd_terms(own, other, (5,), tau),
    "GDKD3": gdkd3,
    "DIST": lambda own, other, classes, tau: dist_terms(own, other, tau),
}
SIGMOID = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"]
each_method = pytest.mark.parametrize("name", METHODS)


def on(name, *opts):
    return ["MODEL.DISTILLER.METHODS", f"('{name}',)", *opts]


def own_losses(name, losses):
    return {key: loss for key, loss in losses.items() if key.startswith(f"loss_{name.lower()}_")}


@each_method
@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_all_sampled_proposals_through_both_heads(name, objects):
    """The student's proposals on each model's own maps, with the default weights times w."""
    weight = ["MODEL." + name + ".WEIGHT", "3.0", "MODEL." + name + ".TEMPERATURE", "2.0"]
    model = tiny_model("era", *on(name, *weight))
    with model.detector.record() as seen:
        losses_of(model.student, batch(objects))
    maps = model.teacher.features(
        batch(objects), seen.features, tuple(seen.images.tensor.shape[-2:])
    )
    other = model.teacher.predict(maps, seen.samples).class_logits
    terms = TERMS[name](seen.predictions.class_logits, other, seen.classes, 2.0)
    found, _ = losses_of(model, batch(objects))
    expected = {
        f"loss_{name.lower()}_{term}": 3.0 * w * value
        for (term, w), value in zip(METHODS[name].items(), terms, strict=True)
    }
    torch.testing.assert_close(own_losses(name, found), expected)
    assert set(expected) == set(METHOD_REGISTRY.get(name).loss_labels)


@each_method
def test_weight_0_is_plain_training(name):
    plain, _ = losses_of(tiny_model("plain"), batch())
    found, _ = losses_of(tiny_model("era", *on(name, f"MODEL.{name}.WEIGHT", "0.0")), batch())
    assert found == plain


@pytest.mark.parametrize(
    "name, key, term",
    [("DKD", "ALPHA", "target"), ("DKD", "BETA", "others"), ("GDKD", "W0", "groups"), ("GDKD", "W1", "top"),
     ("GDKD", "W2", "rest"), ("GDKD3", "W0", "groups"), ("GDKD3", "W1", "rest"), ("DIST", "BETA", "inter"),
     ("DIST", "GAMMA", "intra")],
)  # fmt: skip
def test_a_term_of_weight_0_is_left_out(name, key, term):
    found, _ = losses_of(tiny_model("era", *on(name, f"MODEL.{name}.{key}", "0.0")), batch())
    expected = {f"loss_{name.lower()}_{other}" for other in METHODS[name]} - {
        f"loss_{name.lower()}_{term}"
    }
    assert set(own_losses(name, found)) == expected


@each_method
def test_gradients_reach_backbone_and_class_scores_and_no_teacher(name):
    model = tiny_model("era", *on(name))
    losses, _ = losses_of(model, batch())
    sum(own_losses(name, losses).values()).backward()
    predictor = model.student.roi_heads.box_predictor
    assert (
        predictor.cls_score.weight.grad.abs().sum() > 0 and predictor.bbox_pred.weight.grad is None
    )
    assert any(p.grad is not None for p in model.student.backbone.parameters())
    assert all(p.grad is None for p in model.student.proposal_generator.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not list(model.methods[name.lower()].parameters())


def test_with_era_and_each_other_the_losses_add_up():
    alone = {}
    for name in ("ERA", *METHODS):
        alone |= losses_of(tiny_model("era", *on(name)), batch())[0]
    both, _ = losses_of(
        tiny_model("era", "MODEL.DISTILLER.METHODS", str(("ERA", *METHODS))), batch()
    )
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("name", ["KD", "DKD", "GDKD", "GDKD3"])
def test_two_halves_of_a_batch_are_the_whole(name):
    """As two processes share a batch: means over rows, of rows that know nothing of each other."""
    own, other, classes = *torch.randn(2, 10, 9), torch.randint(0, 9, (10,))
    whole = TERMS[name](own, other, classes, 2.0)
    halves = [TERMS[name](own[i], other[i], classes[i], 2.0) for i in (range(5), range(5, 10))]
    for term, *parts in zip(whole, *halves, strict=True):
        torch.testing.assert_close(term, sum(parts) / 2)


@each_method
@pytest.mark.parametrize("columns", [9, 2], ids=["classes", "one class"])
def test_no_proposal_is_a_connected_zero(name, columns):
    x = torch.zeros(0, requires_grad=True)
    logits = x.reshape(0, columns)
    nothing = torch.zeros(0, columns)
    found = (
        gdkd_terms(logits, nothing, (1,), 1.0)
        if name == "GDKD"
        else TERMS[name](logits, nothing, torch.zeros(0, dtype=torch.long), 1.0)
    )
    assert all(term == 0 for term in found)
    sum(found).backward()  # a disconnected zero would fail here


@each_method
def test_the_teacher_is_a_constant_and_shapes_must_agree(name):
    own, other = torch.randn(2, 6, 9, requires_grad=True).unbind()
    other = other.detach().requires_grad_()
    classes = torch.randint(0, 9, (6,))
    sum(TERMS[name](own, other, classes, 1.0)).backward()
    assert other.grad is None
    with pytest.raises(ValueError, match=r"shapes differ: estimate \(6, 9\), target \(6, 8\)"):
        TERMS[name](own, other[:, :8], classes, 1.0)


@each_method
def test_in_mixed_precision_the_losses_are_float32(name):
    model = tiny_model("era", *on(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = losses_of(model, batch())
    found = own_losses(name, found)
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in found.values())
    sum(found.values()).backward()
    gradient = model.student.roi_heads.box_predictor.cls_score.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


@each_method
def test_who_needs_labels(name):
    """DKD alone. The others are taken on a step that must not look at the ground truth."""
    method = METHOD_REGISTRY.get(name)
    assert method.needs(tiny_cfg("era")).labels == (name == "DKD")
    assert method.needs(tiny_cfg("era", f"MODEL.{name}.WEIGHT", "0.0")).labels
    if name == "DKD":
        return
    model = tiny_model("era", *on(name))
    with EventStorage(0), model.detector.record() as seen:
        model.student(batch())
    step = Step(batch(), seen, model.detector, model.teacher, labeled=False)
    for own in seen.proposals:
        own.remove("gt_classes")
    assert len(model.methods[name.lower()].losses(step)) == len(METHODS[name])


@each_method
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_sigmoid_heads_are_refused(name, who):
    teacher = SIGMOID if who == "teacher" else []
    words = rf"USE_SIGMOID_CE is True in the {who}: {name} needs a softmax"
    with pytest.raises(UserError, match=words):
        tiny_model("era", *on(name, *(SIGMOID if who == "student" else [])), teacher_opts=teacher)


def test_eras_own_term_refuses_them_too():
    tiny_model("era", *SIGMOID)
    with pytest.raises(UserError, match=r"MODEL\.ERA\.KD_WEIGHT above 0 needs a softmax"):
        tiny_model("era", *SIGMOID, "MODEL.ERA.KD_WEIGHT", "1.0")


@each_method
def test_a_teacher_whose_classes_are_no_distribution_is_refused(name):
    dense = ["MODEL.TEACHER.CONFIG_FILE", str(TOY / "retinanet_teacher.yaml")]
    with pytest.raises(
        UserError, match=rf"RetinaNet.*independent sigmoids.*{name} needs a softmax"
    ):
        tiny_model("era", *on(name), *dense)


def test_a_student_without_the_teachers_levels_is_refused():
    student = ["MODEL.ROI_HEADS.IN_FEATURES", "['p3', 'p4']"]
    student += ["MODEL.RPN.IN_FEATURES", "['p3', 'p4']"]
    student += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32]]"]
    tiny_model("era", *on("KD", *student))  # its maps are there, whether its heads read them or not
    words = r"KD needs the teacher's heads .* they read \['p6'\]"
    fewer = ["MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4']", "MODEL.FPN.IN_FEATURES", "['res3', 'res4']"]  # fmt: skip
    with pytest.raises(UserError, match=words):
        tiny_model("era", *on("KD", *student, *fewer))


@each_method
@pytest.mark.parametrize(
    "key, value, words",
    [
        ("WEIGHT", "-1.0", "finite number of at least 0"),
        ("TEMPERATURE", "0.0", "finite number above 0"),
        ("TEMPERATURE", "1e999", "finite number above 0"),
    ],
)
def test_bad_numbers(name, key, value, words):
    with pytest.raises(UserError, match=rf"MODEL\.{name}\.{key} is .*{words}"):
        tiny_model("era", *on(name, f"MODEL.{name}.{key}", value))


@pytest.mark.parametrize("key", ["DKD.ALPHA", "DKD.BETA", "GDKD.W2", "GDKD3.W1", "DIST.GAMMA"])
def test_bad_coefficients(key):
    with pytest.raises(UserError, match=rf"MODEL\.{key} is -1\.0: expected a finite number"):
        tiny_model("era", *on(key.split(".")[0], f"MODEL.{key}", "-1.0"))
