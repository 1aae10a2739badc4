"""Cascade R-CNN: what it does in training, how its stages judge maps, and what starts from it."""

from pathlib import Path

import pytest
import torch
from builders import (
    MASKS,
    NOTHING_SAMPLED,
    TINY,
    TOY,
    batch,
    losses_of,
    masked_batch,
    tiny_cfg,
    tiny_model,
    train_history,
)
from detectron2.config import get_cfg
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from era.config import load_config
from era.engine.preflight import build_model_of
from era.errors import UserError
from era.modeling.detectors import detector_of, family_of
from era.modeling.detectors.cascade import CascadeRCNN, FirstStage
from era.modeling.detectors.rcnn import RCNN

OBJECTS = pytest.mark.parametrize(
    "objects", [(2, 3), (2, 0), (0, 0)], ids=["full", "half", "empty"]
)
ZERO = [
    "MODEL.ERA.FEATURE_WEIGHT", "0.0", "MODEL.ERA.RESIDUAL_WEIGHT", "0.0",
    "MODEL.ERA.TWI.RPN_WEIGHT", "0.0", "MODEL.ERA.TWI.ROI_WEIGHT", "0.0",
]  # fmt: skip
# A cascade as the teacher of any distiller's config, and as the student.
TEACHER = ["MODEL.TEACHER.CONFIG_FILE", str(TOY / "cascade_teacher.yaml")]
STUDENT = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]  # fmt: skip


def lively_cascade(seed: int = 0, *opts):
    """A tiny frozen cascade whose stages tell boxes apart and move them."""
    model = tiny_model("cascade_plain", *opts, seed=seed).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for stage in detector_of(model).box_stages:
        stage.predictor.cls_score.weight.normal_(0, 0.5, generator=draw)
        stage.predictor.bbox_pred.weight.normal_(0, 0.1, generator=draw)
    return model


def setting(objects, student: str = "plain"):
    """A cascade as judge, a student's recorded step, and maps of both."""
    judge, own, inputs = lively_cascade(1), tiny_model(student), batch(objects)
    with detector_of(own).record() as step:
        losses_of(own, inputs)
    with torch.no_grad():
        maps = [
            m.backbone(m.preprocess_image(inputs).tensor)
            for m in (judge, tiny_model("plain", seed=5))
        ]
    return detector_of(judge), step, *maps


def with_gradient(maps):
    return {level: x.clone().requires_grad_() for level, x in maps.items()}


# ---- what it is -----------------------------------------------------------------------------------


def test_the_family_by_config_and_by_model():
    """More special than the R-CNN that it also is."""
    cfg = load_config(str(TOY / "cascade_plain.yaml"), TINY)
    assert family_of(cfg) is CascadeRCNN and CascadeRCNN.num_classes_in(cfg) == 8
    detector = detector_of(build_model(cfg))
    assert type(detector) is CascadeRCNN and len(detector.box_stages) == 3
    assert family_of(load_config(str(TOY / "plain.yaml"), TINY)) is RCNN
    assert not CascadeRCNN.describes(get_cfg())
    first = detector.first_stage()
    assert (
        type(first) is FirstStage
        and first.family is RCNN is detector_of(tiny_model("plain")).family
    )
    plain = detector_of(tiny_model("plain"))
    assert plain.first_stage() is plain


# ---- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("opts", [[], MASKS], ids=["boxes", "masks"])
def test_with_every_weight_at_0_it_trains_as_stock_detectron2(opts):
    """Step by step, bit for bit; the last picture of each batch has no object."""
    inputs = masked_batch if opts else batch
    plain = train_history("cascade_plain", *opts, inputs=inputs)
    assert ("loss_mask" in plain[0]) == bool(opts)
    assert {f"loss_{name}_stage{k}" for name in ("cls", "box_reg") for k in range(3)} < plain[
        0
    ].keys()
    assert train_history("cascade_era", *opts, *ZERO, *TEACHER, inputs=inputs) == plain


