"""R2KD: two teachers and two views, the pruned teacher apart from the student, and the chain of two runs."""

import copy

import pytest
import torch
from builders import REPO, TINY, TINY_TEACHER, batch, losses_of, tiny_model
from detectron2.utils.events import EventStorage
from torch import nn

from era.engine.launch import train_net
from era.errors import UserError
from era.methods.r2kd.losses import rank_loss, value_loss
from era.methods.r2kd.method import PART
from era.methods.r2kd.pruning import keep_zeros, prune_smallest, zeros
from era.modeling.step import Step
from era.modeling.teacher_cache import TeacherCache
from era.modeling.teacher_cache.cache import PICTURE_KEY
from era.modeling.teacher_cache.memory import MemoryStore

R2KD = ["MODEL.DISTILLER.METHODS", "('R2KD',)"]
FINE_TUNE = [*R2KD, "MODEL.R2KD.FINE_TUNE", "True"]


# ---- pruning -----------------------------------------------------------------------------------------


def test_the_smallest_weights_of_each_layer_are_pruned():
    model = nn.Sequential(nn.Conv2d(1, 5, 2), nn.BatchNorm2d(5), nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(-10, 10).reshape(5, 1, 2, 2))
    before = copy.deepcopy(model.state_dict())
    prune_smallest(model, 0.25)
    after = model.state_dict()
    assert after.keys() == before.keys()
    kept = torch.arange(-10, 10).reshape(5, 1, 2, 2)
    assert torch.equal(after["0.weight"], kept * (kept.abs() > 2))  # 5 of 20: 0, 1, 1, 2, 2
    sizes = before["2.weight"].abs()
    expected = before["2.weight"] * (sizes > sizes.flatten().sort().values[4])
    assert torch.equal(after["2.weight"], expected)
    for key in before.keys() - {"0.weight", "2.weight"}:
        assert torch.equal(after[key], before[key])
    assert zeros(model) == 0.25


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_zeros_stay_in_training(optimizer):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    prune_smallest(model, 0.5)
    keep_zeros(model)
    pattern = [model[i].weight == 0 for i in (0, 2)]
    before = copy.deepcopy(model.state_dict())
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = optimizer(model.parameters(), lr=0.1, weight_decay=0.1, **more)
    for _ in range(3):
        steps.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        steps.step()
    for i, zero in zip((0, 2), pattern, strict=True):
        assert torch.equal(model[i].weight == 0, zero)
        assert not torch.equal(model[i].weight, before[f"{i}.weight"])


# ---- distilling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_the_method_compares_both_teachers_on_both_views(objects):
    opts = ["MODEL.R2KD.VIEW", "flip", "MODEL.R2KD.PRUNE_AMOUNT", "0.5"]
    model = tiny_model("era", *R2KD, *opts)
    first, second = model.teacher, model.methods["r2kd"].second_teacher
    assert zeros(second.model) == pytest.approx(0.5, abs=1e-3) and zeros(first.model) == 0
    with model.detector.record() as recording:
        _, storage = losses_of(model.student, batch(objects))
    with storage:
        step = Step(batch(objects), recording, model.detector, first)
        found = model.methods["r2kd"].losses(step)
        view, expected = step.view("flip"), {"value": 0.0, "rank": 0.0}
        size = tuple(recording.images.tensor.shape[-2:])
        for inputs, samples, own in (
            (step.batched_inputs, recording.samples, recording.predictions),
            (view.batched_inputs, view.samples, view.predictions),
        ):
            both = [
                t.predict(t.features(inputs, recording.features, size), samples).class_logits
                for t in (first, second)
            ]
            assert len(both[0]) == 0 or not torch.equal(*both)
            mean = 0.7 * both[0] + 0.3 * both[1]
            expected["value"] += 2 * value_loss(own.class_logits, mean, 1.0)
            expected["rank"] += 2 * rank_loss(own.class_logits, mean, 1.0)
    assert found.keys() == {"loss_r2kd_value", "loss_r2kd_rank"}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"loss_r2kd_{name}"], value)
    sum(found.values()).backward()
    assert any(p.grad is not None for p in model.student.backbone.parameters())
    assert all(p.grad is None for p in model.student.proposal_generator.parameters())
    assert all(p.grad is None for t in (first, second) for p in t.parameters())


def test_the_second_teacher_is_asked_once_a_view(monkeypatch):
    model = tiny_model("era", *R2KD)
    second, asked = model.methods["r2kd"].second_teacher, []
    features = second.features
    monkeypatch.setattr(second, "features", lambda *a: asked.append(1) or features(*a))
    losses_of(model, batch())
    assert asked == [1, 1]
    model.methods["r2kd"].view = "none"
    losses_of(model, batch())
    assert asked == [1, 1, 1]


