"""SSKD: both of its runs, what each trains, and the chain of the two."""

import pytest
import torch
from builders import REPO, TINY, TINY_TEACHER, batch, losses_of, tiny_cfg, tiny_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from era.engine.launch import train_net
from era.errors import UserError
from era.losses import kd_loss
from era.methods.sskd.losses import contrastive_loss, cosine_similarities, selected_kd_loss
from era.methods.sskd.method import SSKD as Method
from era.methods.sskd.method import objects_of
from era.modeling.step import Step

SSKD = ["MODEL.DISTILLER.METHODS", "('SSKD',)"]
HEAD = [*SSKD, "MODEL.SSKD.STAGE", "head"]
OFF = [x for key in ("CLEAN", "VIEW", "SIMILARITY") for x in (f"MODEL.SSKD.{key}_WEIGHT", "0.0")]
ALL = {"loss_sskd_clean", "loss_sskd_view", "loss_sskd_similarity"}
each_view = pytest.mark.parametrize("view", ["flip", "photometric"])
each_batch = pytest.mark.parametrize(
    "objects", [(2, 1), (2, 0), (0, 0)], ids=["full", "half", "empty"]
)


def step_of(model, inputs, *, seed=7, labeled=True):
    """A step as the distiller makes it."""
    torch.manual_seed(seed)
    with model.detector.record() as recording:
        model.student(inputs)
    return Step(inputs, recording, model.detector, model.teacher, labeled=labeled)


def boxes(inputs, flipped=False):
    """Ground-truth boxes as samples, by hand."""
    found = []
    for item in inputs:
        x0, y0, x1, y1 = item["instances"].gt_boxes.tensor.unbind(1)
        height, width = item["image"].shape[1:]
        own = Instances((height, width))
        left, right = (width - x1, width - x0) if flipped else (x0, x1)
        own.proposal_boxes = Boxes(torch.stack([left, y0, right, y1], 1))
        found.append(own)
    return found


def test_objects_are_the_ground_truth():
    model = tiny_model("era", *HEAD)
    with EventStorage(0):
        found = objects_of(step_of(model, batch((2, 1, 0))))
    for own, expected in zip(found, boxes(batch((2, 1, 0))), strict=True):
        assert torch.equal(own.proposal_boxes.tensor, expected.proposal_boxes.tensor)


@each_view
@each_batch
def test_the_first_run_trains_the_teachers_head_alone(objects, view):
    model = tiny_model("era", *HEAD, "MODEL.SSKD.VIEW", view)
    losses, storage = losses_of(model, batch(objects))
    assert losses.keys() == {"loss_sskd_contrast"}
    with storage:
        step = step_of(model, batch(objects))
        seen = step.view(view)
        detector, head = model.teacher.detector, model.methods["sskd"].head
        clean = head(detector.vectors(step.teacher_features, boxes(batch(objects))))
        changed = boxes(batch(objects), flipped=view == "flip")
        changed = head(detector.vectors(seen.teacher_features, changed))
    expected = contrastive_loss(cosine_similarities(changed, clean))
    torch.testing.assert_close(losses["loss_sskd_contrast"], expected)
    assert (expected > 0) == (sum(objects) > 1)
    losses["loss_sskd_contrast"].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"methods.sskd.head.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}
    assert all(p.grad is None for p in model.teacher.parameters())
    assert ("sskd/head_accuracy" in storage.latest()) == (sum(objects) > 0)


def test_one_object_tells_nothing():
    for opts, name in ((HEAD, "contrast"), (SSKD, "similarity")):
        losses, _ = losses_of(tiny_model("era", *opts), batch((1, 0)))
        loss = losses[f"loss_sskd_{name}"]
        assert loss.item() == 0 and loss.requires_grad


@each_view
@each_batch
def test_the_second_run_compares_classes_and_similarities(objects, view):
    opts = ["MODEL.SSKD.VIEW", view, "MODEL.SSKD.WRONG_CLASSES", "0.5"]
    model = tiny_model("era", *SSKD, *opts)
    method, inputs = model.methods["sskd"], batch(objects)
    earlier = torch.randn(5, 32), torch.randn(5, 32)
    method.queue.push(*earlier)
    with EventStorage(0):
        step = step_of(model, inputs)
        found = method.losses(step)
        seen, classes = step.view(view), step.student.classes
        samples = boxes(inputs), boxes(inputs, flipped=view == "flip")
        own = [
            method.projector(step.detector.vectors(maps, where))
            for maps, where in zip((step.student.features, seen.features), samples, strict=True)
        ]
        other = [
            method.head(step.teacher.detector.vectors(maps, where)).detach()
            for maps, where in zip(
                (step.teacher_features, seen.teacher_features), samples, strict=True
            )
        ]
    expected = {
        "clean": 0.9
        * kd_loss(
            step.student.predictions.class_logits, step.teacher_predictions.class_logits, 4.0
        ),
        "view": 2.7
        * selected_kd_loss(
            seen.predictions.class_logits, seen.teacher_predictions.class_logits, classes, 4.0, 0.5
        ),
    }
    columns = [torch.cat(x) for x in ((own[0], earlier[0]), (other[0], earlier[1]))]
    similarities = [
        cosine_similarities(x, y) for x, y in zip((own[1], other[1]), columns, strict=True)
    ]
    right = torch.arange(sum(objects))
    expected["similarity"] = 10 * selected_kd_loss(*similarities, right, 0.5, 0.75)
    assert found.keys() == ALL
    for name, value in expected.items():
        torch.testing.assert_close(found[f"loss_sskd_{name}"], value)
    kept = method.queue.rows()
    torch.testing.assert_close(kept[0], torch.cat([own[0].detach(), earlier[0]]))
    torch.testing.assert_close(kept[1], torch.cat([other[0], earlier[1]]))


