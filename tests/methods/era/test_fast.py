"""The fast paths against the definitions: losses and gradients, in float64 to 1e-10."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from builders import batch, losses_of, tiny_cfg, tiny_model
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from era.losses import mse
from era.methods.era.fast import Levers
from era.methods.era.fast.factored import factored_estimates
from era.methods.era.fast.heads import FastHeads
from era.methods.era.fast.patches import gather_patches
from era.methods.era.fast.residual import estimate_distances
from era.methods.era.fast.rpn import knows_rpn_head
from era.methods.era.losses import emphasised, residual_mse, standardised
from era.methods.era.mbrnet import FeatureEstimator, MBRNet
from era.methods.era.standardise import emphasis
from era.methods.era.twi import SoftJudges, soft_twi_loss, twi_loss
from era.modeling.detectors import detector_of
from era.modeling.detectors.box_losses import box_losses
from era.modeling.detectors.proposals import sample_proposals, split

WEIGHTS = [1.0, 0.25, 0.125]
SOFT = [
    "MODEL.ERA.TWI.SOFT_RPN_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", "0.5",
    "MODEL.ERA.TWI.SOFT_POSITIONS",
]  # fmt: skip
ENDS = ["MODEL.ERA.TWI.ESTIMATES", "ends"]

# name: (options of the student and of the teacher alike, of the student alone, of MBRNet)
MODELS = {
    "default": ([], [], {"norm": "none", "hidden_channels": 4}),
    "one anchor shape": (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]"], [], {"norm": "none"}),
    "nine anchor shapes": (
        ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 20, 24], [32, 36, 40], [48, 52, 56], [64, 72, 80]]"],
        [], {"norm": "none", "hidden_channels": 4}),
    "parallel branches": ([], [], {"norm": "none", "accumulated_inputs": False}),
    "3x3 branches": ([], [], {"norm": "none", "kernel_size": 3, "hidden_channels": 4}),
    "3x3 first, 1x1 last": (
        [], [], {"norm": "none", "context_kernel": 3, "hidden_channels": 4, "num_blocks": 3}),
    "norm at the end": ([], [], {"norm": "GN"}),
    "three blocks": ([], [], {"norm": "none", "num_blocks": 3, "hidden_channels": 4}),
    "no branches": ([], [], {"norm": "none", "num_branches": 0}),
    "adapter, own projections": (
        [], ["MODEL.FPN.OUT_CHANNELS", "12"], {"norm": "none", "hidden_channels": 4}),
    "adapter, shared projection": (
        [], ["MODEL.FPN.OUT_CHANNELS", "12"],
        {"norm": "none", "hidden_channels": 4, "shared_up_projection": True}),
    "a learned projection at equal width": (
        [], [], {"norm": "none", "hidden_channels": 4, "always_project": True}),
    "another pooler": ([], ["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "3"], {"norm": "none"}),
    "adaptive sampling": (
        ["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "0"], [], {"norm": "none", "hidden_channels": 4}),
    "conv box head": (
        ["MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.CONV_DIM", "8"], [], {"norm": "none"}),
    "two RPN convs": (["MODEL.RPN.CONV_DIMS", "[16, 16]"], [], {"norm": "none"}),
    "smooth L1, class agnostic, sigmoid": (
        ["MODEL.RPN.SMOOTH_L1_BETA", "0.3", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True",
         "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True", "MODEL.RPN.LOSS_WEIGHT", "0.5"],
        [], {"norm": "none"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _float64_objectness(monkeypatch):
    """Detectron2's RPN makes its labels float32, and with them a float64 loss: keep it float64 here."""
    original = torch.nn.functional.binary_cross_entropy_with_logits

    def in_the_logits_type(logits, target, **options):
        return original(logits, target.to(logits.dtype), **options)

    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy_with_logits", in_the_logits_type)