def test_the_second_teacher_is_no_part_of_the_model_but_goes_where_it_goes():
    model = tiny_model("era", *R2KD)
    second = model.methods["r2kd"].second_teacher
    assert not [name for name in model.state_dict() if name.startswith("methods.")]
    assert list(model.methods["r2kd"].parameters()) == []
    model.train()
    assert not any(m.training for m in second.modules())
    assert second.sha256 != model.teacher.sha256 and second.cache is None
    model.double()
    assert {p.dtype for p in second.parameters()} == {torch.float64}
    assert model.methods["r2kd"].to("meta").second_teacher.model.pixel_mean.is_meta


def test_both_teachers_share_the_cache_and_are_told_apart_in_it():
    model = tiny_model("era", *R2KD, "MODEL.R2KD.VIEW", "none")
    inputs = [{**item, PICTURE_KEY: str(i)} for i, item in enumerate(batch())]
    plain, _ = losses_of(model, inputs)
    model.teacher.cache = cache = TeacherCache(MemoryStore(1 << 30), half=False)
    first, _ = losses_of(model, inputs)
    again, _ = losses_of(model, inputs)
    assert first == again == plain
    assert (cache.asked, cache.served) == (8, 4)


def test_a_copy_of_a_teacher_is_apart_from_it():
    first = tiny_model("era").teacher
    assert first.sha256 == first.copy().sha256
    second = first.copy()
    with torch.no_grad():
        second.model.backbone.fpn_output3.weight.zero_()
    assert first.model.backbone.fpn_output3.weight.abs().sum() > 0
    assert second.sha256 != first.sha256 and second.detector.model is second.model
    assert second.detector.model.backbone is second._backbone[0]


def test_weight_0_is_plain_training():
    plain, _ = losses_of(tiny_model("plain"), batch())
    zero = ["MODEL.R2KD.VALUE_WEIGHT", "0.0", "MODEL.R2KD.RANK_WEIGHT", "0.0"]
    model = tiny_model("era", *R2KD, *zero)
    assert losses_of(model, batch())[0] == plain
    assert model.methods["r2kd"].second_teacher is None


def test_a_term_of_weight_0_is_left_out_and_plain_losses_stay():
    plain, _ = losses_of(tiny_model("plain"), batch())
    found, _ = losses_of(tiny_model("era", *R2KD, "MODEL.R2KD.RANK_WEIGHT", "0.0"), batch())
    assert found.pop("loss_r2kd_value") > 0 and found == plain


def test_with_era_the_losses_add_up():
    alone = {}
    for methods in ("('ERA',)", "('R2KD',)"):
        alone |= losses_of(tiny_model("era", "MODEL.DISTILLER.METHODS", methods), batch())[0]
    both, _ = losses_of(tiny_model("era", "MODEL.DISTILLER.METHODS", "('ERA', 'R2KD')"), batch())
    assert both.keys() == alone.keys() and {"loss_era_feature", "loss_r2kd_rank"} < both.keys()
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.R2KD.VIEW", "mixup"], r"R2KD\.VIEW is 'mixup': expected one of none, photometric"),
        (["MODEL.R2KD.RANK_WEIGHT", "-1.0"], r"MODEL\.R2KD\.RANK_WEIGHT is -1\.0"),
        (["MODEL.R2KD.RANK_TEMPERATURE", "0.0"], r"MODEL\.R2KD\.RANK_TEMPERATURE is 0\.0"),
        (["MODEL.R2KD.TEACHER_SHARE", "1.5"], r"TEACHER_SHARE is 1\.5: expected a part, 0 to 1"),
        (["MODEL.R2KD.PRUNE_AMOUNT", "10.0"], r"PRUNE_AMOUNT is 10\.0: expected a part, 0 to 1"),
        (["MODEL.R2KD.PRUNED_WEIGHTS", "gone.pth"], r"gone\.pth.* cannot be opened"),
        (
            ["MODEL.R2KD.PRUNED_WEIGHTS", "a.pth", "MODEL.R2KD.FINE_TUNE", "True"],
            r"PRUNED_WEIGHTS is 'a\.pth' and MODEL\.R2KD\.FINE_TUNE True",
        ),
    ],
)
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=words):
        tiny_model("era", *R2KD, *opts)


# ---- fine-tuning, and the chain ----------------------------------------------------------------------


