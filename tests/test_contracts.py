"""The contracts between frame, methods and families of detectors, on methods that exist in this file alone."""

import pytest
import torch
from builders import (
    MASKS,
    TINY,
    TOY,
    batch,
    losses_of,
    masked_batch,
    tiny_cfg,
    tiny_model,
    train_history,
)
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from era.config import load_config, student_config
from era.engine.launch import train_net
from era.errors import UserError
from era.methods import Method, Needs
from era.modeling.detectors import Recording, detector_of, family_of
from era.modeling.detectors.rcnn import RCNN
from era.registry import METHOD_REGISTRY, methods_of, set_alpha

ZERO = [
    "MODEL.ERA.FEATURE_WEIGHT", "0.0", "MODEL.ERA.RESIDUAL_WEIGHT", "0.0",
    "MODEL.ERA.TWI.RPN_WEIGHT", "0.0", "MODEL.ERA.TWI.ROI_WEIGHT", "0.0",
]  # fmt: skip


@pytest.fixture
def register():
    """Registers methods for one test."""
    names = []

    def add(name, **members):
        def build(self, cfg, student, teacher):
            Method.__init__(self)
            self.teacher_was = teacher

        METHOD_REGISTRY.register(type(name, (Method,), {"__init__": build, **members}))
        names.append(name)

    yield add
    for name in names:
        METHOD_REGISTRY._obj_map.pop(name)


@pytest.mark.parametrize("opts", [[], MASKS], ids=["Faster R-CNN", "Mask R-CNN"])
def test_with_every_weight_at_0_a_family_trains_as_stock_detectron2(opts):
    """Step by step, bit for bit."""
    inputs = masked_batch if opts else batch
    plain = train_history("plain", *opts, inputs=inputs)
    assert ("loss_mask" in plain[0]) == bool(opts)
    assert train_history("era", *opts, *ZERO, inputs=inputs) == plain


LOSS_SETTINGS = {
    "default": [],
    "class agnostic, sigmoid": [
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True",
    ],
    "smooth L1, weights": [
        "MODEL.RPN.SMOOTH_L1_BETA", "0.3", "MODEL.RPN.LOSS_WEIGHT", "0.5",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "3.0", "MODEL.RPN.BBOX_REG_LOSS_WEIGHT", "2.0",
    ],
    "GIoU": ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou", "MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"],
}  # fmt: skip