@pytest.mark.parametrize(
    "opts",
    [
        [],
        [
            "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
            "0.3",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
            "3.0",
        ],
        [
            "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
            "True",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
            "giou",
        ],
    ],
    ids=["default", "smooth L1, weights", "sigmoid, GIoU"],
)
@OBJECTS
def test_task_losses_with_weights_of_one_are_the_stock_losses(objects, opts):
    student = tiny_model("cascade_plain", *opts)
    detector = detector_of(student)
    with detector.record() as recording:
        stock, _ = losses_of(student, batch(objects))
    task = detector.task_losses(recording)
    assert task.keys() == stock.keys()
    parameters = [p for p in student.parameters() if p.requires_grad]
    for name, loss in task.items():
        ones = loss.weighted(torch.ones_like(loss.values))
        torch.testing.assert_close(ones, stock[name], rtol=1e-5, atol=1e-6)
        own, other = (
            torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True)
            for x in (ones, stock[name])
        )
        for a, b in zip(own, other, strict=True):
            if b is not None:
                torch.testing.assert_close(a if a is not None else b * 0, b, rtol=1e-4, atol=1e-6)
    # nothing is left on the model
    assert not any("losses" in vars(s.predictor) for s in detector.box_stages)


@OBJECTS
def test_its_samples_are_what_the_first_stage_sees(objects):
    student = tiny_model("cascade_plain")
    detector = detector_of(student)
    with detector.record() as recording:
        stock, _ = losses_of(student, batch(objects))
    logits, _ = recording.predictions
    torch.testing.assert_close(F.cross_entropy(logits, recording.classes), stock["loss_cls_stage0"])
    assert recording.roi_features.shape[0] == recording.vectors.shape[0] == len(logits) > 0
    found = detector.predict(recording.features, recording.samples)
    torch.testing.assert_close(found.class_logits, logits)
    # the same gradient into the maps, which Detectron2 divides by the number of stages
    maps = [recording.features[level] for level in ("p3", "p4", "p5")]
    own, other = (
        torch.autograd.grad(x.square().sum(), maps, retain_graph=True)
        for x in (found.class_logits, logits)
    )
    torch.testing.assert_close(own, other)


# ---- stages as judges -----------------------------------------------------------------------------


def stock_losses(judge, features, step):
    """Detectron2's own training losses of the judge's box heads on the student's sampled proposals."""
    heads = judge.model.roi_heads.train()
    try:
        with EventStorage(0):
            return heads._forward_box(features, step.proposals, step.targets)
    finally:
        heads.eval()


@OBJECTS
def test_all_stages_judge_as_detectron2_trains_them(objects):
    """A third of the sum of its losses, and its gradient into the maps."""
    judge, step, maps, _ = setting(objects)
    mine, stock = with_gradient(maps), with_gradient(maps)
    with EventStorage(0):
        found = judge.head_loss("roi", mine, step)
    losses = stock_losses(judge, stock, step)
    assert len(losses) == 6
    torch.testing.assert_close(found, sum(losses.values()) / 3, rtol=1e-5, atol=1e-6)
    found.backward()
    sum(losses.values()).backward()
    for level in ("p3", "p4", "p5"):
        torch.testing.assert_close(mine[level].grad, stock[level].grad, rtol=1e-4, atol=1e-7)
    if objects == (2, 3):
        assert all(value > 0 for value in losses.values()), "every term counts in this test"


def test_the_judge_leaves_out_boxes_without_area_as_detectron2_does():
    judge, step, maps, _ = setting((2, 3))
    for stage in judge.box_stages:  # far to the left and up: out of the picture
        stage.predictor.bbox_pred.weight.mul_(5)
        stage.predictor.bbox_pred.bias.copy_(torch.tensor([-8.0, -8.0, 0.0, 0.0]))
    heads, seen = judge.model.roi_heads, []
    handle = heads.box_pooler.register_forward_hook(
        lambda _m, args, _out: seen.append(sum(map(len, args[1])))
    )
    losses = stock_losses(judge, maps, step)
    handle.remove()
    assert seen[0] > seen[-1] > 0, "some boxes, and not all, are left out"
    with EventStorage(0):
        found = judge.head_loss("roi", maps, step)
    torch.testing.assert_close(found, sum(losses.values()) / 3, rtol=1e-5, atol=1e-6)


