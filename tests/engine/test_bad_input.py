"""Every user's mistake is one clear sentence, leaves status 2, and writes nothing."""

import json
import re

import pytest
import torch
from builders import REPO, TINY, TINY_TEACHER, run_tool, tiny_model
from PIL import Image

from era.engine.launch import train_net
from era.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("files")
    weights = tiny_model().teacher.model.state_dict()
    torch.save({"model": weights}, folder / "teacher.pth")
    lacking = {k: v for k, v in weights.items() if "cls_score" not in k}
    torch.save({"model": lacking}, folder / "lacking.pth")
    misshapen = {k: v[:5] if "cls_score" in k else v for k, v in weights.items()}
    torch.save({"model": misshapen}, folder / "misshapen.pth")
    (folder / "noise.pth").write_bytes(b"this is no checkpoint")
    (folder / "noise.json").write_text("[1, 2")
    (folder / "list.json").write_text("[1, 2]")
    for name in ("images", "broken", "photos"):
        (folder / name).mkdir()
    (folder / "broken" / "a.jpg").write_bytes(b"this is no picture")
    Image.new("RGB", (40, 30)).save(folder / "photos" / "a.png")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    coco = {
        "images": [{"id": 1, "file_name": "absent.jpg", "height": 9, "width": 9}],
        "annotations": [box],
        "categories": [{"id": i, "name": f"c{i}"} for i in range(1, 9)],
    }
    (folder / "no_image.json").write_text(json.dumps(coco))
    (folder / "bad.yaml").write_text("MODEL: {ERA: {NO_SUCH_KEY: 1}}")
    (folder / "evil.yaml").write_text("OUTPUT_DIR: !!python/object/apply:os.getcwd []")
    (folder / "empty.yaml").write_text("")
    (folder / "circle.yaml").write_text("_BASE_: circle.yaml")
    (folder / "a_file").write_text("in the way")
    return folder


def teacher(*opts):
    """Further overrides of the tiny teacher."""
    return ["MODEL.TEACHER.OPTS", str([*TINY_TEACHER, *opts])]


def own_data(annotations):
    return ["DATASETS.COCO_FORMAT", f"[['own_{annotations}', 'FILES/{annotations}', 'FILES/images']]",
            "DATASETS.TRAIN", f"('own_{annotations}',)"]  # fmt: skip


def without_labels(*opts, names=("era_toy_tune",), count=1):
    return ["DATASETS.UNLABELED", str(names), "SOLVER.UNLABELED_PER_BATCH", count, *opts]


def photos(folder, *opts, name=""):
    name = name or f"own_{folder}"
    folders = ["DATASETS.IMAGE_FOLDERS", f"[['{name}', 'FILES/{folder}']]"]
    return without_labels(*folders, *opts, names=(name,))


