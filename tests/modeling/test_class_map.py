"""Classes by name: what is matched, how a teacher's class layers are read through the map, what is refused."""

import json

import pytest
import torch
from builders import MASKS, batch, losses_of, tiny_cfg, tiny_model
from classes_case import ALL, INDEX, NAMES, SHARED, distiller, names_file, options
from detectron2.modeling import build_model

from era.config import student_config, validate_config
from era.errors import UserError
from era.modeling.class_map import class_map, names_of, read_names
from era.modeling.detectors import detector_of

TOY = ("disk", "ring", "crescent", "square", "cross", "pentagon", "hexagon", "star")


def mapped(student, teacher, mode="auto"):
    return class_map(mode, student, teacher, (len(student), len(teacher)), source="t.yaml")


def test_names_match_as_they_are_then_without_case_and_dashes():
    found = mapped(
        ("traffic light", "Cat", "dog", "zebra"),
        ("cat", "Cat", "TRAFFIC_light", "hot-dog", "zebra"),
    )
    assert found.index == (2, 1, None, 4)
    assert found.unknown == ["dog"]
    rows = [line.split("  ") for line in found.table().splitlines()]
    assert rows[2][0] == "traffic light (0)" and "TRAFFIC_light (2)" in found.table()
    assert "ground truth and features alone" in rows[4][-1] and "2 more" in found.table()


def test_what_is_called_alike_twice_is_not_guessed():
    assert mapped(("CAT", "dog"), ("cat", "Cat", "dog")).index == (None, 2)
    assert mapped(("Cat", "cat"), ("cat", "x")).index == (None, 0)


def test_without_names_equal_numbers_are_equal_classes():
    assert class_map("auto", None, TOY, (8, 8), source="t").index == tuple(range(8))
    with pytest.raises(UserError, match=r"8 classes and the teacher 80.*MODEL\.TEACHER\.CLASSES"):
        class_map("auto", TOY, None, (8, 80), source="t")


def test_exact_wants_the_same_names_in_the_same_order():
    assert mapped(TOY, TOY, "exact").index == tuple(range(8))
    with pytest.raises(UserError, match="class 1 is 'ring' in the student and 'cat'"):
        mapped(TOY[:2], ("disk", "cat"), "exact")
    with pytest.raises(UserError, match="class 2 is 'crescent' in the student and absent"):
        mapped(TOY[:3], TOY[:2], "exact")


def test_names_that_match_nothing_are_one_sentence():
    with pytest.raises(
        UserError, match=r"none of the student's classes \(disk, ring.*and 3 more\)"
    ):
        mapped(TOY, ("cat", "dog"))


def test_a_coco_teacher_is_known_by_its_config():
    """The built-in metadata, without any file of COCO."""
    cfg = tiny_cfg(teacher_opts=[])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ()
    names = names_of(cfg, 80)
    assert names[0] == "person" and len(names) == 80
    assert names_of(cfg, 3) is None
    found = class_map("auto", ("traffic_light", "kite", "tree"), names, (3, 80), source="coco")
    assert [names[i] for i in found.index[:2]] == ["traffic light", "kite"] and found.index[
        2
    ] is None


def test_names_come_from_files_of_every_form(tmp_path):
    coco = {"categories": [{"id": 7, "name": "b"}, {"id": 2, "name": "a"}]}
    for name, text in (
        ("x.txt", "a\n\nb\n"),
        ("x.json", '["a", "b"]'),
        ("y.json", json.dumps(coco)),
    ):
        (tmp_path / name).write_text(text)
        assert read_names(str(tmp_path / name), "KEY") == ("a", "b")
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN = ("mine",)
    cfg.DATASETS.COCO_FORMAT = [["mine", str(tmp_path / "y.json"), str(tmp_path)]]
    assert names_of(cfg, 2) == ("a", "b")
    # what a teacher's config says of data that is not here is not asked for more than names
    cfg.DATASETS.COCO_FORMAT = [
        3,
        ["mine"],
        ["mine", 1, 2],
        ["mine", str(tmp_path / "none.json"), ""],
    ]
    assert names_of(cfg, 2) is None
    (tmp_path / "none.json").write_text('{"categories": [{"id": 1}]}')
    assert names_of(cfg, 2) is None
    for text in ('{"categories": 3}', "[1]", "{", '"a"'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=r"KEY .*bad\.json cannot be read"):
            read_names(str(tmp_path / "bad.json"), "KEY")


@pytest.mark.parametrize(
    "names, found", [(NAMES[:4], "4 names"), (("a", "a", "b", "c", "d"), "'a' twice")]
)
def test_a_file_of_names_must_fit_the_teacher(tmp_path, names, found):
    own, _ = options(tmp_path, names)
    with pytest.raises(UserError, match=rf"MODEL\.TEACHER\.CLASSES .* has .*{found}.*5 classes"):
        tiny_model("era", *own, teacher_opts=["MODEL.ROI_HEADS.NUM_CLASSES", 5])


# ---- the class layers, read through the map -------------------------------------------------------