def test_fine_tuning_trains_the_pruned_teacher_alone_and_keeps_its_zeros():
    model = tiny_model("era", *FINE_TUNE, "INPUT.FORMAT", "RGB")
    pruned = model.methods["r2kd"].pruned
    before = copy.deepcopy(model.state_dict())
    # What the teacher loses on the same pictures in its own channel order.
    flipped = [{**item, "image": item["image"].flip(0)} for item in batch()]
    model.train()
    torch.manual_seed(5)
    with torch.no_grad(), model.detector.record(), EventStorage(0):
        model.student(batch())
        expected = pruned(flipped)
    found, _ = losses_of(model, batch(), seed=5)
    assert found.keys() == {f"loss_r2kd_{name.removeprefix('loss_')}" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"loss_r2kd_{name.removeprefix('loss_')}"], value)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    sum(found.values()).backward()
    assert all(p.grad is not None for p in pruned.parameters())  # DDP waits for every one
    optimizer.step()
    after = model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    statistics = {key for key in changed if "running_" in key or "num_batches" in key}
    assert all(key.startswith("student.") for key in statistics)  # the frozen student's own
    assert all(key.startswith(PART) for key in changed - statistics)
    assert f"{PART}backbone.fpn_output3.weight" in changed
    assert zeros(pruned) == pytest.approx(0.1, abs=5e-3)


def test_fine_tuning_starts_from_what_a_run_without_it_distils():
    model = tiny_model("era", *FINE_TUNE)
    once = tiny_model("era", *R2KD).methods["r2kd"].second_teacher.model.state_dict()
    torch.testing.assert_close(model.methods["r2kd"].pruned.state_dict(), once, rtol=0, atol=0)


def test_a_teacher_with_masks_needs_a_student_with_masks():
    masks = ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
    with pytest.raises(UserError, match=r"FINE_TUNE True trains a teacher that predicts masks"):
        tiny_model("era", *FINE_TUNE, teacher_opts=masks)


def test_the_chain_of_runs(tiny_data, tmp_path):
    """Teacher, pruned teacher, student: each by the command line, the last two also resumed or refused."""

    def run(name, config, *opts, resume=False):
        file = str(REPO / "configs" / "toy" / f"{config}.yaml")
        flags = ["--resume"] if resume else []
        train_net(["--config-file", file, *flags, *TINY, *tiny_data, "SOLVER.MAX_ITER", "2",
                   "OUTPUT_DIR", str(tmp_path / name), *opts])  # fmt: skip
        return tmp_path / name / "model_final.pth"

    teacher = run("teacher", "teacher", *TINY_TEACHER)
    of_teacher = [
        "MODEL.TEACHER.CONFIG_FILE", str(REPO / "configs" / "toy" / "teacher.yaml"),
        "MODEL.TEACHER.WEIGHTS", str(teacher), "MODEL.TEACHER.OPTS", str(TINY_TEACHER),
    ]  # fmt: skip
    pruned = run("pruned", "methods/r2kd_prune", *of_teacher)
    assert not (tmp_path / "pruned" / "student").exists()
    run("pruned", "methods/r2kd_prune", *of_teacher, "SOLVER.MAX_ITER", "3", resume=True)
    written = torch.load(pruned, weights_only=True)["model"]
    part = {key[len(PART) :]: value for key, value in written.items() if key.startswith(PART)}
    first = torch.load(teacher, weights_only=True)["model"]
    assert part.keys() == first.keys()
    key = "backbone.fpn_output3.weight"
    assert (part[key] == 0).float().mean().item() == pytest.approx(0.1, abs=1e-3)
    assert not torch.equal(part[key][part[key] != 0], first[key][part[key] != 0])

    chain = [*of_teacher, "MODEL.R2KD.PRUNED_WEIGHTS", str(pruned)]
    student = run("student", "methods/r2kd", *chain)
    names = torch.load(student, weights_only=True)["model"]
    assert all(name.startswith("student.") for name in names)
    assert "loss_r2kd_rank" in (tmp_path / "student" / "metrics.json").read_text()

    other = run("other", "teacher", *TINY_TEACHER, "SEED", "9")
    with pytest.raises(
        UserError, match=r"R2KD\.PRUNED_WEIGHTS .* was trained with another teacher"
    ):
        run("refused", "methods/r2kd", *chain, "MODEL.TEACHER.WEIGHTS", str(other))
    with pytest.raises(UserError, match=r"holds no methods\.r2kd\.pruned"):
        run("refused", "methods/r2kd", *of_teacher, "MODEL.R2KD.PRUNED_WEIGHTS", str(student))
    assert not (tmp_path / "refused").exists()
