"""Pictures without labels in a step: what is taken on them, what is not, and how the two parts are weighted."""

import copy

import pytest
import torch
from builders import batch, losses_of, tiny_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from era.methods import Method, Needs
from era.modeling.unlabeled import mean_over_images, pseudo_labels, split_by_labels
from era.registry import METHOD_REGISTRY

TASK = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
HARD = {"loss_era_twi_rpn", "loss_era_twi_roi"}
ALL_TERMS = [
    "MODEL.ERA.KD_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_RPN_WEIGHT", "1.0",
    "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_POSITIONS", "sampled",
    "MODEL.DISTILLER.PSEUDO_SCORE", "0.0",  # a random teacher is sure of nothing
]  # fmt: skip
SURE = ["MODEL.DISTILLER.PSEUDO_SCORE", "1.0"]  # it detects nothing then
MASKS = [
    "MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8",
]  # fmt: skip


def without_labels(inputs):
    """The same pictures as the loader gives those of DATASETS.UNLABELED."""
    rest = ("image", "height", "width")
    return [{"unlabeled": True, **{key: item[key] for key in rest}} for item in inputs]


LABELED = batch((2, 1))
OTHERS = without_labels(batch((1, 1, 1), seed=5))


@pytest.fixture
def register():
    """Registers a method for one test; what its ``losses`` is given is kept in the list that is returned."""
    names = []

    def add(name, losses, *, labels):
        steps = []

        def build(self, cfg, student, teacher):
            Method.__init__(self)

        def keep(self, step):
            steps.append(step)
            return losses(step)

        members = {"__init__": build, "losses": keep}
        members["needs"] = classmethod(lambda cls, cfg: Needs(labels=labels))
        METHOD_REGISTRY.register(type(name, (Method,), members))
        names.append(name)
        return steps

    yield add
    for name in names:
        METHOD_REGISTRY._obj_map.pop(name)


def values(storage):
    return {key: value for key, (value, _) in storage.latest().items()}


# ---- weights -------------------------------------------------------------------------------------


def test_a_loss_of_both_parts_is_the_mean_over_all_images():
    labeled = {"both": torch.tensor(2.0), "hard": torch.tensor(5.0)}
    unlabeled = {"both": torch.tensor(8.0), "own": torch.tensor(3.0)}
    found = mean_over_images(labeled, unlabeled, (3, 1))
    assert found == {"both": 3.5, "hard": 5.0, "own": 3.0}  # (3 * 2 + 1 * 8) / 4
    assert mean_over_images(labeled, {}, (3, 1)) == labeled


def test_a_step_by_hand(register):
    """Two labelled pictures and three others: (2 * 3 + 3 * 8) / 5 = 6, and what needs labels in full."""

    def losses(step):
        free = {"loss_free_both": torch.tensor(3.0 if step.labeled else 8.0)}
        return free | ({"loss_free_hard": torch.tensor(7.0)} if step.labeled else {})

    free = register("FREE", losses, labels=False)
    bound = register("BOUND", lambda step: {"loss_bound_all": torch.tensor(4.0)}, labels=True)
    model = tiny_model("era", "MODEL.DISTILLER.METHODS", "('FREE', 'BOUND')")
    mixed = [OTHERS[0], LABELED[0], *OTHERS[1:], LABELED[1]]  # in any order
    found, _ = losses_of(model, mixed)
    own = {key: value.item() for key, value in found.items() if key not in TASK}
    assert own == {"loss_free_both": 6.0, "loss_free_hard": 7.0, "loss_bound_all": 4.0}
    assert [step.labeled for step in free] == [True, False] and [s.labeled for s in bound] == [True]
    assert [len(step.batched_inputs) for step in free] == [2, 3]
    assert not any("instances" in item for item in free[1].batched_inputs)
    with pytest.raises(ValueError, match="without labels has no task losses"):
        _ = free[1].task_losses