@OBJECTS
def test_the_first_stage_judges_alone(objects):
    """Detectron2's first two losses, on the sampled proposals."""
    judge, step, maps, _ = setting(objects)
    losses = stock_losses(judge, maps, step)
    with EventStorage(0):
        found = judge.first_stage().head_loss("roi", maps, step)
        rpn = [d.head_loss("rpn", maps, step) for d in (judge, judge.first_stage())]
    expected = losses["loss_cls_stage0"] + losses["loss_box_reg_stage0"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(*rpn)


def test_a_part_of_the_proposals_stands_for_all():
    """The mean over the parts that a sample can be is the whole, to a few percent."""
    judge, step, maps, _ = setting((2, 3))
    with EventStorage(0):
        whole = judge.head_loss("roi", maps, step)
        draw, found = torch.Generator().manual_seed(0), []
        for _ in range(60):
            step._samples.clear()
            step.proposals = [
                own[
                    torch.cat(
                        [
                            torch.randperm(n, generator=draw),
                            n + torch.randperm(len(own) - n, generator=draw),
                        ]
                    )
                ]
                for own in step.proposals
                for n in [int((own.gt_classes < 8).sum())]
            ]
            found.append(judge.head_loss("roi", maps, step, samples_per_image=6))
    mean, spread = torch.stack(found).mean(), torch.stack(found).std()
    assert spread > 0
    assert (mean - whole).abs() < 4 * spread / 60**0.5


@torch.no_grad()
def reference_soft_values(judge, target, maps, step, temperature):
    """By a loop over stages and proposals, (K, R), with the private steps of Detectron2's own inference."""
    heads = judge.model.roi_heads
    proposals, values = step.proposals, []
    for head, predictor in zip(heads.box_head, heads.box_predictor, strict=True):
        said = []
        for own in (target, maps):
            levels = [own[level] for level in heads.box_in_features]
            boxes = [p.proposal_boxes for p in proposals]
            said.append(predictor(head(heads.box_pooler(levels, boxes))))
        (logits_t, deltas_t), (logits, deltas) = said
        for r in range(len(logits)):
            p_t = (logits_t[r] / temperature).softmax(0)
            divergence = (p_t * (p_t.log() - (logits[r] / temperature).log_softmax(0))).sum()
            foreground = 1 - logits_t[r].softmax(0)[-1]
            distance = (deltas[r] - deltas_t[r]).abs().sum()
            values.append(temperature**2 * divergence + foreground * distance)
        boxes = predictor.predict_boxes((logits_t, deltas_t), proposals)
        proposals = heads._create_proposals_from_boxes(boxes, [p.image_size for p in proposals])
    return torch.stack(values).view(len(heads.box_head), -1)


@pytest.mark.parametrize("objects", [(2, 3), (2, 0)], ids=["full", "half"])
def test_stages_judge_softly_on_the_boxes_that_they_see_on_the_teachers_maps(objects):
    judge, step, target, maps = setting(objects)
    targets = judge.soft_targets("roi", target, step)
    values = reference_soft_values(judge, target, maps, step, 2.0)
    assert values.shape[1] == sum(map(len, step.proposals)) == len(targets.class_logits) / 3
    mine = with_gradient(maps)
    found = judge.soft_head_loss("roi", mine, targets, step, temperature=2.0)
    torch.testing.assert_close(found, values.mean(), rtol=1e-4, atol=1e-6)
    found.backward()
    assert mine["p3"].grad.abs().sum() > 0
    itself = judge.soft_head_loss("roi", target, targets, step, temperature=2.0)
    torch.testing.assert_close(itself, torch.zeros(()), rtol=0, atol=1e-5)
    # on a part of the proposals: means of objects and of others, by how many each stand for
    part = judge.soft_head_loss("roi", maps, targets, step, temperature=2.0, samples_per_image=4)
    sample = step.sample(4)
    assert len(sample.rows) == 8 and len(sample.strata) > 2
    means = [s.share * values[:, sample.rows[s.indices]].mean() for s in sample.strata]
    torch.testing.assert_close(part, sum(means), rtol=1e-4, atol=1e-6)


def test_no_proposal_is_no_judgement():
    judge, step, target, maps = setting((2, 3))
    step.proposals, step._samples = [own[:0] for own in step.proposals], {}
    mine = with_gradient(maps)
    nothing = judge.soft_head_loss("roi", mine, judge.soft_targets("roi", target, step), step)
    with EventStorage(0):
        nothing = nothing + judge.head_loss("roi", mine, step)
    assert nothing == 0
    nothing.backward()
    assert mine["p3"].grad.abs().sum() == 0


# ---- ERA with a cascade ---------------------------------------------------------------------------

PAIRS = {
    "cascade to cascade": ("cascade_era", TEACHER),
    "cascade to Faster R-CNN": ("era", TEACHER),
    "Faster R-CNN to cascade": ("cascade_era", []),
}
SOFT = ["MODEL.ERA.TWI.SOFT_RPN_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", "1.0"]


def taught(config, teacher, *opts):
    model = tiny_model(config, *teacher, *opts)
    with torch.no_grad():
        for p in model.methods.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("stages", ["all", "first"])
@pytest.mark.parametrize("pair", PAIRS)
@OBJECTS
def test_the_fast_path_is_the_definition(pair, stages, objects):
    found = []
    for fast in ("True", "False"):
        model = taught(*PAIRS[pair], *SOFT, "MODEL.ERA.TWI.STAGES", stages, "MODEL.ERA.FAST", fast,
                       "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "5", "MODEL.ERA.HIDDEN_CHANNELS", "4")  # fmt: skip
        losses, _ = losses_of(model, batch(objects))
        sum(losses.values()).backward()
        gradient = model.student.backbone.fpn_lateral3.weight.grad
        found.append(({k: v.item() for k, v in losses.items()}, gradient))
    assert found[0][0].keys() == found[1][0].keys()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3, abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=1e-5)


def test_the_stages_that_judge_are_a_key():
    by_stages = {}
    for stages in ("all", "first"):
        opts = (*PAIRS["cascade to Faster R-CNN"][1], *SOFT, "MODEL.ERA.TWI.STAGES", stages)
        by_stages[stages], _ = losses_of(taught("era", opts), batch())
    for name in ("loss_era_twi_roi", "loss_era_soft_roi"):
        assert not torch.allclose(by_stages["all"][name], by_stages["first"][name])
    for name in ("loss_era_twi_rpn", "loss_era_soft_rpn", "loss_era_feature", "loss_cls"):
        torch.testing.assert_close(by_stages["all"][name], by_stages["first"][name])
    with pytest.raises(
        UserError, match=r"MODEL\.ERA\.TWI\.STAGES is 'last': expected one of all, first"
    ):
        tiny_model("era", "MODEL.ERA.TWI.STAGES", "last")


@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_reach_the_student_and_no_weight_of_the_teacher(pair):
    model = taught(*PAIRS[pair], *SOFT)
    before = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}
    losses, _ = losses_of(model, batch())
    sum(losses.values()).backward()
    missing = [n for n, p in model.student.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.model.state_dict().items())


