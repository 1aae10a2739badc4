"""The configs that a request becomes: for teachers of all families, as files that say the same again."""

from dataclasses import replace
from pathlib import Path

import pytest
from builders import REPO, TOY
from detectron2.modeling import build_backbone
from distil_case import make_stranger

from era.config import load_config, student_config
from era.distil import configs, timing
from era.distil.annotations import Data, Split, read_data
from era.distil.pretrained import RANDOM, Start
from era.distil.products import make_runs
from era.distil.request import argument_parser, read_request
from era.distil.students import STUDENTS, find_student, put_backbone
from era.errors import UserError

ZOO = "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
COCO_CLASSES = 80


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return make_stranger(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def data(stranger):
    return read_data((str(stranger.folder / "my.json"), str(stranger.folder / "photos")), None, 1)


def _request(stranger, *more):
    pair = ["--data", stranger.folder / "my.json", stranger.folder / "photos"]
    args = map(str, [*pair, "--formats", "none", "--num-gpus", "0", *more])
    return read_request(argument_parser().parse_args(list(args)))


def _made(stranger, data, *more):
    request = _request(stranger, *more)
    pretrained = Start("ImageNet", find_student(request.student).weights)
    start = pretrained if request.student == "r50" else RANDOM
    chosen = configs.settle(request, data, start, memory_gib=None, workers=0)
    return configs.make_configs(request, data, chosen, Path("/out")), chosen


def test_a_zoo_teacher_is_fine_tuned_and_teaches_a_student_of_its_own_form(stranger, data):
    made, chosen = _made(stranger, data, "--baseline")
    assert list(made) == ["teacher", "plain", "distilled"] and chosen.fine_tune
    assert chosen.why["teacher"] == "its 80 classes are not the 8 of the data"
    teacher, plain, distilled = made.values()
    assert teacher.MODEL.WEIGHTS.endswith(
        "faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl"
    )
    assert teacher.MODEL.RESNETS.DEPTH == 101 and teacher.MODEL.RESNETS.NORM == "FrozenBN"
    assert distilled.MODEL.RESNETS.DEPTH == 18 and distilled.MODEL.RESNETS.NORM == "BN"
    assert distilled.MODEL.WEIGHTS == "" and distilled.MODEL.BACKBONE.FREEZE_AT == 0
    for cfg in made.values():
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 8 and not cfg.MODEL.MASK_ON
        assert [list(s) for s in chosen.anchors.sizes] == cfg.MODEL.ANCHOR_GENERATOR.SIZES
        assert cfg.MODEL.DEVICE == "cpu" and cfg.SEED == 1
        # What the issue asks for of every training here, and not of the COCO recipes.
        assert cfg.MODEL.EMA.ENABLED and cfg.TEST.LOSS and cfg.TEST.LEAVE_BEST
        assert cfg.TEST.PATIENCE > 0 and cfg.TEST.EVAL_PERIOD > 0
    assert plain.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    keys = distilled.MODEL.TEACHER
    assert (keys.CONFIG_FILE, keys.WEIGHTS) == (
        "/out/teacher.yaml",
        "/out/teacher/student/model_final.pth",
    )
    assert distilled.MODEL.DISTILLER.INIT_STUDENT == "heads" and distilled.TEST.EVAL_TEACHER
    alike = student_config(distilled)
    assert alike.MODEL == student_config(plain).MODEL
    assert alike.MODEL.RPN == student_config(teacher).MODEL.RPN


@pytest.mark.parametrize(
    ("teacher", "student", "builder", "levels"),
    [
        (str(REPO / "configs" / "retinanet_teacher_r101.yaml"), "r50", "build_retinanet_resnet_fpn_backbone", "p3 p4 p5 p6 p7"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml", "r18", "build_resnet_fpn_backbone", "p2 p3 p4 p5 p6"),
        ("COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml", "r50", "build_resnet_fpn_backbone", "p2 p3 p4 p5 p6"),
        (str(TOY / "fcos_teacher.yaml"), "toy", "build_small_fcos_resnet_fpn_backbone", "p3 p4 p5 p6 p7"),
    ],
)  # fmt: skip
def test_students_take_the_form_of_their_teacher(stranger, data, teacher, student, builder, levels):
    weights = ["--teacher-weights", stranger.teacher / "teacher.pth"]
    made, chosen = _made(stranger, data, "--teacher", teacher, "--student", student, *weights)
    cfg = made["distilled"]
    assert builder == cfg.MODEL.BACKBONE.NAME and levels.split() == _levels(cfg)
    assert (chosen.anchors is None) == ("fcos" in teacher)
    resnets = cfg.MODEL.RESNETS  # nothing is left of a ResNeXt
    assert (resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP, resnets.STRIDE_IN_1X1) == (1, 64, True)
    assert cfg.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE == made["teacher"].MODEL.META_ARCHITECTURE
    if "retinanet" in teacher:
        assert (
            len(cfg.MODEL.ANCHOR_GENERATOR.SIZES[0]) == 3 and cfg.MODEL.RETINANET.NUM_CLASSES == 8
        )
        assert pytest.approx(0.01 * cfg.SOLVER.IMS_PER_BATCH / 16) == cfg.SOLVER.BASE_LR


def _levels(cfg):
    """Of the one method that is there."""
    (name,) = cfg.MODEL.DISTILLER.METHODS
    return list(cfg.MODEL[name.upper()].LEVELS)


def test_methods_get_the_levels_that_they_are_meant_for(stranger, data):
    made, _ = _made(stranger, data, "--method", "PKD", "CWD")
    keys = made["distilled"].MODEL
    assert tuple(keys.DISTILLER.METHODS) == ("PKD", "CWD")
    assert list(keys.PKD.LEVELS) == ["p2", "p3", "p4", "p5"] and len(keys.CWD.LEVELS) == 5


def test_masks_are_trained_where_every_object_has_polygons(stranger, data):
    mask = ["--teacher", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"]
    assert not _made(stranger, data, *mask)[0]["distilled"].MODEL.MASK_ON
    made, chosen = _made(stranger, replace(data, has_masks=True), *mask)
    assert made["distilled"].MODEL.MASK_ON and chosen.why["masks"] == "every object has polygons"


def test_a_written_config_says_the_same_again(stranger, data, tmp_path):
    for name, cfg in _made(stranger, data, "--baseline")[0].items():
        configs.write_config(cfg, tmp_path / f"{name}.yaml")
        assert load_config(str(tmp_path / f"{name}.yaml")).dump() == cfg.dump()
        text = (tmp_path / f"{name}.yaml").read_text()
        assert f"train --config-file {tmp_path / name}.yaml --resume" in text
        assert len(text.splitlines()) < 90  # what differs from the defaults alone


def test_overrides_have_the_last_word(stranger, data):
    made, chosen = _made(
        stranger, data, "--opts", "SOLVER.MAX_ITER", "7", "SOLVER.BASE_LR", "0.5",
        "--teacher-opts", "SOLVER.MAX_ITER", "3", "MODEL.RPN.NMS_THRESH", "0.6",
    )  # fmt: skip
    assert chosen.iterations == {"teacher": 3, "distilled": 7}
    assert made["distilled"].SOLVER.BASE_LR == 0.5 and made["teacher"].MODEL.RPN.NMS_THRESH == 0.6
    assert made["distilled"].MODEL.RPN.NMS_THRESH == 0.7


def test_the_given_time_sets_the_schedules(stranger, data):
    request = _request(stranger, "--time", "2h")
    chosen = configs.settle(request, data, RANDOM, memory_gib=None, workers=0)
    assert chosen.iterations == {"teacher": 500, "distilled": 2000}
    times = {"teacher": timing.Times(2.0, 0.1), "distilled": timing.Times(2.0, 0.1)}
    found, seconds = timing.schedule(request, data, chosen, times)
    assert 0.9 * 7200 < sum(seconds.values()) <= 7200
    assert found.iterations["distilled"] == pytest.approx(4 * found.iterations["teacher"], rel=0.01)
    assert found.iterations["distilled"] > 2000
    with pytest.raises(UserError, match="--time is 2 min, too short"):
        timing.schedule(replace(request, seconds=120.0), data, chosen, times)


@pytest.mark.parametrize("name", STUDENTS)
def test_every_short_name_puts_a_backbone_into_a_zoo_config(name):
    cfg = load_config(ZOO)
    put_backbone(cfg, name)
    assert cfg.MODEL.WEIGHTS == "" and cfg.INPUT.FORMAT == "BGR"
    assert len(build_backbone(cfg).output_shape()) == 5


def test_a_teacher_of_the_same_classes_stays_as_it_is(stranger, data):
    names = [c["name"] for c in data.train.content["categories"]]
    renamed = {"categories": [
        c | {"name": n.removeprefix("my ")}
        for c, n in zip(data.train.content["categories"], names, strict=True)
    ]}  # fmt: skip
    same = Data(Split(data.train.content | renamed, data.train.images), data.val, 1, False, {})
    own = [
        "--teacher",
        stranger.teacher / "teacher.yaml",
        "--teacher-weights",
        stranger.teacher / "teacher.pth",
    ]
    made, chosen = _made(stranger, same, *own, "--student", "toy")
    assert not chosen.fine_tune and list(made) == ["distilled"]
    assert str(stranger.teacher / "teacher.yaml") == made["distilled"].MODEL.TEACHER.CONFIG_FILE
    assert made["distilled"].MODEL.ANCHOR_GENERATOR.SIZES == [[24], [36], [52], [76]]


def test_runs_are_ordinary_commands_of_train_net(stranger, data, tmp_path):
    for name, cfg in _made(stranger, data)[0].items():
        configs.write_config(cfg, tmp_path / f"{name}.yaml")
    teacher, distilled, best = make_runs(["teacher", "distilled"], tmp_path, 2, ("ERA",))
    assert distilled.command[1:] == (
        "-u", "-m", "era", "train", "--num-gpus", "2", "--config-file", str(tmp_path / "distilled.yaml"),
    )  # fmt: skip
    assert (
        teacher.is_teacher and distilled.depends_on == ("teacher",) and distilled.iterations == 2000
    )
    assert best.evaluates == "distilled" and best.iterations == 0 and "--eval-only" in best.command
    assert best.folder == tmp_path / "distilled" / "best"