def setting(case, objects, size=(64, 96)):
    """Student, teacher, estimator and a recorded step, in float64."""
    both, own, options = MODELS[case]
    torch.manual_seed(0)
    student = build_model(tiny_cfg("plain", *both, *own)).double().train()
    teacher = build_model(tiny_cfg("plain", *both)).double().eval().requires_grad_(False)
    for head in (teacher.proposal_generator.rpn_head, teacher.roi_heads):
        for p in head.parameters():  # far from the tiny initial weights, so that every term counts
            p.normal_(std=0.2)
    channels = [m.backbone.output_shape()["p3"].channels for m in (student, teacher)]
    options = {"num_branches": 2, **options}
    always_project = options.pop("always_project", False)
    mbrnet = MBRNet(in_channels=channels[0], out_channels=channels[1], **options)
    estimator = FeatureEstimator(
        levels=["p3", "p4", "p5", "p6"],
        in_channels=channels[0],
        out_channels=channels[1],
        mbrnet=mbrnet,
        always_project=always_project,
    ).double()
    for p in estimator.parameters():
        torch.nn.init.normal_(p, std=0.2)
    inputs = batch(objects, size=size)
    student.float()  # Detectron2's NMS knows float32 alone: sample in it, then go on in float64
    with EventStorage(0), detector_of(student).record() as step:
        student(inputs)
    student.double()
    step.features = student.backbone(student.preprocess_image(inputs).tensor)
    step.anchors = [Boxes(a.tensor.double()) for a in step.anchors]
    step.anchor_boxes = [b.double() for b in step.anchor_boxes]
    for p in step.proposals:
        for name in ("proposal_boxes", "gt_boxes"):
            if p.has(name):
                p.set(name, Boxes(p.get(name).tensor.double()))
    maps = [step.features[level] for level in student.roi_heads.box_in_features]
    step.roi_features = student.roi_heads.box_pooler(
        maps, [p.proposal_boxes for p in step.proposals]
    )
    return student, teacher, estimator, step


def gradients(loss, student, estimator):
    """Of every weight that the loss reaches, 0 where it does not."""
    parameters = [*student.backbone.parameters(), *estimator.parameters()]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_equal_to_reference(fast, reference, student, estimator):
    torch.testing.assert_close(fast, reference, rtol=1e-10, atol=1e-12)
    pairs = zip(
        gradients(fast, student, estimator), gradients(reference, student, estimator), strict=True
    )
    largest = 0.0
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        largest = max(largest, b.abs().max().item())
    assert largest > 1e-4, "the comparison needs gradients"


def assert_heads_equal_the_definition(fast, estimator, step, student, samples_per_image):
    """Both parts of the teacher's heads, fast on factors against the definition on the wide estimates."""
    weights = WEIGHTS[: len(estimator.mbrnet.branches) + 1]
    factored = factored_estimates(estimator, step.features)
    cumulative = estimator(step.features).cumulative()
    with EventStorage(0):
        for part in filter(fast.knows, ("rpn", "roi")):
            assert_equal_to_reference(
                fast.losses(part, factored, weights, step)["twi"],
                twi_loss(
                    fast.judge, part, cumulative, weights, step, samples_per_image=samples_per_image
                ),
                student,
                estimator,
            )


@pytest.mark.parametrize("case", MODELS)
def test_fast_heads_equal_the_definition(case):
    student, teacher, estimator, step = setting(case, (2, 3))
    fast = FastHeads(detector_of(teacher), detector_of(student), 10)
    assert fast.knows("rpn") == (case != "two RPN convs") and fast.knows("roi")
    assert fast.reuses_pooling == (case != "another pooler")
    assert_heads_equal_the_definition(fast, estimator, step, student, 10)


def assert_soft_heads_equal_the_definition(fast, estimator, step, student, *, hard):
    """Softly, both parts of the heads on random maps as the teacher's; the hard losses beside them alike."""
    weights = WEIGHTS[: len(estimator.mbrnet.branches) + 1]
    factored = factored_estimates(estimator, step.features)
    cumulative = estimator(step.features).cumulative()
    target = {level: torch.randn_like(x) for level, x in cumulative[0].items()}
    with EventStorage(0):
        for part in filter(fast.knows_soft, ("rpn", "roi")):
            found = fast.losses(part, factored, weights, step, hard=hard, target=target)
            assert set(found) == ({"twi", "soft"} if hard else {"soft"})
            options = {"samples_per_image": fast.samples_per_image}
            expected = soft_twi_loss(
                fast.judge, part, cumulative, weights, target, step, soft=fast.soft, **options
            )
            assert_equal_to_reference(found["soft"], expected, student, estimator)
            if hard:
                expected = twi_loss(fast.judge, part, cumulative, weights, step, **options)
                assert_equal_to_reference(found["twi"], expected, student, estimator)


