"""What every method on FPN maps keeps: batches without boxes, gradients, weight 0, ERA beside it, two processes."""

from pathlib import Path

import pytest
import torch
from builders import Once, batch, losses_of, tiny_model
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from era.engine.stepping import StepTrainer
from era.errors import UserError
from era.registry import METHOD_REGISTRY

NAMES = ("PKD", "Mimic", "CWD", "MGD", "MTPD", "ReviewKD", "FGD")
WEIGHTS = {
    "FGD": ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "ATTENTION_WEIGHT", "GLOBAL_WEIGHT"),
}
OBJECTS = [(2, 1), (2, 0), (0, 0)]
WIDER = ["MODEL.FPN.OUT_CHANNELS", "24"]  # the teacher, so that there are adapters


def levels(*names):
    """The toy pyramid's levels for each of the methods."""
    return [x for name in names for x in (f"MODEL.{name.upper()}.LEVELS", "['p3', 'p4', 'p5']")]


def options(*names):
    """A run of these methods alone."""
    return ["MODEL.DISTILLER.METHODS", str(names), *levels(*names)]


def weights(name, value):
    """All weights of a method at one value."""
    keys = WEIGHTS.get(name, ("WEIGHT",))
    return [x for key in keys for x in (f"MODEL.{name.upper()}.{key}", str(float(value)))]


def of(losses, name):
    """The losses of one method, as the frame names them."""
    return {key: x for key, x in losses.items() if key.startswith(f"loss_{name.lower()}_")}


def test_every_method_on_maps_says_what_it_is():
    for name in NAMES:
        method = METHOD_REGISTRY.get(name)
        assert method.idea and "arXiv" in method.paper
        model = tiny_model("era", *options(name), *weights(name, 1))
        losses, _ = losses_of(model, batch())
        assert of(losses, name).keys() == method.loss_labels.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objects", OBJECTS, ids=["full", "half", "empty"])