# what is wrong: (overrides, words of the sentence); FILES stands for the folder above
CASES = {
    "teacher weights absent": (
        ["MODEL.TEACHER.WEIGHTS", "FILES/nowhere.pth"], ["weights", "nowhere.pth", "correct the path"]),
    "teacher weights unreachable": (
        ["MODEL.TEACHER.WEIGHTS", "https://127.0.0.1:9/w.pth"], ["127.0.0.1:9/w.pth", "reachable"]),
    "teacher weights of no checkpoint": (
        ["MODEL.TEACHER.WEIGHTS", "FILES/noise.pth"], ["noise.pth", "cannot be read"]),
    "teacher of another architecture": (
        ["MODEL.TEACHER.WEIGHTS", "FILES/teacher.pth", "MODEL.TEACHER.OPTS", "[]"],
        ["MODEL.TEACHER.WEIGHTS", "does not fit"]),
    "teacher weights with a missing key": (
        ["MODEL.TEACHER.WEIGHTS", "FILES/lacking.pth"], ["lacks", "cls_score"]),
    "teacher weights with another shape": (
        ["MODEL.TEACHER.WEIGHTS", "FILES/misshapen.pth"], ["cls_score", "(5,", "(9,"]),
    "random teacher that was not meant": (
        ["MODEL.TEACHER.ALLOW_RANDOM", "False"], ["MODEL.TEACHER.WEIGHTS", "ALLOW_RANDOM"]),
    "no teacher config": (
        ["MODEL.TEACHER.CONFIG_FILE", ""], ["MODEL.TEACHER.CONFIG_FILE", "model-zoo name"]),
    "unknown teacher config": (
        ["MODEL.TEACHER.CONFIG_FILE", "COCO-Detection/none.yaml"], ["none.yaml", "model zoo"]),
    "unfit teacher override": (
        teacher("MODEL.NO_KEY", 1), ["MODEL.TEACHER.OPTS", "NO_KEY"]),
    "classes differ": (
        teacher("MODEL.ROI_HEADS.NUM_CLASSES", 3),
        ["MODEL.TEACHER.CLASSES", "8", "3", "student", "teacher"]),
    "classes differ from the data": (
        ["MODEL.ROI_HEADS.NUM_CLASSES", "5"], ["MODEL.ROI_HEADS.NUM_CLASSES", "5", "8"]),
    "an FPN level that is not there": (
        ["MODEL.ERA.LEVELS", "['p3', 'p9']"], ["MODEL.ERA.LEVELS", "p9", "student"]),
    "FPN levels that the teacher lacks": (
        teacher("MODEL.FPN.IN_FEATURES", ["res4", "res5"],
                "MODEL.RPN.IN_FEATURES", ["p4", "p5", "p6"],
                "MODEL.ROI_HEADS.IN_FEATURES", ["p4"],
                "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64]]),
        ["MODEL.ERA.LEVELS", "teacher", "p3"]),
    "a level that TWI needs": (
        ["MODEL.ERA.LEVELS", "['p3', 'p4']"], ["MODEL.ERA.LEVELS", "p5", "TWI"]),
    "anchors that differ": (
        ["MODEL.ANCHOR_GENERATOR.SIZES", "[[9], [36], [52], [76]]"], ["anchors", "TWI"]),
    "scales of another length": (
        ["MODEL.ERA.SCALES", "[1.0, 0.5]"], ["MODEL.ERA.SCALES", "2", "MODEL.ERA.NUM_BRANCHES", "4"]),
    "unknown method": (["MODEL.DISTILLER.METHODS", "['ERAA']"], ["MODEL.DISTILLER.METHODS", "ERAA", "ERA"]),
    "method named twice": (["MODEL.DISTILLER.METHODS", "['ERA', 'ERA']"], ["twice"]),
    "unknown layout": (
        ["MODEL.TEACHER.CHANNELS_LAST", "sometimes"],
        ["MODEL.TEACHER.CHANNELS_LAST", "sometimes", "auto"],
    ),
    "unknown norm": (["MODEL.ERA.NORM", "LN"], ["MODEL.ERA.NORM", "LN", "SyncBN"]),
    "alpha above 1": (["MODEL.ERA.ALPHA", "1.5"], ["MODEL.ERA.ALPHA", "1.5", "0", "1"]),
    "alpha below 0": (["MODEL.ERA.ALPHA", "-0.1"], ["MODEL.ERA.ALPHA"]),
    "alpha that is no number": (["MODEL.ERA.ALPHA", "nan"], ["ALPHA"]),
    "weight below 0": (["MODEL.ERA.FEATURE_WEIGHT", "-1.0"], ["MODEL.ERA.FEATURE_WEIGHT", "-1.0"]),
    "TWI weight below 0": (["MODEL.ERA.TWI.ROI_WEIGHT", "-2.0"], ["MODEL.ERA.TWI.ROI_WEIGHT"]),
    "scale below 0": (
        ["MODEL.ERA.SCALES", "[1.0, -0.5, 0.2, 0.1]"], ["MODEL.ERA.SCALES[1]", "-0.5"]),
    "even kernel": (["MODEL.ERA.KERNEL_SIZE", "2"], ["MODEL.ERA.KERNEL_SIZE", "odd"]),
    "temperature 0": (["MODEL.ERA.KD_TEMPERATURE", "0.0"], ["MODEL.ERA.KD_TEMPERATURE"]),
    "unequal heads under INIT_STUDENT": (
        ["MODEL.DISTILLER.INIT_STUDENT", "heads", "MODEL.ROI_BOX_HEAD.FC_DIM", "24"],
        ["INIT_STUDENT", "box_head.fc1", "(24,", "(32,"]),
    "unequal heads between 0 and 1": (
        ["MODEL.ERA.ALPHA", "0.5", "MODEL.ROI_BOX_HEAD.FC_DIM", "24"], ["MODEL.ERA.ALPHA 0.5", "box_head"]),
    "unequal box coders": (
        ["MODEL.DISTILLER.INIT_STUDENT", "heads", "MODEL.RPN.BBOX_REG_WEIGHTS", "(2.0, 2.0, 1.0, 1.0)"],
        ["INIT_STUDENT", "MODEL.RPN.BBOX_REG_WEIGHTS"]),
    "student that is no RCNN": (
        ["MODEL.DISTILLER.STUDENT_META_ARCHITECTURE", "ProposalNetwork"], ["ProposalNetwork", "GeneralizedRCNN"]),
    "accumulation that does not divide": (
        ["SOLVER.ACCUMULATION_STEPS", "3"], ["SOLVER.ACCUMULATION_STEPS", "IMS_PER_BATCH"]),
    "unknown precision": (["SOLVER.AMP.DTYPE", "int8"], ["SOLVER.AMP.DTYPE", "bfloat16"]),
    "unknown key": (["MODEL.ERA.NO_SUCH", "1"], ["command line", "NO_SUCH"]),
    "key without value": (["MODEL.ERA.ALPHA"], ["command line"]),
    "annotations absent": (own_data("none.json"), ["own", "none.json"]),
    "annotations that are no JSON": (own_data("noise.json"), ["noise.json", "JSON"]),
    "annotations that are no COCO file": (own_data("list.json"), ["list.json", "COCO"]),
    "no usable image": (own_data("no_image.json"), ["own"]),
    "unknown dataset": (["DATASETS.TRAIN", "('nowhere',)"], ["nowhere", "DATASETS.COCO_FORMAT"]),
    "no iterations": (["SOLVER.MAX_ITER", "0"], ["SOLVER.MAX_ITER is 0", "1 or more"]),
    "a learning rate below 0": (["SOLVER.BASE_LR", "-0.1"], ["SOLVER.BASE_LR is -0.1"]),
    "a cosine of no height": (["SOLVER.BASE_LR", "0.0"], ["SOLVER.BASE_LR is 0", "WarmupMultiStepLR"]),
    "a learning rate of NaN": (["SOLVER.BASE_LR", "nan"], ["SOLVER.BASE_LR"]),
    "an endless learning rate": (["SOLVER.BASE_LR", "1e999"], ["SOLVER.BASE_LR is inf"]),
    "a momentum above 1": (["SOLVER.MOMENTUM", "1.5"], ["SOLVER.MOMENTUM is 1.5", "0 to 1"]),
    "checkpoints backwards": (["SOLVER.CHECKPOINT_PERIOD", "-1"], ["SOLVER.CHECKPOINT_PERIOD is -1", "0 or more"]),
    "workers below 0": (["DATALOADER.NUM_WORKERS", "-1"], ["DATALOADER.NUM_WORKERS is -1"]),
    "no picture in a batch": (["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH"]),
    "steps that fall": (["SOLVER.STEPS", "(9, 3)"], ["SOLVER.STEPS is (9, 3)", "rising"]),
    "steps of texts": (["SOLVER.STEPS", "('a',)"], ["SOLVER.STEPS"]),
    "an unknown schedule": (["SOLVER.LR_SCHEDULER_NAME", "Linear"], ["Linear", "WarmupCosineLR"]),
    "no size to train at": (["INPUT.MIN_SIZE_TRAIN", "()"], ["INPUT.MIN_SIZE_TRAIN"]),
    "an unknown answer to bad pictures": (["INPUT.ON_BAD_IMAGE", "ask"], ["INPUT.ON_BAD_IMAGE", "stop, skip"]),
    "a limit of no pixels": (["INPUT.MAX_IMAGE_PIXELS", "0"], ["INPUT.MAX_IMAGE_PIXELS is 0"]),
    "an unknown architecture": (
        ["MODEL.META_ARCHITECTURE", "FasterNet"], ["MODEL.META_ARCHITECTURE is 'FasterNet'", "GeneralizedRCNN"]),
    "an unknown architecture of the student": (
        ["MODEL.DISTILLER.STUDENT_META_ARCHITECTURE", "FasterNet"], ["STUDENT_META_ARCHITECTURE", "FasterNet"]),
    "an unknown backbone": (["MODEL.BACKBONE.NAME", "build_none"], ["MODEL.BACKBONE.NAME is 'build_none'"]),
    "an unknown backbone of the teacher": (
        teacher("MODEL.BACKBONE.NAME", "build_none"), ["the teacher's MODEL.BACKBONE.NAME", "build_none"]),
    "a depth that there is not": (["MODEL.RESNETS.DEPTH", "77"], ["MODEL.RESNETS.DEPTH is 77"]),
    "an unknown head": (["MODEL.ROI_BOX_HEAD.NAME", "NoHead"], ["model of this config cannot be built", "NoHead"]),
    "a number of classes below 0": (["MODEL.ROI_HEADS.NUM_CLASSES", "-2"], ["MODEL.ROI_HEADS.NUM_CLASSES"]),
    "no dataset": (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN"]),
    "pictures without labels, and how many is not said": (
        without_labels(count=0), ["SOLVER.UNLABELED_PER_BATCH is 0", "era_toy_tune", "SOLVER.IMS_PER_BATCH (2)"]),
    "no labelled picture left": (without_labels(count=2), ["SOLVER.UNLABELED_PER_BATCH is 2"]),
    "pictures without labels that accumulated batches cannot share": (
        without_labels("SOLVER.ACCUMULATION_STEPS", 2), ["UNLABELED_PER_BATCH is 1", "ACCUMULATION_STEPS 2"]),
    "pictures without labels and a reference that does not divide": (
        without_labels("SOLVER.REFERENCE_WORLD_SIZE", 2),
        ["SOLVER.UNLABELED_PER_BATCH is 1", "SOLVER.REFERENCE_WORLD_SIZE 2"]),
    "pictures without labels for a plain student": (
        without_labels("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        ["DATASETS.UNLABELED", "MODEL.META_ARCHITECTURE is GeneralizedRCNN", "Distiller"]),
    "pictures without labels where every loss needs them": (
        without_labels("MODEL.ERA.FEATURE_WEIGHT", 0.0, "MODEL.ERA.RESIDUAL_WEIGHT", 0.0,
                       "MODEL.ERA.TWI.SOFT_RPN_WEIGHT", 0.0, "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", 0.0,
                       "MODEL.ERA.TWI.RPN_WEIGHT", 1.0),
        ["DATASETS.UNLABELED", "MODEL.DISTILLER.METHODS ['ERA']", "no labels"]),
    "an unknown set without labels": (
        without_labels(names=("nowhere",)), ["DATASETS.UNLABELED", "nowhere", "DATASETS.IMAGE_FOLDERS"]),
    "pictures without labels that are tested on": (
        without_labels(names=("era_toy_val",)), ["DATASETS.UNLABELED", "000000.jpg", "DATASETS.TEST"]),
    "a score that is none": (["MODEL.DISTILLER.PSEUDO_SCORE", "1.5"], ["PSEUDO_SCORE is 1.5"]),
    "a folder of pictures that is absent": (
        photos("none"), ["DATASETS.IMAGE_FOLDERS", "FILES/none", "'own_none'", "correct its path"]),
    "a folder without pictures": (photos("images"), ["FILES/images", "no picture", ".png"]),
    "a picture that is none": (photos("broken"), ["FILES/broken/a.jpg", "cannot be read", "remove it"]),
    "a folder of pictures as labelled data": (
        photos("photos", "DATASETS.TRAIN", "('own_photos',)"),
        ["DATASETS.TRAIN names 'own_photos'", "without annotations", "DATASETS.UNLABELED"]),
    "a folder with a name that is taken": (
        photos("photos", name="era_toy_val"), ["DATASETS.IMAGE_FOLDERS[0]", "already belongs to another"]),
    "a folder without a name": (
        ["DATASETS.IMAGE_FOLDERS", "[['FILES/photos']]"], ["IMAGE_FOLDERS[0]", "2 non-empty strings", "folder]"]),
    "output folder is a file": (["OUTPUT_DIR", "FILES/a_file/run"], ["OUTPUT_DIR", "a_file"]),
    "output folder that cannot be written": (["OUTPUT_DIR", "/proc/era"], ["OUTPUT_DIR", "/proc"]),
    "student weights absent": (["MODEL.WEIGHTS", "FILES/nowhere.pth"], ["weights", "nowhere.pth"]),
}  # fmt: skip


def arguments(overrides, files, output, config):
    overrides = [str(o).replace("FILES", str(files)) for o in overrides]
    return [
        "--config-file", config, *TINY,
        "MODEL.TEACHER.CONFIG_FILE", str(REPO / "configs" / "toy" / "teacher.yaml"),
        "MODEL.TEACHER.WEIGHTS", "", "MODEL.TEACHER.ALLOW_RANDOM", "True",
        "MODEL.TEACHER.OPTS", str(TINY_TEACHER), "OUTPUT_DIR", str(output),
        "DATASETS.TRAIN", "('era_toy_val',)", "SOLVER.MAX_ITER", "1", *overrides,
    ]  # fmt: skip


ERA_CONFIG = str(REPO / "configs" / "toy" / "era.yaml")


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_written(case, files, tmp_path):
    overrides, words = CASES[case]
    output = tmp_path / "run"
    with pytest.raises(UserError) as e:
        train_net(arguments(overrides, files, output, ERA_CONFIG))
    sentence = str(e.value)
    assert "\n" not in sentence and len(sentence) < 700
    missing = [word for word in words if word not in sentence.replace(str(files), "FILES")]
    assert not missing, f"{missing} not in: {sentence}"
    assert not output.exists()


@pytest.mark.parametrize(
    "config, words",
    [
        ("nowhere.yaml", ["--config-file", "nowhere.yaml"]),
        ("FILES/bad.yaml", ["bad.yaml", "NO_SUCH_KEY"]),
        ("FILES/evil.yaml", ["evil.yaml", "python/object"]),  # YAML is loaded safely
        ("FILES/empty.yaml", ["empty.yaml", "is empty"]),
        ("FILES/circle.yaml", ["circle.yaml", "its own _BASE_"]),
        ("FILES/noise.json", ["noise.json"]),
    ],
)
def test_config_files(config, words, files, tmp_path):
    config = config.replace("FILES", str(files))
    with pytest.raises(UserError) as e:
        train_net(arguments([], files, tmp_path / "run", config))
    assert all(word in str(e.value) for word in words), str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, opts, words",
    [
        (["--num-gpus", "0"], [], ["--num-gpus"]),
        (["--num-gpus", "2"], ["MODEL.ERA.NORM", "SyncBN"], ["MODEL.ERA.NORM", "SyncBN"]),
        (["--num-gpus", "2"], ["SOLVER.IMS_PER_BATCH", "3"], ["SOLVER.IMS_PER_BATCH", "3"]),
        (
            ["--num-gpus", "2"],
            ["SOLVER.IMS_PER_BATCH", "4", *without_labels()],
            ["SOLVER.UNLABELED_PER_BATCH is 1", "2 process(es)"],
        ),
    ],
)
def test_flags_that_do_not_fit(flags, opts, words, files, tmp_path):
    with pytest.raises(UserError) as e:
        train_net([*flags, *arguments(opts, files, tmp_path / "run", ERA_CONFIG)])
    assert all(word in str(e.value) for word in words), str(e.value)


def test_alpha_needs_an_mbrnet(files, tmp_path):
    """A plain student's weights cannot be evaluated at alpha 1."""
    plain = tmp_path / "plain.pth"
    torch.save({"model": tiny_model("plain").state_dict()}, plain)
    opts = ["MODEL.WEIGHTS", plain, "MODEL.ERA.ALPHA", "1.0", "DATASETS.TEST", "('era_toy_val',)"]
    with pytest.raises(UserError, match="holds no modules of the method era"):
        train_net(["--eval-only", *arguments(opts, files, tmp_path / "run", ERA_CONFIG)])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("", ['MODEL.WEIGHTS is ""', "--resume"]),
        ("FILES/nowhere.pth", ["nowhere.pth"]),
        ("FILES/teacher.pth", ["does not fit the student", "more keys differ"]),
        ("FILES/lacking.pth", ["does not fit the student"]),
        ("FILES/of_student_lacking.pth", ["lacks", "cls_score"]),
        ("FILES/of_student_deeper.pth", ["res9", "which the model lacks"]),
        ("FILES/of_student_empty.pth", ["lacks"]),
    ],
)
@pytest.mark.parametrize("config", ["era", "plain"])
def test_an_evaluation_needs_weights_that_fit(weights, words, config, files, tmp_path):
    """They gave an AP, and exit status 0."""
    good = tiny_model("plain").state_dict()
    lacking = {k: v for k, v in good.items() if "cls_score" not in k}
    torch.save({"model": lacking}, files / "of_student_lacking.pth")
    torch.save(
        {"model": good | {"backbone.res9.w": torch.zeros(1)}}, files / "of_student_deeper.pth"
    )
    torch.save({"model": {}}, files / "of_student_empty.pth")
    opts = ["MODEL.WEIGHTS", weights, "DATASETS.TEST", "('era_toy_val',)"]
    path = str(REPO / "configs" / "toy" / f"{config}.yaml")
    with pytest.raises(UserError) as e:
        train_net(["--eval-only", *arguments(opts, files, tmp_path / "run", path)])
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value), str(e.value)
    assert not (tmp_path / "run").exists()


def test_the_command_line_prints_the_sentence_alone(files, tmp_path):
    done = run_tool(
        "train_net.py",
        *arguments(["MODEL.ERA.ALPHA", "2.0"], files, tmp_path / "run", ERA_CONFIG),
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: MODEL\.ERA\.ALPHA is 2\.0: .*\n", done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