def test_gradients_reach_student_and_projector_and_no_teacher():
    model = tiny_model("era", *SSKD)
    model.methods["sskd"].queue.push(torch.randn(5, 32), torch.randn(5, 32))
    with EventStorage(0):
        loss = model.methods["sskd"].losses(step_of(model, batch((3, 3))))["loss_sskd_similarity"]
    assert loss > 0
    loss.backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert {name for name in reached if name.startswith("methods.")} == {
        f"methods.sskd.projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")
    }
    assert any(name.startswith("student.backbone") for name in reached)
    assert any("box_head" in name for name in reached)
    assert not any("box_predictor" in name or "proposal_generator" in name for name in reached)
    assert not any(p.requires_grad for p in model.methods["sskd"].head.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())


def test_weight_0_is_plain_training_and_needs_no_head():
    plain, _ = losses_of(tiny_model("plain"), batch())
    model = tiny_model("era", *SSKD, *OFF)
    found, _ = losses_of(model, batch())
    assert found == plain and not list(model.methods["sskd"].parameters())


def test_a_term_of_weight_0_is_left_out_and_its_view_is_not_seen(monkeypatch):
    model = tiny_model("era", *SSKD, *OFF[2:])
    monkeypatch.setattr(Step, "view", None)
    found, _ = losses_of(model, batch())
    assert {k for k in found if "sskd" in k} == {"loss_sskd_clean"}


def test_without_labels_only_the_classes_of_the_pictures_as_they_are():
    model = tiny_model("era", *SSKD)
    with EventStorage(0):
        found = model.methods["sskd"].losses(step_of(model, batch(), labeled=False))
    assert found.keys() == {"loss_sskd_clean"}


def test_with_era_the_losses_add_up():
    alone = {}
    for methods in ("('ERA',)", "('SSKD',)"):
        alone |= losses_of(tiny_model("era", "MODEL.DISTILLER.METHODS", methods), batch())[0]
    both, _ = losses_of(tiny_model("era", "MODEL.DISTILLER.METHODS", "('ERA', 'SSKD')"), batch())
    assert both.keys() == alone.keys() and both.keys() > ALL
    for found in (
        both,
        alone,
    ):  # its projector, built after ERA's modules, starts from other weights
        assert found.pop("loss_sskd_similarity") > 0
    torch.testing.assert_close(both, alone)


def test_neither_building_nor_training_moves_the_global_random_state():
    state = []
    for opts in (["plain"], ["era", *SSKD], ["era", *HEAD]):
        model = tiny_model(*opts)
        losses_of(model, batch())
        state.append(torch.get_rng_state())
    assert all(torch.equal(state[0], other) for other in state[1:])


def test_needs_and_stages():
    cfg = tiny_cfg("era", *SSKD)
    assert not Method.needs(cfg).labels and not Method.prepares(cfg)
    assert Method.needs(cfg).more == ("a second view", "a trained head")
    cfg.MODEL.SSKD.STAGE = "head"
    assert Method.needs(cfg).labels and Method.prepares(cfg)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.SSKD.STAGE", "both"], r"MODEL\.SSKD\.STAGE is 'both': expected one of head, distil"),
        (["MODEL.SSKD.VIEW", "weak"], r"MODEL\.SSKD\.VIEW is 'weak': expected one of"),
        (["MODEL.SSKD.VIEW_WEIGHT", "-1.0"], r"MODEL\.SSKD\.VIEW_WEIGHT is -1\.0"),
        (["MODEL.SSKD.TEMPERATURE", "0.0"], r"MODEL\.SSKD\.TEMPERATURE is 0\.0"),
        (["MODEL.SSKD.SIMILARITY_TEMPERATURE", "-1.0"], r"MODEL\.SSKD\.SIMILARITY_TEMPERATURE is"),
        (["MODEL.SSKD.WRONG_SIMILARITIES", "1.5"], r"MODEL\.SSKD\.WRONG_SIMILARITIES is 1\.5"),
        (["MODEL.SSKD.QUEUE", "-1"], r"MODEL\.SSKD\.QUEUE is -1"),
        (["MODEL.ROI_BOX_HEAD.NUM_FC", "0", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1"],
         r"SSKD compares vectors of objects, and the student is a RCNN that makes no vector"),
    ],
)  # fmt: skip
def test_bad_keys(opts, words):
    with pytest.raises(UserError, match=words):
        tiny_model("era", *SSKD, *opts)


