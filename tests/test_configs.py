"""Every config in the tree can be set up, and says what it is meant to say."""

import re

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
        if cfg.MODEL.RESNETS.DEPTH in (18, 34):  # basic blocks have one width
            cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
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


# The pairs of docs/pairs.md: what is distilled, its plain baseline, and depth or name of the two backbones.
PAIRS = [
    ("era_r101_r50", "plain_r50", 101, 50),
    ("era_r101_r18", "plain_r18", 101, 18),
    ("era_r50_mv2", "plain_mv2", 50, "build_mobilenetv2_fpn_backbone"),
    ("era_r50_mv2_8", "plain_mv2_8", 50, "build_mobilenetv2_fpn_backbone"),
    ("cascade_era_x101_r50", "plain_r50", 101, 50),
    ("retinanet_era_r101_r50", "retinanet_plain_r50", 101, 50),
    ("mask_era_r101_r50", "mask_plain_r50", 101, 50),
]


def inherited_baseline(distilled, baseline):
    """The baseline of a pair whose student inherits heads."""
    return f"{'cascade_x101_' * distilled.startswith('cascade_era_x101')}{baseline}_init"


@pytest.mark.parametrize("distilled, baseline, teacher, student", PAIRS, ids=[p[0] for p in PAIRS])
def test_every_pair_has_its_baseline_and_its_inherited_form(distilled, baseline, teacher, student):
    def load(name):
        return load_config(str(REPO / "configs" / f"{name}.yaml"))

    pair, inherited = load(distilled), load(f"{distilled}_init")
    start = load(inherited_baseline(distilled, baseline))
    assert pair.MODEL.DISTILLER.METHODS == inherited.MODEL.DISTILLER.METHODS == ("ERA",)
    assert list(start.MODEL.DISTILLER.METHODS) == []
    ways = [c.MODEL.DISTILLER.INIT_STUDENT for c in (pair, inherited, start)]
    assert ways == ["none", "heads", "heads"]
    plain = load(baseline)
    students = [student_config(c) for c in (plain, pair, inherited, start)]
    folders = {c.OUTPUT_DIR for c in students}
    assert len(folders) == 4
    for cfg in students:
        cfg.OUTPUT_DIR = ""
        if "cascade" in distilled:  # whose first stage can start a head of its own form alone
            cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
        assert cfg == students[0]
    backbone = plain.MODEL.BACKBONE.NAME if isinstance(student, str) else plain.MODEL.RESNETS.DEPTH
    assert backbone == student
    path = pair.MODEL.TEACHER.CONFIG_FILE
    if "/" in path and not path.startswith("configs/"):
        path = model_zoo.get_config_file(path)
        url = model_zoo.get_checkpoint_url(pair.MODEL.TEACHER.CONFIG_FILE)
        assert f"detectron2://{url.split('/detectron2/')[1]}" == pair.MODEL.TEACHER.WEIGHTS
    assert (
        teacher
        == load_config(path if path.startswith("/") else str(REPO / path)).MODEL.RESNETS.DEPTH
    )


def test_schedules_of_the_pairs():
    """16 images for 90k iterations, or ReviewKD's 8 for 180k: as many pictures, as large a step for a picture."""
    for distilled, baseline, *_ in PAIRS:
        solver = load_config(str(REPO / "configs" / f"{baseline}.yaml")).SOLVER
        assert solver.IMS_PER_BATCH * solver.MAX_ITER == 16 * 90000
        rate = 0.01 if "retinanet" in distilled else 0.02
        assert pytest.approx(rate / 16) == solver.BASE_LR / solver.IMS_PER_BATCH
        assert [s / solver.MAX_ITER for s in solver.STEPS] == pytest.approx([2 / 3, 8 / 9])
    assert load_config(str(REPO / "configs" / "era_r50_mv2_8.yaml")).SOLVER.IMS_PER_BATCH == 8


def test_the_page_of_the_pairs_names_their_configs():
    page = (REPO / "docs" / "pairs.md").read_text(encoding="utf-8")
    for distilled, baseline, *_ in PAIRS:
        wanted = (distilled, baseline, f"{distilled}_init", inherited_baseline(distilled, baseline))
        for name in wanted:
            assert f"`{name}`" in page, name
    named = set(re.findall(r"`((?:era|plain|cascade|retinanet|mask)_\w+)`", page))
    assert named and all((REPO / "configs" / f"{name}.yaml").is_file() for name in named)


def test_there_are_configs():
    assert len(CONFIGS) >= 9


@pytest.mark.parametrize(
    "distilled, baseline",
    [
        ("toy/era", "toy/plain"),
        ("toy/era_init", "toy/plain_init"),
        ("toy/mask_era", "toy/mask_plain"),
        ("fcos_era_r101_r50", "fcos_plain_r50"),
        ("toy/retinanet_era", "toy/retinanet_plain"),
        ("toy/fcos_era", "toy/fcos_plain"),
        ("toy/era_mv2", "toy/plain_mv2"),
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