@pytest.mark.parametrize("case", MODELS)
def test_fast_soft_heads_equal_the_definition(case):
    student, teacher, estimator, step = setting(case, (2, 3))
    soft = SoftJudges(("rpn", "roi"), "sampled", temperature=2.0)
    fast = FastHeads(detector_of(teacher), detector_of(student), 10, soft=soft)
    assert fast.knows_soft("rpn") == (case != "two RPN convs") and fast.knows_soft("roi")
    assert_soft_heads_equal_the_definition(fast, estimator, step, student, hard=True)


@pytest.mark.parametrize("objects", [(0, 0), (3, 0), (2,)], ids=["none", "half", "one image"])
def test_fast_soft_heads_alone_without_objects_and_of_one_image(objects):
    student, teacher, estimator, step = setting("default", objects, (50, 70))
    soft = SoftJudges(("rpn", "roi"), "sampled")
    fast = FastHeads(detector_of(teacher), detector_of(student), 0, soft=soft)
    assert_soft_heads_equal_the_definition(fast, estimator, step, student, hard=False)


def test_soft_judgements_at_all_anchors_are_left_to_the_definition():
    student, teacher, _, _ = setting("default", (1,))
    judges = detector_of(teacher), detector_of(student)
    fast = FastHeads(*judges, 10, soft=SoftJudges(("rpn", "roi"), "all"))
    assert fast.knows("rpn") and not fast.knows_soft("rpn") and fast.knows_soft("roi")
    assert "soft RPN pass dense" in fast.describe()


def assert_default_equals_definition(objects, size=(64, 96), **options):
    """The default setting's losses and gradients, fast with these options, against the definition."""
    student, teacher, estimator, step = setting("default", objects, size)
    fast = FastHeads(detector_of(teacher), detector_of(student), 0, Levers(**options))
    assert fast.reuses_pooling == options.get("reuse_pooling", True)
    assert_heads_equal_the_definition(fast, estimator, step, student, 0)


@pytest.mark.parametrize("switches", list(itertools.product([True, False], repeat=3)))
def test_every_lever_alone_gives_the_same(switches):
    names = ("sparse_rpn", "stacked_roi", "reuse_pooling")
    assert_default_equals_definition((2, 1), **dict(zip(names, switches, strict=True)))