def built(config, count, *opts):
    key = {"retinanet": "MODEL.RETINANET.NUM_CLASSES", "fcos": "MODEL.FCOS.NUM_CLASSES"}
    own = [key.get(config.split("_")[0], "MODEL.ROI_HEADS.NUM_CLASSES"), count]
    torch.manual_seed(1)
    return build_model(student_config(tiny_cfg(config, *own, *opts)))


def said(model, inputs):
    """What the heads say on the model's own maps of a recorded step, and that step."""
    detector = detector_of(model)
    with detector.record() as recording:
        losses_of(model, inputs)
    return detector.predict(recording.features, recording.samples), recording


@pytest.mark.parametrize("config", ["plain", "cascade_plain", "retinanet_plain", "fcos_plain"])
def test_logits_and_boxes_are_those_of_the_teachers_own_rows(config):
    """Softmax over the shared classes and background equals that of the old logits without the other columns."""
    model = built(config, 5)
    before, recording = said(model, batch((2, 1), num_classes=5))
    detector = detector_of(model)
    detector.read_classes(INDEX)
    assert detector.num_classes == 8 and detector.num_known_classes == 3
    with torch.no_grad():
        after = detector.predict(recording.features, recording.samples)
    old = [INDEX[i] for i in SHARED]
    has_background = before.class_logits.shape[1] == 6
    columns = [*SHARED, 8] if has_background else SHARED
    torch.testing.assert_close(
        after.class_logits[:, columns], before.class_logits[:, [*old, 5] if has_background else old]
    )
    if has_background:
        expected = before.class_logits[:, [*old, 5]].softmax(1)
        probabilities = after.class_logits.softmax(1)
        torch.testing.assert_close(probabilities[:, columns], expected)
        assert probabilities[:, 2:7].max() == 0
    else:
        assert after.class_logits.sigmoid()[:, 2:7].max() == 0
    if before.box_deltas.shape[1] == 20:  # boxes by class
        own, other = (x.box_deltas.unflatten(1, (-1, 4)) for x in (after, before))
        torch.testing.assert_close(own[:, SHARED], other[:, old])
    else:
        torch.testing.assert_close(after.box_deltas, before.box_deltas)


def test_what_a_teacher_knows_is_asked_of_labels():
    """Background, and what does not count, are no class that could be unknown."""
    detector = detector_of(built("plain", 5))
    detector.read_classes((None, 0, 3))
    assert detector.knows(torch.tensor([-1, 0, 1, 2, 3])).tolist() == [
        True,
        False,
        True,
        True,
        True,
    ]
    logits = torch.arange(20.0).view(5, 4)
    classes = torch.tensor([3, 0, 1, 2, 3])
    assert detector.shared_logits(logits, classes).tolist() == [
        [x + 1, x + 2, x + 3] for x in (0, 8, 12, 16)
    ]
    assert detector.shared_labels(classes).tolist() == [2, 0, 1, 2]


def test_masks_are_read_by_class_too():
    model = built("plain", 5, *MASKS).eval()
    weight = model.roi_heads.mask_head.predictor.weight.detach().clone()
    detector_of(model).read_classes(INDEX)
    found = model.roi_heads.mask_head.predictor.weight
    assert torch.equal(found[SHARED], weight[[4, 2, 0]]) and found.shape[0] == 8
    detections = model([{"image": torch.rand(3, 64, 64) * 255, "height": 64, "width": 64}])
    assert set(detections[0]["instances"].pred_classes.tolist()) <= set(SHARED)


