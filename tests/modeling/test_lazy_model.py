"""Detectors of a LazyConfig as teacher and as student: trusted by name, described by keys, told in a sentence where they do
not serve."""

import copy

import pytest
import torch
from builders import TINY, batch, losses_of, tiny_cfg
from detectron2.modeling import GeneralizedRCNN, SimpleFeaturePyramid, build_model
from lazy_case import FASTER, SMALL_VIT, TRUST, VIT, under_vit, vit

from era.addresses import check_nothing_run
from era.checkpoint.writing import weights_hash
from era.config import load_config, student_config, validate_config
from era.deploy.model import refuse_python
from era.engine.launch import argument_parser
from era.engine.lazy_train import in_yaml, lazy_train_net
from era.errors import UserError
from era.modeling.detectors import family_of, known_family
from era.modeling.detectors.cascade import CascadeRCNN
from era.modeling.detectors.retinanet import RetinaNet
from era.modeling.lazy_model import dataset_names, lazy_overrides, read_lazy
from era.modeling.teacher import padding_of
from era.modeling.teacher_config import teacher_config
from era.runs.identity import settings

LEVELS = "['p3', 'p4', 'p5', 'p6']"


def read(path, opts=()):
    return read_lazy(str(path), opts, trusted=True, trust="", what="KEY")


def described(path, opts=()):
    cfg = tiny_cfg("plain")
    own = lazy_overrides(read(path, opts), str(path), opts, what="KEY")
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "LazyModel", *own])
    return cfg


# ---- the teacher --------------------------------------------------------------------------------


def test_python_is_not_run_unless_it_is_trusted(tmp_path):
    """Nothing of the file, and the sentence says what it is and which key would run it."""
    trap, left = tmp_path / "trap.py", tmp_path / "left"
    trap.write_text(f"open({str(left)!r}, 'w').close()\nmodel = dict()\n")
    cfg = tiny_cfg("era", *vit(path=trap), "MODEL.TEACHER.TRUST_PYTHON_CONFIG", "False")
    with pytest.raises(
        UserError,
        match=r"trap\.py is a LazyConfig, Python code.*MODEL\.TEACHER\.TRUST_PYTHON_CONFIG True",
    ):
        build_model(cfg)
    assert not left.exists()


@pytest.mark.parametrize("method", ["MTPD", "ERA"])
def test_a_vit_with_a_simple_feature_pyramid_teaches_an_fpn(method):
    """By MTPD's and ERA's losses of maps; gradients reach the student's backbone and nothing of the teacher."""
    own = ["MODEL.DISTILLER.METHODS", f"['{method}']", "MODEL.MTPD.LEVELS", LEVELS]
    model = under_vit(*own)
    assert isinstance(model.teacher.model.backbone, SimpleFeaturePyramid)
    before = copy.deepcopy(model.teacher.state_dict())
    losses, _ = losses_of(model, batch())
    key = f"loss_{method.lower()}_feature"
    (gradient,) = torch.autograd.grad(
        losses[key], [model.student.backbone.bottom_up.stem.conv1.weight], retain_graph=True
    )
    assert losses[key] > 0 and gradient.abs().sum() > 0
    sum(losses.values()).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())


def test_its_heads_judge_and_its_classes_are_compared():
    model = under_vit("MODEL.ERA.KD_WEIGHT", "1.0", "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", "1.0")
    losses, _ = losses_of(model, batch())
    assert {
        "loss_era_kd",
        "loss_era_twi_rpn",
        "loss_era_twi_roi",
        "loss_era_soft_roi",
    } <= losses.keys()
    found = model.teacher(batch())
    assert len(found) == 2 and all(x["instances"].pred_classes.lt(8).all() for x in found)


def test_a_vit_sees_the_square_that_it_was_trained_on():
    """The maps are those of Detectron2's own forward on the picture, padded to that square; channels are turned to RGB."""
    model = under_vit()
    teacher, inputs = model.teacher, batch((1, 1), size=(50, 75))
    assert padding_of(teacher.model.backbone) == (32, 128) and teacher.flip_channels
    images = teacher.preprocess(inputs, 64, 96)
    assert images.tensor.shape[-2:] == (128, 128)
    flipped = [{**item, "image": item["image"].flip(0)} for item in inputs]
    stock = teacher.model.preprocess_image(flipped)
    torch.testing.assert_close(images.tensor, stock.tensor)
    with torch.no_grad():
        expected = teacher.model.backbone(stock.tensor)
    like = {"p3": torch.zeros(1, 1, 4, 5)}
    found = teacher.features(inputs, like, (64, 96))
    torch.testing.assert_close(found["p3"], expected["p3"][..., :4, :5])
    assert padding_of(model.student.backbone) == (32, 0)