@pytest.mark.parametrize("lever, part", [("sparse_rpn", "rpn"), ("stacked_roi", "roi")])
def test_a_part_without_its_lever_is_left_to_the_definition(lever, part):
    """And the whole step is the same, because the definition then runs."""
    found = []
    for levers in (Levers(), Levers(**{lever: False})):
        model = tiny_model("era")
        era = model.methods["era"]
        judge, student = model.teacher.detector, model.detector
        era.fast_terms.heads = FastHeads(judge, student, era.samples_per_image, levers)
        assert era.fast_terms.heads.knows(part) == getattr(levers, lever)
        found.append(losses_of(model, batch())[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.ERA.NORM", "GN", "MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "0"],
        ["MODEL.FPN.OUT_CHANNELS", "12", "MODEL.ERA.SHARED_UP_PROJECTION", "True"],
        ["MODEL.ERA.NUM_BRANCHES", "0", "MODEL.ERA.SCALES", "[]"],
        ["MODEL.ERA.CONTEXT_KERNEL", "3", "MODEL.ERA.HIDDEN_CHANNELS", "12", "MODEL.ERA.PROJECTION", "always"],
        ["MODEL.ERA.POSITION_WEIGHT", "teacher", "MODEL.ERA.STANDARDIZE", "teacher"],
        ["MODEL.ERA.STANDARDIZE", "teacher", *SOFT, "sampled"],
        ["MODEL.ERA.STANDARDIZE", "teacher", "MODEL.ERA.NORM", "GN", *SOFT, "all"],
        [*SOFT, "sampled", "MODEL.ERA.TWI.RPN_WEIGHT", "0.0", "MODEL.ERA.TWI.ROI_WEIGHT", "0.0"],
        [*SOFT, "sampled", *ENDS],
        [*ENDS, "MODEL.ERA.NORM", "GN"],
        [*ENDS, "MODEL.ERA.NUM_BRANCHES", "0", "MODEL.ERA.SCALES", "[]"],
        [*ENDS, "MODEL.ERA.NUM_BRANCHES", "1", "MODEL.ERA.SCALES", "[0.5]"],
    ],
    ids=[
        "default", "norms, all proposals", "adapter", "no branches", "context, projection", "positions weighted",
        "standardised, soft",
        "standardised, norms, soft at all anchors", "soft alone",
        "ends, soft", "ends, norms", "ends, no branches", "ends, one branch",
    ],
)  # fmt: skip
def test_the_method_computes_the_same_fast_and_as_defined(opts):
    """All losses, statistics and gradients of a whole step, ``MODEL.ERA.FAST`` True and False, float32."""
    found = []
    for fast in ("True", "False"):
        model = tiny_model("era", "MODEL.ERA.KD_WEIGHT", "1.0", *opts, "MODEL.ERA.FAST", fast)
        losses, storage = losses_of(model, batch((2, 0, 1)))
        sum(losses.values()).backward()
        residuals = {k: v[0] for k, v in storage.latest().items() if "residual_e" in k}
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        found.append((losses, residuals, gradients))
    for fast, defined in zip(*found, strict=True):
        assert fast.keys() == defined.keys() and len(fast) > 3
        for key, value in defined.items():
            torch.testing.assert_close(fast[key], value, rtol=2e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("target", ["none", "teacher"])
@pytest.mark.parametrize("lever", ["narrow_residual", "fused_branches"])
def test_levers_of_the_feature_losses_change_no_number(lever, target):
    found = []
    for levers in (Levers(), Levers(**{lever: False})):
        model = tiny_model("era", "MODEL.ERA.STANDARDIZE", target)
        fast = model.methods["era"].fast_terms
        fast.levers = levers
        losses, _ = losses_of(model, batch())
        found.append(losses)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objects", [(0, 0), (3, 0), (2,)], ids=["none", "half", "one image"])
def test_images_without_objects_and_one_image(objects):
    assert_default_equals_definition(objects, size=(50, 70))


@pytest.mark.parametrize("case", MODELS)
def test_factors_multiply_out_to_the_residuals(case):
    _, _, estimator, step = setting(case, (1,))
    for a, b in zip(
        factored_estimates(estimator, step.features).dense().cumulative(),
        estimator(step.features).cumulative(),
        strict=True,
    ):
        for level in b:
            torch.testing.assert_close(a[level], b[level], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("is_standardised", [False, True])
@pytest.mark.parametrize("projected", [True, False])
def test_distances_and_their_gradients(projected, is_standardised, is_weighted):
    """Without the wide maps the same as mse and residual_mse on them, standardised and weighted or not."""

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    target, zeroth = rand(2, 6, 4, 5), rand(2, 6, 4, 5)
    factors = rand(2, 3 * (3 if projected else 6), 4, 5)
    projection = rand(6, 9) if projected else None
    weights = torch.tensor([5.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    sigma = torch.rand(6, dtype=torch.float64) + 0.1 if is_standardised else None

    by_position = None
    if is_weighted:
        by_position = emphasis({"p3": torch.rand(2, 1, 4, 5, dtype=torch.float64)})

    def scaled(x):
        x = standardised({"p3": x}, {"p3": sigma} if is_standardised else None)
        return emphasised(x, by_position)["p3"]

    goal = scaled(target.detach())
    estimates, expected = [zeroth], [mse(scaled(zeroth), goal)]
    for i, factor in enumerate(factors.chunk(3, dim=1)):
        d = factor
        if projected:
            d = torch.einsum("ch,bhyx->bcyx", projection[:, 3 * i : 3 * i + 3], factor)
        expected.append(residual_mse(scaled(d), scaled(estimates[-1]), goal))
        estimates.append(estimates[-1] + d)
    expected = torch.stack(expected)
    root = by_position["p3"] if is_weighted else None
    found = estimate_distances(zeroth, target, factors, projection, 3, sigma, root)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)

    leaves = [zeroth, factors, *([projection] if projected else [])]
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_distances_on_large_maps_are_not_rounded_away():
    """float32 sums of millions of squares, to 1e-5 (a norm in one go is off by 1e-3 on a CPU)."""
    zeroth, factors = torch.randn(1, 64, 200, 336), torch.randn(1, 8, 200, 336)
    projection = torch.randn(64, 8) * 0.1
    found = estimate_distances(zeroth, torch.zeros_like(zeroth), factors, projection, 2)
    estimate = zeroth.double()
    for i in range(3):
        assert found[i].item() == pytest.approx(estimate.square().mean().item(), rel=1e-5)
        own = slice(4 * i, 4 * i + 4)
        if i < 2:
            d = torch.einsum("ch,bhyx->bcyx", projection[:, own].double(), factors[:, own].double())
            estimate = estimate + d


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distances_of_half_precision_maps(dtype):
    """Computed in float32; gradients survive float16 although 2 / numel alone would not."""
    zeroth = torch.randn(1, 64, 200, 200).to(dtype).requires_grad_()
    factor = torch.randn(1, 8, 200, 200).to(dtype).requires_grad_()
    projection = torch.randn(64, 8).requires_grad_()
    values = estimate_distances(zeroth, torch.zeros_like(zeroth), factor, projection, 1)
    assert values.dtype == torch.float32 and values[0].item() == pytest.approx(1.0, rel=0.02)
    (values.sum() * 65536).backward()  # the loss scale of float16
    expected = 2 * zeroth.detach().float() / zeroth.numel() * 65536
    torch.testing.assert_close(zeroth.grad.float(), expected, rtol=0.02, atol=1e-3)
    assert factor.grad.dtype == dtype and factor.grad.abs().sum() > 0
    assert projection.grad.dtype == torch.float32


def test_patches_are_what_a_padded_conv_sees():
    feature_map = torch.randn(2, 3, 4, 5)
    image, y, x = (
        i.flatten() for i in torch.meshgrid(*map(torch.arange, (2, 4, 5)), indexing="ij")
    )
    unfolded = torch.nn.functional.unfold(feature_map, 3, padding=1)  # (B, C * 9, H * W)
    expected = unfolded.unflatten(1, (3, 9)).permute(0, 3, 2, 1).flatten(0, 1)
    assert torch.equal(gather_patches(feature_map, image, y, x), expected)


@pytest.mark.parametrize(
    "count, foreground, background, expected",
    [
        (8, 10, 20, (6, 2)),  # three quarters
        (8, 3, 20, (3, 5)),  # few objects: the rest is background
        (8, 30, 1, (7, 1)),  # little background: the rest is objects
        (8, 0, 20, (0, 8)),
        (8, 20, 0, (8, 0)),
        (8, 2, 3, (2, 3)),  # fewer than asked for
        (1, 5, 5, (1, 0)),  # an object before all
    ],
)
def test_split_of_proposals(count, foreground, background, expected):
    assert split(count, foreground, background) == expected


def proposals_of(*classes):
    """Images with proposals of these classes, 8 being background; box i at x = i."""
    own = []
    for labels in classes:
        p = Instances((64, 64))
        p.gt_classes = torch.tensor(labels, dtype=torch.long)
        x = torch.arange(len(labels), dtype=torch.float32)[:, None]
        p.proposal_boxes = Boxes(torch.cat([x, x, x + 9, x + 9], dim=1))
        own.append(p)
    return own


def test_all_proposals_are_one_stratum():
    proposals = proposals_of([1, 2, 8], [8, 8])
    for count in (0, 3):
        sample = sample_proposals(proposals, 8, count)
        assert sample.rows.tolist() == [0, 1, 2, 3, 4]
        assert [s.share for s in sample.strata] == [1.0]


def test_sample_proposals_stand_for_all():
    """4 of 8 and of 6: rows, boxes and shares worked by hand."""
    proposals = proposals_of([1, 2, 3, 4, 8, 8, 8, 8], [5, 8, 8, 8, 8, 8])
    sample = sample_proposals(proposals, 8, 4)
    assert sample.rows.tolist() == [0, 1, 2, 4, 8, 9, 10, 11]
    assert [len(p) for p in sample.proposals] == [4, 4]
    shares = [s.share for s in sample.strata]
    assert shares == pytest.approx([4 / 14, 4 / 14, 1 / 14, 5 / 14])
    assert [s.indices.tolist() for s in sample.strata] == [[0, 1, 2], [3], [4], [5, 6, 7]]
    assert [s.is_foreground for s in sample.strata] == [True, False, True, False]
    classes = torch.cat([p.gt_classes for p in sample.proposals])
    for stratum in sample.strata:
        own = torch.cat([p.gt_classes for p in stratum.proposals])
        assert torch.equal(own, classes[stratum.indices])
    assert sample.strata[1].proposals[0].proposal_boxes.tensor.tolist() == [[4, 4, 13, 13]]


def test_the_mean_over_choices_is_the_loss_of_all():
    """Detectron2 orders each part at random: over all orders, the estimate is right on average."""
    classes, values = torch.tensor([0, 1, 2, 8, 8, 8]), torch.rand(6)
    found = []
    for front in itertools.permutations(range(3)):
        for back in itertools.permutations(range(3, 6)):
            order = torch.tensor([*front, *back])
            sample = sample_proposals(proposals_of(classes[order].tolist()), 8, 3)
            own = values[order][sample.rows]
            found.append(sum(s.share * own[s.indices].mean() for s in sample.strata))
    assert len(sample.rows) == 3
    assert torch.stack(found).mean().item() == pytest.approx(values.mean().item(), rel=1e-5)


def test_no_proposal_at_all():
    sample = sample_proposals(proposals_of([], []), 8, 4)
    assert len(sample.rows) == 0 and sample.strata == []


@pytest.mark.parametrize(
    "kind, beta",
    [("smooth_l1", 0.0), ("smooth_l1", 0.5), ("giou", 0.0), ("diou", 0.0), ("ciou", 0.0)],
)
def test_box_losses_are_detectron2s(kind, beta):
    """Of two estimates at once what Detectron2's own loss gives of each."""
    settings = SimpleNamespace(
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        box_reg_loss_type=kind,
        smooth_l1_beta=beta,
    )
    corner = torch.rand(5, 2) * 30
    boxes = torch.cat([corner, corner + 10 + torch.rand(5, 2) * 20], dim=1)
    matched, deltas = boxes + torch.rand(5, 4), torch.randn(2, 5, 4)
    expected = [
        _dense_box_regression_loss(
            [boxes], settings.box2box_transform, [own[None]], [matched], ...,
            box_reg_loss_type=kind, smooth_l1_beta=beta,
        )
        for own in deltas
    ]  # fmt: skip
    found = box_losses(settings, boxes, matched, deltas)
    assert found.shape == (2, 5)
    torch.testing.assert_close(found.sum(1), torch.stack(expected))
    assert box_losses(settings, boxes[:0], matched[:0], deltas[:, :0]).shape == (2, 0)


def test_heads_that_are_not_known_are_not_taken_for_known():
    rpn = tiny_model("plain").proposal_generator
    assert knows_rpn_head(rpn)
    rpn.rpn_head.conv.norm = torch.nn.BatchNorm2d(16)
    assert not knows_rpn_head(rpn)
    assert not knows_rpn_head(SimpleNamespace(rpn_head=torch.nn.Conv2d(1, 1, 3)))