def test_the_head_and_a_distilling_method_cannot_share_a_run():
    with pytest.raises(UserError, match="sskd trains a part of its own first in this run, and era"):
        tiny_model("era", "MODEL.DISTILLER.METHODS", "('SSKD', 'ERA')", "MODEL.SSKD.STAGE", "head")


# ---- the chain ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tiny_data, tmp_path_factory):
    """A teacher's file, and the two runs of the chain after each other."""
    folder = tmp_path_factory.mktemp("sskd")
    weights = folder / "teacher.pth"
    torch.save({"model": tiny_model("era", *HEAD).teacher.model.state_dict()}, weights)

    def run(config, name, *opts, flags=()):
        train_net(
            ["--config-file", str(REPO / f"configs/toy/methods/{config}.yaml"), *flags, *TINY,
             *tiny_data, "MODEL.TEACHER.CONFIG_FILE", str(REPO / "configs/toy/teacher.yaml"),
             "MODEL.TEACHER.OPTS", str(TINY_TEACHER), "MODEL.TEACHER.WEIGHTS", str(weights),
             "OUTPUT_DIR", str(folder / name), "SOLVER.CHECKPOINT_PERIOD", "2", *opts]
        )  # fmt: skip

    run("sskd_head", "head", "SOLVER.MAX_ITER", "4")
    run.part = folder / "head" / "model_final.pth"
    run("sskd", "distil", "MODEL.SSKD.HEAD_WEIGHTS", str(run.part), "SOLVER.MAX_ITER", "2")
    return run, folder


def saved(path):
    return torch.load(path, weights_only=True)["model"]


def test_the_student_learns_with_the_head_that_was_trained(chain):
    _, folder = chain
    part, own = saved(folder / "head/model_final.pth"), saved(folder / "distil/model_final.pth")
    keys = {key for key in part if key.startswith("methods.")}
    assert keys == {f"methods.sskd.head.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}
    assert all(torch.equal(part[key], own[key]) for key in keys)
    first = saved(folder / "head/model_0000001.pth")
    assert any(not torch.equal(first[key], part[key]) for key in keys)
    assert own["methods.sskd.queue.count"] > 0
    assert not (folder / "head/student").exists() and not (folder / "head/inference").exists()


def test_the_students_file_holds_nothing_of_the_method(chain):
    _, folder = chain
    own = saved(folder / "distil/student/model_final.pth")
    assert own.keys() == tiny_model("plain").state_dict().keys()
    assert "SSKD" not in (folder / "distil/student/config.yaml").read_text()


def test_the_second_run_goes_on_with_its_queue(chain):
    run, folder = chain
    run("sskd", "distil", "MODEL.SSKD.HEAD_WEIGHTS", str(run.part), "SOLVER.MAX_ITER", "3",
        flags=["--resume"])  # fmt: skip
    before, after = (saved(folder / f"distil/model_{x}.pth") for x in ("0000001", "final"))
    old, new = (x["methods.sskd.queue.teacher"] for x in (before, after))
    count, more = int(before["methods.sskd.queue.count"]), int(after["methods.sskd.queue.count"])
    assert more > count and torch.equal(new[more - count : more], old[:count])


@pytest.mark.parametrize(
    "case, words",
    [
        ("missing", r'MODEL\.SSKD\.HEAD_WEIGHTS is "": expected the checkpoint of the run'),
        ("absent", r"absent\.pth' cannot be opened"),
        ("no head", r"MODEL\.SSKD\.HEAD_WEIGHTS .* holds no methods\.sskd\.head\.\*"),
        ("other teacher", r"MODEL\.SSKD\.HEAD_WEIGHTS .* another teacher than MODEL\.TEACHER\.WEIGHTS"),
        ("misfitting", r"MODEL\.SSKD\.HEAD_WEIGHTS .* does not fit: below methods\.sskd\.head\."),
    ],
)  # fmt: skip
def test_a_head_that_does_not_serve_is_one_sentence_before_anything_is_written(
    chain, tmp_path, case, words
):
    run, _ = chain
    path = {"missing": "", "absent": str(tmp_path / "absent.pth")}.get(case)
    if path is None:
        data = torch.load(run.part, weights_only=True)
        if case == "no head":
            data["model"] = {k: v for k, v in data["model"].items() if "methods" not in k}
        elif case == "other teacher":
            data["teacher"]["sha256"] = "0" * 64
        else:
            data["model"]["methods.sskd.head.0.weight"] = torch.zeros(3, 3)
        path = str(tmp_path / "part.pth")
        torch.save(data, path)
    with pytest.raises(UserError, match=words):
        run("sskd", str(tmp_path / "run"), "MODEL.SSKD.HEAD_WEIGHTS", path)
    assert not (tmp_path / "run").exists()