def test_a_teacher_of_all_classes_in_another_order_serves_as_one_in_the_students(tmp_path):
    """Everything: judges, inheritance, blended inference, evaluation; no class is unknown."""
    keys = [
        "MODEL.ERA.ALPHA",
        "0.5",
        "MODEL.DISTILLER.INIT_STUDENT",
        "heads",
        "MODEL.ERA.KD_WEIGHT",
        "1.0",
    ]
    alike = ["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
    model = distiller(tmp_path, *keys, names=ALL, teacher_opts=alike)
    teacher = model.teacher.detector
    assert teacher.known_classes is None and teacher.num_classes == 8
    model.init_student_from_teacher()
    own, other = (
        x.model.roi_heads.box_predictor.cls_score.weight for x in (model.detector, teacher)
    )
    assert torch.equal(own, other)
    losses, _ = losses_of(model, batch())
    assert torch.isfinite(sum(losses.values())) and losses["loss_era_kd"] >= 0
    model.eval()
    with torch.no_grad():
        found = model(batch())
    assert all(x["instances"].pred_classes.lt(8).all() for x in found)


def test_inheritance_leaves_the_students_own_where_the_teacher_knows_nothing(tmp_path):
    model = distiller(tmp_path, "MODEL.DISTILLER.INIT_STUDENT", "heads")
    own, other = (x.model.roi_heads.box_predictor for x in (model.detector, model.teacher.detector))
    before = own.cls_score.weight.detach().clone(), own.bbox_pred.weight.detach().clone()
    model.init_student_from_teacher()
    kept, taken = list(range(2, 7)), [*SHARED, 8]
    assert torch.equal(own.cls_score.weight[kept], before[0][kept])
    assert torch.equal(own.cls_score.weight[taken], other.cls_score.weight[taken])
    boxes = own.bbox_pred.weight.unflatten(0, (8, 4))
    assert torch.equal(boxes[kept], before[1].unflatten(0, (8, 4))[kept])
    assert torch.equal(boxes[SHARED], other.bbox_pred.weight.unflatten(0, (8, 4))[SHARED])
    assert own.cls_score.bias.min() > -1


def test_the_teacher_detects_what_it_knows_by_the_students_numbers(tmp_path):
    model = distiller(tmp_path)
    found = model.teacher(batch((0, 0)))
    classes = torch.cat([x["instances"].pred_classes for x in found])
    assert len(classes) > 0 and set(classes.tolist()) <= set(SHARED)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts, needs",
    [
        (["MODEL.ERA.ALPHA", "1.0"], r"MODEL\.ERA\.ALPHA 1\.0"),
        (["MODEL.DISTILLER.METHODS", "['RDD']"], r"MODEL\.RDD\.REWEIGHT"),
        (["MODEL.DISTILLER.METHODS", "['R2KD']", "MODEL.R2KD.FINE_TUNE", "True"], "FINE_TUNE"),
        (["MODEL.DISTILLER.METHODS", "['ResidualKD']", "MODEL.RESIDUALKD.ALPHA", "1.0", "MODEL.RESIDUALKD.LEVELS", "['p3', 'p4', 'p5', 'p6']"], r"ALPHA 1\.0"),
    ],
)  # fmt: skip
def test_what_needs_every_class_is_refused_by_name(tmp_path, opts, needs):
    with pytest.raises(
        UserError, match=rf"{needs}.*needs a teacher that knows every class.*crescent"
    ):
        distiller(tmp_path, *opts)


def test_heads_of_a_form_that_is_not_known_are_refused():
    model = built("plain", 5)
    model.roi_heads.box_predictor.use_fed_loss = True
    with pytest.raises(
        UserError, match=r"has MODEL\.ROI_BOX_HEAD\.USE_FED_LOSS True.*TEACHER\.OPTS"
    ):
        detector_of(model).read_classes(INDEX)
    model = built("plain", 5, *MASKS)
    del model.roi_heads.mask_head.predictor
    with pytest.raises(UserError, match=r"a MaskRCNNConvUpsampleHead for masks.*feature_only"):
        detector_of(model).read_classes(INDEX)


LEVELS = ["MODEL.PKD.LEVELS", "['p3', 'p4', 'p5', 'p6']"]
PKD = ["MODEL.DISTILLER.METHODS", "['PKD']", *LEVELS]
FEATURES = ["MODEL.DISTILLER.CLASS_MAP", "feature_only", *PKD]


def test_feature_only_takes_a_teacher_of_any_classes(tmp_path):
    """Without names, and the teacher is left as it is; losses are those of maps alone."""
    model = tiny_model("era", *FEATURES, teacher_opts=["MODEL.ROI_HEADS.NUM_CLASSES", 3])
    assert model.teacher.detector.num_classes == 3 and model.teacher.classes is None
    alike = tiny_model("era", *PKD)
    assert losses_of(model, batch())[0].keys() == losses_of(alike, batch())[0].keys()


@pytest.mark.parametrize(
    "opts, found",
    [
        (["MODEL.DISTILLER.METHODS", "['ERA']"], "the method era with these settings reads"),
        (["MODEL.DISTILLER.METHODS", "['PKD', 'KD']"], "the method kd "),
        (["MODEL.DISTILLER.INIT_STUDENT", "heads"], "INIT_STUDENT heads takes"),
        (["TEST.EVAL_TEACHER", "True"], "EVAL_TEACHER has the teacher detect"),
        (["DATASETS.UNLABELED", "('era_toy_val',)", "SOLVER.UNLABELED_PER_BATCH", "1"], "DATASETS.UNLABELED has"),
    ],
)  # fmt: skip
def test_feature_only_refuses_what_reads_heads(opts, found):
    with pytest.raises(UserError, match=f"feature_only, and .*{found}"):
        validate_config(tiny_cfg("era", *FEATURES, *opts))


def test_era_on_feature_maps_alone_serves_it():
    off = [
        "MODEL.ERA.TWI.RPN_WEIGHT",
        "0.0",
        "MODEL.ERA.TWI.ROI_WEIGHT",
        "0.0",
        "MODEL.DISTILLER.METHODS",
        "['ERA']",
    ]
    model = tiny_model("era", *FEATURES, *off, teacher_opts=["MODEL.ROI_HEADS.NUM_CLASSES", 3])
    losses, _ = losses_of(model, batch())
    assert {k for k in losses if "era" in k} == {"loss_era_feature", "loss_era_residual"}


def test_an_unknown_mode_is_one_sentence(tmp_path):
    with pytest.raises(
        UserError, match=r"CLASS_MAP is 'fuzzy': expected one of auto, exact, feature_only"
    ):
        validate_config(tiny_cfg("era", "MODEL.DISTILLER.CLASS_MAP", "fuzzy"))
    assert names_file(tmp_path)