def test_pictures_without_labels_are_judged_softly_by_all_stages():
    """Samples are chosen by what the teacher detects; no loss of the ground truth is there twice."""
    model = taught("cascade_era", TEACHER, *SOFT, *MASKS, "MODEL.DISTILLER.PSEUDO_SCORE", "0.0")
    labelled = masked_batch((2,))
    unlabelled = [{"unlabeled": True, "image": item["image"]} for item in batch((1,), seed=6)]
    losses, storage = losses_of(model, [*labelled, *unlabelled])
    assert losses["loss_era_soft_roi"] > 0 and losses["loss_mask"] > 0
    alone, _ = losses_of(model, labelled)
    for name in ("loss_cls_stage2", "loss_mask", "loss_era_twi_roi"):
        torch.testing.assert_close(losses[name], alone[name])
    assert storage.latest()["unlabeled/pseudo_boxes"][0] > 0
    assert "unlabeled/stage2/roi_head/num_fg_samples" in storage.latest()
    sum(losses.values()).backward()


# ---- inference with the teacher's heads -----------------------------------------------------------


@torch.no_grad()
def test_at_alpha_1_the_students_heads_do_not_matter():
    """A cascade's heads on the estimate: what Detectron2 computes of a model with that backbone and these heads."""
    model = taught("era", TEACHER, "MODEL.ERA.ALPHA", "1.0").eval()
    detector_of(model.teacher.model).set_score_threshold(0.9)  # the student's threshold counts
    inputs = [{"image": item["image"]} for item in batch()]
    found = model.inference(inputs, do_postprocess=False)
    deployed = model.deployable()
    assert type(detector_of(deployed)) is CascadeRCNN
    expected = deployed.inference(inputs, do_postprocess=False)
    assert sum(map(len, found)) > 0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


@torch.no_grad()
def test_a_cascade_blended_with_itself_is_itself():
    """Any alpha on equal heads and maps gives the cascade's own detections."""
    detector = detector_of(lively_cascade(2))
    inputs = [{"image": item["image"]} for item in batch()]
    own = detector.detect(inputs, do_postprocess=False)
    assert sum(map(len, own)) > 0
    for alpha in (0.3, 1.0):
        blended = detector.blended(detector, lambda features, _: features, alpha)
        for a, b in zip(blended(inputs, False), own, strict=True):
            torch.testing.assert_close(
                a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-3
            )
            torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)


def test_between_0_and_1_alpha_needs_one_family():
    for config, teacher in (PAIRS["cascade to Faster R-CNN"], PAIRS["Faster R-CNN to cascade"]):
        with pytest.raises(
            UserError, match=r"MODEL\.ERA\.ALPHA 0\.5 needs student and teacher of one family"
        ):
            tiny_model(config, *teacher, "MODEL.ERA.ALPHA", "0.5")
        assert tiny_model(config, *teacher, "MODEL.ERA.ALPHA", "1.0").deployable() is not None