def test_every_kind_of_batch_gives_finite_losses_and_gradients(name, objects):
    model = tiny_model("era", *options(name), *weights(name, 1), teacher_opts=WIDER)
    losses, _ = losses_of(model, batch(objects))
    sum(losses.values()).backward()
    own = of(losses, name)
    assert own and all(torch.isfinite(x) and x.requires_grad for x in own.values())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_backbone_and_no_head_and_no_teacher(name):
    model = tiny_model("era", *options(name), *weights(name, 1), teacher_opts=WIDER)
    losses, _ = losses_of(model, batch())
    sum(of(losses, name).values()).backward()
    assert all(p.grad is not None for p in model.methods.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.student.backbone.fpn_output3.parameters())
    for part in (model.student.roi_heads, model.student.proposal_generator, model.teacher):
        assert all(p.grad is None for p in part.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_weight_0_is_plain_training_and_freezes(name):
    plain, _ = losses_of(tiny_model("plain"), batch())
    model = tiny_model("era", *options(name), *weights(name, 0), teacher_opts=WIDER)
    found, _ = losses_of(model, batch())
    assert found == plain
    assert not any(p.requires_grad for p in model.methods.parameters())


def test_nothing_is_drawn_from_the_global_random_state():
    """Neither when built nor in training: the student's own losses, which sample at random, stay as they are."""
    plain, _ = losses_of(tiny_model("plain"), batch())
    found, _ = losses_of(tiny_model("era", *options(*NAMES)), batch())
    assert {key: found[key] for key in plain} == plain


def test_together_and_with_era_the_losses_add_up():
    """Each method's losses are what it gives alone, from the same weights; the sum of all is trained."""
    names = ("ERA", *NAMES)
    model = tiny_model("era", "MODEL.DISTILLER.METHODS", str(names), *levels(*NAMES))
    state = {key: x.clone() for key, x in model.methods.state_dict().items()}
    together, _ = losses_of(model, batch())
    plain, _ = losses_of(tiny_model("plain"), batch())
    assert together.keys() == plain.keys() | {k for n in names for k in of(together, n)}
    for name in names:
        model = tiny_model("era", "MODEL.DISTILLER.METHODS", f"('{name}',)", *levels(*NAMES))
        own = {key: x for key, x in state.items() if key.startswith(f"{name.lower()}.")}
        model.methods.load_state_dict(own)
        alone, _ = losses_of(model, batch())
        assert of(together, name)
        torch.testing.assert_close(of(together, name), of(alone, name))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_without_labels(name):
    """The same pictures without and with labels: losses that need no ground truth are the mean over both, FGD's others
    those of the labelled ones."""
    no_mask = [
        "MODEL.MGD.MASK_RATIO",
        "0.0",
        "MODEL.MTPD.MASK_RATIO",
        "0.0",
    ]  # other pictures have other masks
    model = tiny_model("era", *options(name), *weights(name, 1), *no_mask)
    assert model.label_free == (name.lower(),)
    labelled = batch()
    others = [{"unlabeled": True, "image": item["image"]} for item in labelled]
    alone, _ = losses_of(model, labelled)
    beside, _ = losses_of(model, [*labelled, *others])
    torch.testing.assert_close(of(beside, name), of(alone, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(name, dtype):
    model = tiny_model("era", *options(name), *weights(name, 1))
    full, _ = losses_of(model, batch())
    with torch.autocast("cpu", dtype=dtype):
        half, _ = losses_of(model, batch())
    for key, value in of(half, name).items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(
            full[key].item(), rel=0.1
        )


def test_steps_in_half_precision_bring_the_losses_down():
    """All methods at once, float16 with its loss scaling, from the teacher's maps far away."""
    scales = {"MGD": 1e-4, "MTPD": 1e-4, "FGD": 1e-4}  # sums over positions
    each = [x for name in NAMES for x in weights(name, scales.get(name, 0.2))]
    model = tiny_model("era", *options(*NAMES), *each).train()
    trainer = StepTrainer(
        model,
        Once(*[batch((2, 1), seed=i % 3) for i in range(15)]),
        torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9),
        amp_dtype=torch.float16,
        device_type="cpu",
    )
    with EventStorage(0) as storage:
        for trainer.iter in range(15):
            storage.iter = trainer.iter
            trainer.run_step()  # raises FloatingPointError for a loss that is not finite
    assert all(torch.isfinite(p).all() for p in model.parameters())
    for name in NAMES:
        for key in METHOD_REGISTRY.get(name).loss_labels:
            history = [value for value, _ in storage.history(key).values()]
            assert sum(history[-5:]) < 0.9 * sum(history[:5]), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "suffix, value, words",
    [
        ("LEVELS", [], r"LEVELS is empty"),
        ("LEVELS", ["p3", "p3"], r"LEVELS is \['p3', 'p3'\], with a level twice"),
        ("LEVELS", ["p9"], r"LEVELS is \['p9'\].*student"),
        ("WEIGHT", -1.0, r"WEIGHT is -1\.0"),
        ("WEIGHT", float("nan"), r"WEIGHT is nan"),
    ],
)
def test_bad_keys(name, suffix, value, words):
    key = WEIGHTS.get(name, ("WEIGHT",))[-1] if suffix == "WEIGHT" else suffix
    with pytest.raises(UserError, match=rf"^MODEL\.{name.upper()}\.[A-Z_]*{words}"):
        tiny_model("era", *options(name), f"MODEL.{name.upper()}.{key}", value)


# ---- two processes ------------------------------------------------------------------------------------

IMAGES = batch((2, 1), seed=4)
OTHERS = [{"unlabeled": True, "image": item["image"]} for item in batch((1, 1), seed=6)]
# PKD's statistics are the batch's. With these weights the gradients are of one order.
BATCH_FREE = {"Mimic": 1.0, "CWD": 1.0, "MGD": 1e-5, "ReviewKD": 1.0, "FGD": 1e-5}
EVERYTHING = [
    *options(*BATCH_FREE), *[x for item in BATCH_FREE.items() for x in weights(*item)],
    "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DISTILLER.PSEUDO_SCORE", "1.0",
]  # fmt: skip


def gradients_of(inputs, norm):
    """The methods' losses of a step, and the gradients that they send, averaged over processes if there are two."""
    model = tiny_model("era", *EVERYTHING, "MODEL.REVIEWKD.NORM", norm)
    wrapped = model
    if comm.get_world_size() > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    losses, _ = losses_of(wrapped, inputs)
    own = {key: x for name in BATCH_FREE for key, x in of(losses, name).items()}
    # The student's own losses sample at random; their gradient is there, as DDP expects, and is 0.
    (sum(own.values()) + 0 * sum(losses.values())).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    return {key: value.detach() for key, value in own.items()}, gradients


def _of_one_image(folder):
    rank = comm.get_rank()
    for norm in ("GN", "BN"):
        found = gradients_of([IMAGES[rank], OTHERS[rank]], norm)
        torch.save(found, Path(folder) / f"{norm}{rank}.pth")


def test_two_processes_equal_one(tmp_path):
    """Of one image each and one without labels: no weight without a gradient, equal gradients, and those and the
    losses of one process on all four, but for ReviewKD's with BatchNorm, where they are equal to each other alone."""
    torch.set_num_threads(1)
    launch(_of_one_image, 2, dist_url="auto", args=(str(tmp_path),))
    for norm in ("GN", "BN"):
        (a, first), (b, second) = (torch.load(tmp_path / f"{norm}{rank}.pth") for rank in (0, 1))
        losses, gradients = gradients_of([*IMAGES, *OTHERS], norm)
        assert None not in gradients.values()
        for key, value in losses.items():
            is_close = torch.isclose((a[key] + b[key]) / 2, value, rtol=1e-4, atol=1e-6)
            assert is_close == (norm == "GN" or "reviewkd" not in key), key
        for key, value in gradients.items():
            assert torch.equal(first[key], second[key]), key
            if norm == "GN":
                torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5, msg=key)