def test_overrides_weights_and_what_it_is(tmp_path):
    model = under_vit(lazy=["model.roi_heads.box_predictor.test_score_thresh=0.25"])
    assert model.teacher.detector.thresholds["score_threshold"] == 0.25
    path = tmp_path / "vit.pth"
    torch.save({"model": model.teacher.model.state_dict()}, path)
    again = under_vit("MODEL.TEACHER.WEIGHTS", str(path))
    assert weights_hash(again.teacher.model.state_dict()) == model.teacher.sha256
    cfgs = [
        tiny_cfg("era", *vit(lazy=own)) for own in ([], [], ["model.backbone.net.window_size=2"])
    ]
    hashes = [teacher_config(cfg).MODEL.LAZY.SHA256 for cfg in cfgs]
    assert hashes[0] == hashes[1] != hashes[2]
    # which run it is follows from what the file says of the model, not from where it lies
    assert settings(teacher_config(cfgs[0])) != settings(teacher_config(cfgs[2]))
    assert "MODEL.LAZY.CONFIG_FILE" not in settings(teacher_config(cfgs[0]))


def test_other_classes_of_a_lazyconfig_are_matched_by_name(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\nstar\n")
    model = under_vit("MODEL.TEACHER.CLASSES", str(names), lazy=["model.roi_heads.num_classes=2"])
    assert model.teacher.classes.index == (*[None] * 7, 1)
    assert torch.isfinite(sum(losses_of(model, batch())[0].values()))


def test_the_model_zoos_own_say_their_family_and_their_classes():
    """Names of the zoo; nothing is built, nothing is fetched."""
    mask = described("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    assert mask.MODEL.MASK_ON and mask.MODEL.ROI_HEADS.NUM_CLASSES == 80
    found = read("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    assert dataset_names(found, "train") == ("coco_2017_train",)
    assert dataset_names(found, "test") == ("coco_2017_val",)
    for name, family in (("cascade_rcnn", CascadeRCNN), ("retinanet", RetinaNet)):
        cfg = described(f"common/models/{name}.py")
        assert known_family(student_config(cfg)) is family
        assert family_of(student_config(cfg)).num_classes_in(student_config(cfg)) == 80


@pytest.mark.parametrize(
    "text, found",
    [
        ("raise OSError('no disk')", r"cannot be run \(OSError: no disk\)"),
        ("def", r"cannot be run \(SyntaxError"),
        ("other = dict(a=1)", "has no model to build"),
        ("model = dict(a=1)", "has no model to build"),
        ("from detectron2.config import LazyCall as L\nfrom torch import nn\nmodel = L(nn.Identity)()", "builds a Identity: expected a detector"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_one_sentence(tmp_path, text, found):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"MODEL\.TEACHER\.CONFIG_FILE .*bad\.py {found}"):
        build_model(tiny_cfg("era", *vit(path=path)))


def test_overrides_and_arguments_that_do_not_fit_are_one_sentence():
    with pytest.raises(UserError, match=r"overrides \['MODEL.DEVICE'.*expected texts such as"):
        build_model(tiny_cfg("era", *vit(), "MODEL.TEACHER.OPTS", "['MODEL.DEVICE', 'cpu']"))
    with pytest.raises(UserError, match=r"toy_vit_teacher\.py cannot be built \(\w+: "):
        under_vit(lazy=["model.backbone.net.num_heads=5", "model.backbone.in_feature=none"])
    with pytest.raises(UserError, match=r"which is neither a file"):
        under_vit(path="nowhere.py")


# ---- the student --------------------------------------------------------------------------------


def arguments(*argv):
    return argument_parser().parse_args(list(map(str, argv)))


def test_the_lazy_student_is_the_same_detector_as_the_yaml_one():
    """Weight by weight, from one seed, and its losses."""
    args = in_yaml(arguments("--config-file", FASTER))
    cfgs = [load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])]
    cfgs.append(load_config(args.config_file, ["MODEL.DEVICE", "cpu"]))
    assert [student_config(c).MODEL.META_ARCHITECTURE for c in cfgs] == [
        "LazyModel",
        "GeneralizedRCNN",
    ]
    models = [build_model(student_config(cfg)) for cfg in cfgs]
    assert type(models[0]) is GeneralizedRCNN
    models[0].load_state_dict(models[1].state_dict(), strict=True)
    torch.testing.assert_close(*(losses_of(model, batch())[0] for model in models))


def test_the_frame_becomes_a_distillers_config_and_overrides_find_their_place():
    era = FASTER.replace("toy_faster_rcnn", "toy_era")
    args = in_yaml(
        arguments("--config-file", era, "model.roi_heads.num_classes=5", "SOLVER.MAX_ITER", "7")
    )
    cfg = load_config(args.config_file, args.opts)
    assert cfg.MODEL.META_ARCHITECTURE == "Distiller" and cfg.SOLVER.MAX_ITER == 7
    assert cfg.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE == "LazyModel"
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5 and cfg.OUTPUT_DIR == "output/lazy/era"
    validate_config(cfg)
    cfg.merge_from_list([*TINY, "MODEL.TEACHER.CONFIG_FILE", VIT, "MODEL.TEACHER.OPTS", SMALL_VIT, *TRUST,
                         "MODEL.TEACHER.WEIGHTS", "", "MODEL.TEACHER.ALLOW_RANDOM", True,
                         "MODEL.DISTILLER.CLASS_MAP", "feature_only", "MODEL.DISTILLER.METHODS", ["PKD"],
                         "MODEL.PKD.LEVELS", ["p3", "p4"]])  # fmt: skip
    model = build_model(cfg)
    assert model.detector.num_classes == 5
    losses, _ = losses_of(model, batch(num_classes=5))
    assert losses["loss_pkd_feature"] > 0


def test_what_the_entry_refuses(tmp_path):
    with pytest.raises(UserError, match=r"plain\.yaml'?: expected a LazyConfig"):
        lazy_train_net(["--config-file", "configs/toy/plain.yaml"])
    path = tmp_path / "alone.py"
    path.write_text(
        "from detectron2.config import LazyCall as L\nfrom torch import nn\nmodel = L(nn.Identity)()\n"
    )
    with pytest.raises(
        UserError, match=r"says nothing of data, schedule and methods.*frame = dict"
    ):
        lazy_train_net(["--config-file", str(path)])


@pytest.mark.parametrize("key", ["MODEL.LAZY.TRUST", "MODEL.TEACHER.TRUST_PYTHON_CONFIG"])
def test_what_a_folder_says_of_trust_counts_for_nothing(key):
    """Only an override that the user typed does, and a teacher that is not built is not asked for."""
    cfg = described(FASTER)
    cfg.MODEL.LAZY.TRUST = False
    cfg.MODEL.TEACHER.CONFIG_FILE = VIT
    check_nothing_run(cfg, [], source="run/config.yaml")
    cfg.merge_from_list([key, True])
    with pytest.raises(
        UserError, match=rf"run/config\.yaml names .*\.py, Python code.*add {key} True"
    ):
        check_nothing_run(cfg, ["SEED", "1"], source="run/config.yaml")
    check_nothing_run(cfg, [key, "True"], source="run/config.yaml")
    if key == "MODEL.TEACHER.TRUST_PYTHON_CONFIG":
        check_nothing_run(cfg, [], source="run/config.yaml", teacher=False)


def test_a_folder_that_is_loaded_anywhere_names_no_code():
    cfg = described(FASTER)
    with pytest.raises(
        UserError, match=r"toy_faster_rcnn\.py, a LazyConfig.*export onnx or openvino"
    ):
        refuse_python(student_config(cfg))
    cfg.MODEL.LAZY.TRUST = False
    with pytest.raises(UserError, match=r"MODEL\.LAZY\.CONFIG_FILE .*MODEL\.LAZY\.TRUST True"):
        build_model(student_config(cfg))
