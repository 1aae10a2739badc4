"""Every config in the tree can be set up, and says what it is meant to say."""

import pytest
from builders import REPO
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from era.config import load_config, student_config, validate_config
from era.errors import UserError
from era.registry import forget_parts

CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))
# Narrow the COCO models: their depth and names stay, their weights shrink to what a test can hold.
NARROW = [
    "MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.FPN.OUT_CHANNELS", "32",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "16",
]  # fmt: skip


def ident(path):
    return str(path.relative_to(REPO / "configs"))


@pytest.mark.parametrize("path", CONFIGS, ids=ident)
def test_every_config_builds_its_model(path, monkeypatch):
    monkeypatch.chdir(
        REPO
    )  # configs name the toy teacher's config from the root, where users start
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    if not {"toy", "trees"} & set(path.parts):
        cfg.merge_from_list(NARROW)
        cfg.MODEL.TEACHER.OPTS = NARROW
    cfg.MODEL.TEACHER.WEIGHTS = ""
    cfg.MODEL.TEACHER.ALLOW_RANDOM = True
    forget_parts(cfg)
    validate_config(cfg)
    model = build_model(cfg)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    family = path.stem.split("_")[0]
    expected = {"retinanet": "RetinaNet", "fcos": "FCOS"}.get(family, "GeneralizedRCNN")
    assert expected == student_config(cfg).MODEL.META_ARCHITECTURE


def test_there_are_configs():
    assert len(CONFIGS) >= 9


@pytest.mark.parametrize(
    "distilled, baseline",
    [
        ("era_r101_r50", "plain_r50"),
        ("era_r101_r50_init", "plain_r50_init"),
        ("toy/era", "toy/plain"),
        ("toy/era_init", "toy/plain_init"),
        ("mask_era_r101_r50", "mask_plain_r50"),
        ("toy/mask_era", "toy/mask_plain"),
        ("retinanet_era_r101_r50", "retinanet_plain_r50"),
        ("fcos_era_r101_r50", "fcos_plain_r50"),
        ("toy/retinanet_era", "toy/retinanet_plain"),
        ("toy/fcos_era", "toy/fcos_plain"),
        ("trees/era", "trees/plain"),
        ("trees/methods/pkd", "trees/plain"),
    ],
)
def test_baseline_and_distilled_student_differ_in_distillation_alone(distilled, baseline):
    a, b = (load_config(str(REPO / "configs" / f"{n}.yaml")) for n in (distilled, baseline))
    for cfg in (a, b):
        cfg.OUTPUT_DIR = ""
    assert student_config(a) == student_config(b)
    if b.MODEL.META_ARCHITECTURE == "Distiller":
        assert a.MODEL.DISTILLER.INIT_STUDENT == b.MODEL.DISTILLER.INIT_STUDENT == "heads"


def test_the_retinanets_are_those_of_the_model_zoo():
    """The zoo's own files have their anchors computed by code, which is not run."""
    cfg = load_config(str(REPO / "configs" / "retinanet_era_r101_r50.yaml"))
    zoo = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    url = model_zoo.get_checkpoint_url(zoo).split("/detectron2/")[1]
    assert f"detectron2://{url}" == cfg.MODEL.TEACHER.WEIGHTS
    for own, other in (
        (load_config(str(REPO / cfg.MODEL.TEACHER.CONFIG_FILE)), zoo),
        (cfg, "COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
    ):
        stock, own = get_cfg(), student_config(own)
        stock.merge_from_file(model_zoo.get_config_file(other), allow_unsafe=True)
        own.OUTPUT_DIR = own.MODEL.MASK_ON = stock.OUTPUT_DIR = stock.MODEL.MASK_ON = None
        for node in ("MODEL", "INPUT", "DATASETS"):
            assert own[node] == stock[node], node
        for key in ("BASE_LR", "STEPS", "MAX_ITER", "IMS_PER_BATCH", "WARMUP_ITERS"):
            assert own.SOLVER[key] == stock.SOLVER[key], key
    with pytest.raises(UserError, match=r"code in it is never run.*retinanet_teacher_r101\.yaml"):
        load_config(zoo)


def test_the_flagship_follows_its_recipe():
    cfg = load_config(str(REPO / "configs" / "era_r101_r50.yaml"))
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (16, 90000)
    assert "R_101_FPN_3x" in cfg.MODEL.TEACHER.CONFIG_FILE and "R-50.pkl" in cfg.MODEL.WEIGHTS
    assert cfg.MODEL.RESNETS.DEPTH == 50 and cfg.DATASETS.TRAIN == ("coco_2017_train",)