def test_parts_of_equal_pictures_weigh_as_one_batch():
    """Without statistics of a batch, the feature and residual losses of 2 + 3 pictures are those of all 5."""
    model = tiny_model("era", *SURE, "MODEL.RESNETS.NORM", "FrozenBN")
    every = [*LABELED, *batch((1, 1, 1), seed=5)]
    expected, _ = losses_of(model, every)
    found, _ = losses_of(model, [*LABELED, *OTHERS])
    for name in ("loss_era_feature", "loss_era_residual"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


# ---- what needs ground truth, and what does not ----------------------------------------------------


@pytest.mark.parametrize("score", ["0.0", "1.0"], ids=["everything", "nothing detected"])
def test_what_needs_labels_is_as_without_the_others(score):
    """Task losses and TWI to the last bit, in value and in gradient; the rest changes."""
    opts = [*ALL_TERMS, "MODEL.DISTILLER.PSEUDO_SCORE", score]
    model = tiny_model("era", *opts)
    alone, statistics = losses_of(model, LABELED)
    model = tiny_model("era", *opts)
    mixed, storage = losses_of(model, [*LABELED, *OTHERS])
    assert mixed.keys() == alone.keys() > TASK | HARD
    for name in alone:
        assert (mixed[name] == alone[name]) == (name in TASK | HARD), name
    parameters = [p for p in model.student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(mixed[name] for name in TASK), parameters)
    plain = tiny_model("plain")
    plain.load_state_dict(tiny_model("era", *opts).student.state_dict())
    stock, _ = losses_of(plain, LABELED)
    sum(stock.values()).backward()
    expected = [p.grad for p in plain.parameters() if p.requires_grad]
    assert len(gradients) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    # statistics of the other part stand apart: Detectron2's own, and a method's
    own, seen = values(statistics), values(storage)
    assert {"rpn/num_pos_anchors", "roi_head/num_fg_samples", "era/p3/residual_e0"} < own.keys()
    assert {key: seen[key] for key in own} == own
    apart = seen.keys() - own.keys()
    assert all(key.startswith("unlabeled/") for key in apart)
    assert {"unlabeled/rpn/num_pos_anchors", "unlabeled/era/p3/residual_e0"} < apart
    assert (seen["unlabeled/pseudo_boxes"] > 0) == (score == "0.0")


def unlabeled_step(model, register_steps, inputs):
    losses_of(model, inputs)
    return register_steps[-1]


@pytest.mark.parametrize("positions", ["sampled", "all"])
def test_only_label_free_terms_and_none_looks_at_the_pseudo_labels(register, positions):
    """Fast and as defined; other classes and boxes in the place of the pseudo-labels change nothing."""
    steps = register("LOOK", lambda step: {}, labels=False)
    opts = ["MODEL.DISTILLER.METHODS", "('ERA', 'LOOK')", *ALL_TERMS,
            "MODEL.ERA.TWI.SOFT_POSITIONS", positions, "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "0"]  # fmt: skip
    found = {}
    for fast in ("True", "False"):
        model = tiny_model("era", *opts, "MODEL.ERA.FAST", fast)
        step = unlabeled_step(model, steps, [*LABELED, *OTHERS])
        assert sum(len(own) for own in step.student.targets) > 0
        with EventStorage(0):
            found[fast] = model.methods["era"].losses(step)
            for own in step.student.proposals:
                own.gt_classes = (own.gt_classes + 1) % 8
                own.gt_boxes = Boxes(own.gt_boxes.tensor * 0.5)
            step.student.anchor_boxes = [x * 0.5 for x in step.student.anchor_boxes]
            step.student.anchor_labels = [
                torch.where(x == 1, torch.zeros_like(x), x) for x in step.student.anchor_labels
            ]
            again = model.methods["era"].losses(step)
        assert all(torch.equal(again[name], loss) for name, loss in found[fast].items())
    free = {f"loss_era_{name}" for name in ("feature", "residual", "soft_rpn", "soft_roi", "kd")}
    assert found["True"].keys() == found["False"].keys() == free
    for name in free:
        torch.testing.assert_close(found["True"][name], found["False"][name], rtol=1e-4, atol=1e-6)


def test_the_other_pictures_train_the_student_and_never_the_teacher():
    model = tiny_model("era", *ALL_TERMS)
    before = copy.deepcopy(model.teacher.state_dict())
    alone, _ = losses_of(model, LABELED)
    mixed, _ = losses_of(model, [*LABELED, *OTHERS])
    gradients = []
    for losses in (alone, mixed):
        model.zero_grad()
        losses["loss_era_feature"].backward()
        gradients.append(model.student.backbone.fpn_output4.weight.grad.clone())
    assert not torch.equal(*gradients) and all(g.abs().sum() > 0 for g in gradients)
    assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())
    assert all(p.grad is None for p in model.teacher.parameters())


def test_pkd_needs_no_labels():
    opts = ["MODEL.DISTILLER.METHODS", "('PKD',)", "MODEL.PKD.LEVELS", "['p3']"]
    alone, _ = losses_of(tiny_model("era", *opts), LABELED)
    other = [{**item, "instances": own["instances"]}
             for item, own in zip(OTHERS, batch((1, 1, 1), seed=5), strict=True)]  # fmt: skip
    for item in other:
        item.pop("unlabeled")
    theirs, _ = losses_of(tiny_model("era", *opts), other)
    mixed, _ = losses_of(tiny_model("era", *opts), [*LABELED, *OTHERS])
    expected = (2 * alone["loss_pkd_feature"] + 3 * theirs["loss_pkd_feature"]) / 5
    torch.testing.assert_close(mixed["loss_pkd_feature"], expected, rtol=1e-5, atol=1e-6)


# ---- what the teacher detects ----------------------------------------------------------------------


def test_pseudo_labels_by_hand():
    found = Instances((20, 30))
    found.pred_boxes = Boxes(
        torch.tensor([[0.0, 0, 5, 5], [1, 1, 9, 9], [2, 2, 2, 8], [3, 3, 6, 6]])
    )
    found.scores = torch.tensor([0.5, 0.49, 0.9, 0.7])  # the third has no area
    found.pred_classes = torch.tensor([1, 2, 3, 4])
    truth = pseudo_labels(found, 0.5)
    assert truth.image_size == (20, 30) and truth.gt_classes.tolist() == [1, 4]
    assert truth.gt_boxes.tensor.tolist() == [[0, 0, 5, 5], [3, 3, 6, 6]]
    none = pseudo_labels(found, 1.0)
    assert len(none) == 0 and none.gt_boxes.tensor.shape == (0, 4)


def test_parts_keep_their_order():
    items = [{"i": 0}, {"i": 1, "unlabeled": True}, {"i": 2, "unlabeled": False}]
    labeled, unlabeled = split_by_labels(items)
    assert [x["i"] for x in labeled] == [0, 2] and [x["i"] for x in unlabeled] == [1]


@pytest.mark.parametrize("teacher_opts", [[], MASKS], ids=["boxes", "masks"])
def test_the_teacher_detects_what_it_detects_by_itself_and_computes_its_maps_once(
    register, teacher_opts, monkeypatch
):
    steps = register("LOOK", lambda step: {}, labels=False)
    opts = ["MODEL.DISTILLER.METHODS", "('ERA', 'LOOK')", *ALL_TERMS]
    model = tiny_model("era", *opts, teacher_opts=teacher_opts)
    calls, maps_of = [], model.teacher._maps
    monkeypatch.setattr(model.teacher, "_maps", lambda images: calls.append(1) or maps_of(images))
    step = unlabeled_step(model, steps, [*LABELED, *OTHERS])
    assert calls == [1, 1]  # once a part
    with torch.no_grad():
        expected = model.teacher.detector.detect(OTHERS, do_postprocess=False)
    for own, theirs in zip(step.student.targets, expected, strict=True):
        assert len(own) > 0
        torch.testing.assert_close(own.gt_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(own.gt_classes, theirs.pred_classes)
    maps = model.teacher.features(OTHERS, step.student.features, (64, 64))
    for level, value in step.teacher_features.items():
        torch.testing.assert_close(value, maps[level])


def test_sizes_that_differ():
    """Between the parts and within each."""
    inputs = batch((1,), size=(50, 75)) + batch((2,), size=(64, 33), seed=1)
    others = without_labels(batch((1,), size=(90, 40)) + batch((1,), size=(33, 70), seed=1))
    model = tiny_model("era", *ALL_TERMS, teacher_opts=["MODEL.FPN.OUT_CHANNELS", "24"])
    losses, _ = losses_of(model, inputs + others)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()


def test_mixed_precision():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = losses_of(tiny_model("era", *ALL_TERMS), [*LABELED, *OTHERS])
    assert torch.isfinite(sum(losses.values()))


def test_without_an_object_in_either_part():
    model = tiny_model("era", *ALL_TERMS, *SURE)
    losses, _ = losses_of(model, [*batch((0, 0)), *OTHERS])
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()


# ---- masks -----------------------------------------------------------------------------------------


def test_a_student_with_masks_learns_them_from_labelled_pictures_alone():
    def masked():
        inputs = batch((2, 1))
        for item in inputs:
            item["instances"].gt_masks = BitMasks(torch.ones(len(item["instances"]), 64, 64))
        return inputs

    alone, _ = losses_of(tiny_model("era", *MASKS, *ALL_TERMS), masked())
    model = tiny_model("era", *MASKS, *ALL_TERMS)
    mixed, _ = losses_of(model, [*masked(), *OTHERS])
    assert mixed["loss_mask"] == alone["loss_mask"] and mixed.keys() == alone.keys()
    assert model.student.roi_heads.mask_on and not model.student.roi_heads.keypoint_on
    sum(mixed.values()).backward()
    with pytest.raises(RuntimeError, match="on purpose"), model.detector.boxes_alone():
        assert not model.student.roi_heads.mask_on
        raise RuntimeError("on purpose")
    assert model.student.roi_heads.mask_on