@pytest.mark.parametrize("opts", LOSS_SETTINGS.values(), ids=LOSS_SETTINGS)
@pytest.mark.parametrize("objects", [(2, 3), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_task_losses_with_weights_of_one_are_the_stock_losses(opts, objects):
    student = tiny_model("plain", *opts)
    detector = detector_of(student)
    with detector.record() as recording:
        stock, _ = losses_of(student, batch(objects))
    task = detector.task_losses(recording)
    assert (
        task.keys() == stock.keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    )
    for name, loss in task.items():
        assert loss.values.shape == loss.rows.shape
        ones = loss.weighted(torch.ones_like(loss.values))
        torch.testing.assert_close(ones, stock[name], rtol=1e-5, atol=1e-6)
        parameters = [p for p in student.parameters() if p.requires_grad]
        own, other = (
            torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True)
            for x in (ones, stock[name])
        )
        for a, b in zip(own, other, strict=True):
            if b is not None:
                torch.testing.assert_close(a if a is not None else b * 0, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objects", [(2, 3), (2, 0), (0, 0)], ids=["full", "half", "empty"])
def test_the_classes_of_the_samples_are_those_of_the_class_loss(objects):
    """Row by row with the predictions; background is the number of classes, and alone where there is no object."""
    student = tiny_model("plain")
    detector = detector_of(student)
    with detector.record() as recording:
        stock, _ = losses_of(student, batch(objects))
    classes = recording.classes
    assert classes.shape == recording.predictions.class_logits.shape[:1]
    found = nn.functional.cross_entropy(recording.predictions.class_logits, classes)
    torch.testing.assert_close(found, stock["loss_cls"])
    labelled = {int(c) for item in batch(objects) for c in item["instances"].gt_classes}
    assert set(classes.tolist()) == labelled | {detector.num_classes}
    with pytest.raises(NotImplementedError, match="Recording does not say what class"):
        _ = Recording().classes


def test_methods_weight_the_students_own_losses_and_their_weights_multiply(register):
    def by(factor):
        def reweight(self, step):
            return {"loss_cls": torch.full_like(step.task_losses["loss_cls"].values, factor)}

        return {"reweight": reweight, "losses": lambda self, step: {}}

    register("TWICE", **by(2.0))
    register("THRICE", **by(3.0))
    plain, _ = losses_of(tiny_model("plain"), batch())
    found, _ = losses_of(
        tiny_model("era", "MODEL.DISTILLER.METHODS", "('TWICE', 'THRICE')"), batch()
    )
    for name, loss in plain.items():
        torch.testing.assert_close(found[name], loss * (6 if name == "loss_cls" else 1))


def test_a_weight_reaches_its_own_sample_alone(register):
    """Weight 0 for background: what is left is the loss of the foreground proposals."""

    def reweight(self, step):
        classes = torch.cat([p.gt_classes for p in step.student.proposals])
        rows = step.task_losses["loss_cls"].rows
        return {"loss_cls": (classes[rows] < 8).float()}

    register("FOREGROUND", reweight=reweight, losses=lambda self, step: {})
    model = tiny_model("era", "MODEL.DISTILLER.METHODS", "('FOREGROUND',)")
    with model.detector.record() as recording:
        losses_of(model.student, batch())
    found, _ = losses_of(model, batch())
    classes = torch.cat([p.gt_classes for p in recording.proposals])
    values = nn.functional.cross_entropy(
        recording.predictions.class_logits, classes, reduction="none"
    )
    expected = values[classes < 8].sum() / len(classes)
    torch.testing.assert_close(found["loss_cls"], expected)


@pytest.mark.parametrize("name", ["loss_cls", "loss_other_term", "statistic"])
def test_a_method_cannot_touch_losses_that_are_not_its_own(name, register):
    register("MINE", losses=lambda self, step: {name: torch.zeros(())})
    with pytest.raises(ValueError, match=rf"method mine returns the loss '{name}'"):
        losses_of(tiny_model("era", "MODEL.DISTILLER.METHODS", "('MINE',)"), batch())


def test_two_detectors_are_an_error(register):
    register("MINE", detector=lambda self, student: student.detect)
    opts = ["MODEL.DISTILLER.METHODS", "('ERA', 'MINE')"]
    assert tiny_model("era", *opts).inference  # at alpha 0 ERA brings none
    with pytest.raises(UserError, match="era and mine both bring a detector"):
        tiny_model("era", *opts, "MODEL.ERA.ALPHA", "1.0")


def test_a_method_that_needs_no_teacher_runs_without_one(register):
    def losses(self, step):
        assert step.teacher is None
        return {"loss_alone_features": step.student.features["p3"].square().mean()}

    register("ALONE", losses=losses, needs=classmethod(lambda cls, cfg: Needs(teacher=False)))
    opts = ["MODEL.DISTILLER.METHODS", "('ALONE',)"]
    cfg = tiny_cfg("era", *opts)
    cfg.MODEL.TEACHER.CONFIG_FILE = ""
    model = build_model(cfg)
    assert model.teacher is None and model.methods["alone"].teacher_was is None
    found, _ = losses_of(model, batch())
    assert found["loss_alone_features"] > 0
    model.double().eval()


def test_the_step_computes_when_asked_and_once(register, monkeypatch):
    calls = []

    def losses(self, step):
        assert not calls, "nothing is computed before it is asked for"
        assert step.teacher_features is step.teacher_features
        assert step.teacher_predictions is step.teacher_predictions
        rows = len(step.student.predictions.class_logits)
        assert step.teacher_predictions.class_logits.shape == (rows, 9)
        assert not step.teacher_predictions.box_deltas.requires_grad
        return {}

    register("LOOK", losses=losses)
    model = tiny_model("era", "MODEL.DISTILLER.METHODS", "('LOOK',)")
    features = model.teacher.features
    monkeypatch.setattr(model.teacher, "features", lambda *a: calls.append(1) or features(*a))
    losses_of(model, batch())
    assert calls == [1]


def test_the_stages_of_the_bottom_up_network_are_recorded(register):
    def losses(self, step):
        shapes = step.detector.stage_shapes
        assert step.student.stages.keys() == shapes.keys() == {"res2", "res3", "res4", "res5"}
        for name, value in step.student.stages.items():
            assert value.shape[:2] == (2, shapes[name].channels) and value.requires_grad
            assert value.shape[2] == 64 // shapes[name].stride
        return {"loss_stages_sum": step.student.stages["res2"].square().mean()}

    register("STAGES", losses=losses)
    found, _ = losses_of(tiny_model("era", "MODEL.DISTILLER.METHODS", "('STAGES',)"), batch())
    assert found["loss_stages_sum"] > 0


class _Part:
    """A method that first trains a layer of its own on the teacher's maps."""

    def members():
        def losses(self, step):
            assert not step.student.features["p3"].requires_grad
            return {"loss_part_p3": self.layer(step.teacher_features["p3"]).square().mean()}

        def build(self, cfg, student, teacher):
            Method.__init__(self)
            self.layer = nn.Conv2d(16, 4, 1)

        return {
            "__init__": build,
            "losses": losses,
            "prepares": classmethod(lambda cls, cfg: True),
        }


def test_a_part_of_a_method_is_trained_alone(register):
    """The student is frozen and its losses are dropped; what is optimised is the part."""
    register("PART", **_Part.members())
    model = tiny_model("era", "MODEL.DISTILLER.METHODS", "('PART',)")
    found, _ = losses_of(model, batch())
    assert found.keys() == {"loss_part_p3"}
    found["loss_part_p3"].backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "methods.part.layer.weight",
        "methods.part.layer.bias",
    }
    assert not any(p.requires_grad for p in model.student.parameters())


def test_a_part_and_a_distilling_method_cannot_share_a_run(register):
    register("PART", **_Part.members())
    with pytest.raises(UserError, match="part trains a part of its own first in this run, and era"):
        tiny_model("era", "MODEL.DISTILLER.METHODS", "('PART', 'ERA')")


def test_keys_belong_to_their_method(register):
    def add_config(cfg):
        cfg.MODEL.MINE = CfgNode({"WEIGHT": 1.0})

    def check_config(cfg):
        raise UserError("MODEL.MINE.WEIGHT is not to its liking")

    register("MINE", add_config=staticmethod(add_config), check_config=staticmethod(check_config))
    cfg = load_config(str(TOY / "era.yaml"), ["MODEL.MINE.WEIGHT", "2.0"])
    assert cfg.MODEL.MINE.WEIGHT == 2.0 and "MINE" not in student_config(cfg).MODEL
    tiny_model("era")  # its check is not asked if the run does not use it
    with pytest.raises(UserError, match="not to its liking"):
        tiny_model("era", "MODEL.DISTILLER.METHODS", "('MINE',)")


def test_a_misspelt_method_suggests_the_nearest():
    cfg = load_config(str(TOY / "era.yaml"), ["MODEL.DISTILLER.METHODS", "['era']"])
    with pytest.raises(UserError, match=r"names 'era' \(is ERA meant\?\): expected names out of"):
        methods_of(cfg)


def test_alpha_is_a_key_of_a_method():
    cfg = load_config(str(TOY / "era.yaml"))
    set_alpha(cfg, 0.5)
    assert cfg.MODEL.ERA.ALPHA == 0.5
    plain = load_config(str(TOY / "plain.yaml"))
    with pytest.raises(UserError, match="alpha 1 needs a run of a method"):
        set_alpha(plain, 1.0)


def test_families_by_config_and_by_model():
    cfg = load_config(str(TOY / "plain.yaml"), TINY)
    assert family_of(cfg) is RCNN and RCNN.num_classes_in(cfg) == 8
    assert detector_of(build_model(cfg)).num_classes == 8
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with pytest.raises(
        UserError, match="'SemanticSegmentor': expected a detector of a known family"
    ):
        family_of(cfg)
    with pytest.raises(UserError, match="the model is a Linear"):
        detector_of(nn.Linear(1, 1))


def test_inheriting_fpn_and_heads():
    """Everything but the bottom-up network; refused where a lateral conv differs in shape."""
    same = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"]
    model = tiny_model("era", *same, "MODEL.DISTILLER.INIT_STUDENT", "fpn_and_heads")
    before = {k: v.clone() for k, v in model.student.state_dict().items()}
    model.init_student_from_teacher(fpn=True)
    teacher = model.teacher.model.state_dict()
    for key, value in model.student.state_dict().items():
        is_bottom_up = key.startswith("backbone.bottom_up.")
        expected = before if is_bottom_up or key.startswith("pixel_") else teacher
        assert torch.equal(value, expected[key]), key
    with pytest.raises(
        UserError, match=r"fpn_and_heads needs .*backbone\.fpn_lateral.*inherit the heads alone"
    ):
        tiny_model("era", "MODEL.DISTILLER.INIT_STUDENT", "fpn_and_heads")


def test_what_is_inherited_is_one_of_three():
    with pytest.raises(
        UserError, match=r"MODEL\.DISTILLER\.INIT_STUDENT is 'all': expected one of none, heads"
    ):
        tiny_model("era", "MODEL.DISTILLER.INIT_STUDENT", "all")


@pytest.mark.parametrize("value", ["True", "False"])
def test_the_old_key_names_the_new_one(value, tmp_path):
    old = tmp_path / "old.yaml"
    old.write_text(f"MODEL: {{ERA: {{TWI: {{INIT_STUDENT: {value}}}}}}}\n")
    with pytest.raises(UserError, match=r"MODEL\.DISTILLER\.INIT_STUDENT.*'heads' for True"):
        train_net(["--config-file", str(old), "OUTPUT_DIR", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_distiller_that_would_distil_nothing_is_refused():
    with pytest.raises(UserError, match=r"nothing would be distilled: name methods out of .*ERA"):
        tiny_model("era", "MODEL.DISTILLER.METHODS", "[]")


def test_a_checkpoint_of_0_1_still_fits():
    """Its keys, as version 0.1 named them: the student under ``student.``, ERA's modules under ``methods.era``."""
    model = tiny_model("era", teacher_opts=["MODEL.FPN.OUT_CHANNELS", "24"])
    own = {key for key in model.state_dict() if key.startswith("methods.")}
    branch = {
        f"branches.{i}.{name}" for i in range(4) for name in ("0.weight", "0.bias", "2.weight")
    }
    expected = {f"methods.era.estimator.mbrnet.{key}" for key in branch}
    expected |= {f"methods.era.estimator.mbrnet.up_projections.{i}.weight" for i in range(4)}
    expected |= {f"methods.era.estimator.adapter.{name}" for name in ("weight", "bias")}
    assert own == expected
    rest = {key.removeprefix("student.") for key in model.state_dict()} - own
    assert rest == set(tiny_model("plain").state_dict())