# ---- inheritance ----------------------------------------------------------------------------------

INHERIT = ["MODEL.DISTILLER.INIT_STUDENT", "heads"]


def test_a_faster_rcnn_starts_from_the_first_stage():
    model = tiny_model(
        "era", *TEACHER, *INHERIT, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"
    )
    model.init_student_from_teacher()
    own, teacher = model.student.state_dict(), model.teacher.model.state_dict()
    heads = [key for key in own if key.split(".")[0] in ("proposal_generator", "roi_heads")]
    assert "roi_heads.box_predictor.bbox_pred.weight" in heads
    for key in heads:
        source = key.replace("box_head.", "box_head.0.").replace(
            "box_predictor.", "box_predictor.0."
        )
        assert torch.equal(own[key], teacher[source]), key


def test_a_cascade_starts_from_all_stages():
    model = tiny_model("cascade_era", *TEACHER, *INHERIT)
    model.init_student_from_teacher()
    own, teacher = model.student.state_dict(), model.teacher.model.state_dict()
    assert torch.equal(
        own["roi_heads.box_head.2.fc1.weight"], teacher["roi_heads.box_head.2.fc1.weight"]
    )


@pytest.mark.parametrize(
    "config, opts, message",
    [
        # a Faster R-CNN's deltas by class
        ("era", TEACHER, r"bbox_pred\.bias is \(32,\) in the student and \(4,\) in the teacher"),
        # nothing for the later stages to start from
        ("cascade_era", [], "one family: the student is a CascadeRCNN, the teacher a RCNN"),
        # coders of the stages
        (
            "cascade_era",
            [*TEACHER, "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
             "((10., 10., 5., 5.), (20., 20., 10., 10.), (40., 40., 20., 20.))"],
            r"equal box coders: MODEL\.ROI_BOX_CASCADE_HEAD\.BBOX_REG_WEIGHTS is",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_inherited_is_said(config, opts, message):
    with pytest.raises(UserError, match=message):
        tiny_model(config, *opts, *INHERIT)


# ---- configs that are no cascade's ----------------------------------------------------------------


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "False"], "CLS_AGNOSTIC_BBOX_REG is False, and .* set it True"),
        (["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 0.6)"], "BBOX_REG_WEIGHTS beside it has 3 entries"),
        (["MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.6]"], "expected the same first value"),
    ],
)  # fmt: skip
def test_a_config_that_fits_no_cascade_is_said(opts, message):
    """Of the student and of the teacher, before Detectron2 asserts it without a word."""
    with pytest.raises(UserError, match=f"^MODEL.*{message}"):
        build_model_of(tiny_cfg("cascade_plain", *opts))
    with pytest.raises(UserError, match=f"^MODEL.*{message}"):
        build_model_of(tiny_cfg("cascade_era", *opts))
    with pytest.raises(UserError, match=f"^the teacher's MODEL.*{message}"):
        tiny_model("era", *TEACHER, teacher_opts=opts)


# ---- two processes --------------------------------------------------------------------------------

EVERYTHING = [
    *TEACHER, *SOFT, "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "0",
    *NOTHING_SAMPLED,
]  # fmt: skip
IMAGES = batch((2, 2), seed=4)


def gradients_of(inputs):
    """Losses of a step and the gradient of every weight that is trained, averaged over processes if there are two."""
    model = tiny_model("cascade_era", *EVERYTHING)
    wrapped = model
    if comm.get_world_size() > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    losses, _ = losses_of(wrapped, inputs)
    sum(losses.values()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    return {key: value.detach() for key, value in losses.items()}, gradients


def _of_one_image(folder):
    rank = comm.get_rank()
    torch.save(gradients_of([IMAGES[rank]]), Path(folder) / f"{rank}.pth")


def test_two_processes_equal_one(tmp_path):
    """No weight without a gradient, equal gradients, and the losses of one process on both images."""
    torch.set_num_threads(1)
    launch(_of_one_image, 2, dist_url="auto", args=(str(tmp_path),))
    (a, first), (b, second) = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    losses, gradients = gradients_of(IMAGES)
    assert "loss_era_soft_roi" in losses and None not in gradients.values()
    for key, value in losses.items():
        torch.testing.assert_close((a[key] + b[key]) / 2, value, rtol=1e-4, atol=1e-6)
    for key, value in gradients.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5)
