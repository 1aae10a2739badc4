"""Checkpoints: no pickled code, whole or not at all, the student in and out of a distiller."""

import errno
import os
import pickle
import sys

import cv2
import numpy as np
import pytest
import torch
from builders import batch, tiny_cfg, tiny_model
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from era.checkpoint import writing
from era.checkpoint.reading import SafeCheckpointer, load_exactly
from era.checkpoint.student import save_plain_student
from era.checkpoint.writing import save_whole, weights_hash
from era.errors import UserError


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_pickle_never_runs_code(tmp_path, suffix):
    trap, path = str(tmp_path / "trap"), str(tmp_path / f"weights{suffix}")
    payload = {"model": {"w": Evil(trap)}, "__author__": "mallory"}
    if suffix == ".pkl":
        with open(path, "wb") as f:
            pickle.dump(payload, f)
    else:
        torch.save(payload, path)
    with pytest.raises(UserError, match="cannot be read"):
        SafeCheckpointer(tiny_model("plain")).load(path)
    assert not os.path.exists(trap)


@pytest.mark.parametrize("protocol", [2, 4])
def test_model_zoo_pickles_are_read(tmp_path, protocol):
    source, target = tiny_model("plain", seed=1), tiny_model("plain", seed=2)
    arrays = {k: v.numpy() for k, v in source.state_dict().items()}
    path = str(tmp_path / "zoo.pkl")
    with open(path, "wb") as f:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, f, protocol=protocol)
    load_exactly(target, path, what="MODEL.WEIGHTS")
    assert weights_hash(target.state_dict()) == weights_hash(source.state_dict())


def test_caffe2_backbones_are_matched_by_name(tmp_path):
    """R-50.pkl of the zoo: plain arrays under res2_0_branch2a_w and the like."""
    cfg = tiny_cfg("plain")
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 50
    model = build_model(cfg)
    weight = model.backbone.bottom_up.res2[0].conv1.weight
    value = np.random.default_rng(0).normal(size=tuple(weight.shape)).astype("float32")
    path = str(tmp_path / "R-50.pkl")
    with open(path, "wb") as f:
        pickle.dump(
            {"res2_0_branch2a_w": value, "res2_0_branch2a_w_momentum": value}, f, protocol=2
        )
    SafeCheckpointer(model).load(path)
    assert np.array_equal(weight.detach().numpy(), value)


def test_the_four_ways_between_distilled_and_plain(tmp_path):
    distiller, plain = tiny_model("era", seed=1), tiny_model("plain", seed=2)
    for model, name in ((distiller, "distilled"), (plain, "plain")):
        SafeCheckpointer(model, str(tmp_path)).save(name)
    distilled_path, plain_path = (str(tmp_path / f"{n}.pth") for n in ("distilled", "plain"))

    def load(config, path):
        model = tiny_model(config, seed=3)
        SafeCheckpointer(model).load(path)
        return model

    def same(a, b):
        return weights_hash(a.state_dict()) == weights_hash(b.state_dict())

    assert same(load("era", distilled_path), distiller)
    assert same(load("plain", plain_path), plain)
    assert same(load("era", plain_path).student, plain)
    assert same(load("plain", distilled_path), distiller.student)


def test_a_run_begins_with_the_student_alone_and_resumes_with_its_methods(tmp_path):
    """Of the distilled file of another run; its own last checkpoint is read whole."""
    earlier, own, built = (tiny_model("era", seed=seed) for seed in (1, 2, 3))
    (tmp_path / "earlier").mkdir()
    SafeCheckpointer(earlier, str(tmp_path / "earlier")).save("model_final")
    start = str(tmp_path / "earlier" / "model_final.pth")
    state = weights_hash(built.methods.state_dict())
    checkpointer = SafeCheckpointer(built, str(tmp_path))
    for resume in (False, True):  # there is nothing to resume from
        checkpointer.resume_or_load(start, resume=resume)
        assert weights_hash(built.student.state_dict()) == weights_hash(
            earlier.student.state_dict()
        )
        assert weights_hash(built.methods.state_dict()) == state and not checkpointer.filled_methods

    SafeCheckpointer(own, str(tmp_path)).save("model_0000009", trainer={}, iteration=9)
    checkpointer.resume_or_load(start, resume=True)
    assert weights_hash(built.state_dict()) == weights_hash(own.state_dict())
    checkpointer.load(start)  # as for an evaluation
    assert weights_hash(built.state_dict()) == weights_hash(earlier.state_dict())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("roi_heads.box_head.fc1.weight"), ["lacks", "fc1.weight"]),
        (lambda w: w.update({"backbone.fpn_output3.bias": torch.zeros(3)}), ["(3,)", "(16,)"]),
        (lambda w: w.clear(), ["lacks", "more keys"]),
        (
            lambda w: w.update({"backbone.bottom_up.res4.9.conv1.weight": torch.zeros(1)}),
            ["res4.9"],
        ),
    ],
    ids=["missing", "shape", "another architecture", "a deeper network's"],
)
def test_weights_must_fit_exactly(tmp_path, change, words):
    model = tiny_model("plain")
    weights = model.state_dict()
    change(weights)
    path = str(tmp_path / "w.pth")
    torch.save({"model": weights}, path)
    with pytest.raises(UserError) as e:
        load_exactly(model, path, what="MODEL.TEACHER.WEIGHTS")
    assert all(word in str(e.value) for word in ["MODEL.TEACHER.WEIGHTS", *words])


def test_what_a_training_checkpoint_holds(tmp_path):
    from era.engine.preflight import teacher_record

    model = tiny_model("era", teacher_opts=["MODEL.FPN.OUT_CHANNELS", "24"])
    SafeCheckpointer(model, str(tmp_path), **teacher_record(model)).save("m", iteration=3)
    data = torch.load(tmp_path / "m.pth", weights_only=True)
    prefixes = {
        ".".join(key.split(".")[:4]) for key in data["model"] if not key.startswith("student.")
    }
    assert prefixes == {
        "methods.era.estimator.adapter",
        "methods.era.estimator.mbrnet",
    }
    assert data["teacher"]["sha256"] == model.teacher.sha256
    assert set(data["teacher"]) == {"config_file", "weights", "sha256"}
    teacher_weights = {v.data_ptr() for v in model.teacher.state_dict().values()}
    assert not teacher_weights & {v.data_ptr() for v in model.state_dict().values()}

    other = tiny_model("era", seed=9, teacher_opts=["MODEL.FPN.OUT_CHANNELS", "24"])
    with pytest.raises(UserError, match="another"):
        SafeCheckpointer(other, **teacher_record(other)).load(str(tmp_path / "m.pth"))


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = str(tmp_path / "model.pth")
    save_whole({"model": {"w": torch.ones(2)}}, path)
    own = writing._Hashed

    class Full:
        """The end of a disk after 40 bytes."""

        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, data):
            if self.file.tell() > 40:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    monkeypatch.setattr(writing, "_Hashed", lambda file: own(Full(file)))
    with pytest.raises(
        UserError, match=r"model\.pth cannot be written \(No space left.*MiB free"
    ) as e:
        save_whole({"model": {"w": torch.zeros(2)}}, path, with_hash=True)
    assert "\n" not in str(e.value)
    assert os.listdir(tmp_path) == ["model.pth"]
    assert torch.equal(torch.load(path)["model"]["w"], torch.ones(2))


class Progress:
    """A run's trainer, as a checkpoint holds it."""

    def state_dict(self):
        return {"iteration": 0}

    def load_state_dict(self, state):
        pass


def run_folder(folder, iterations):
    """A checkpointer whose folder holds checkpoints of these iterations, weights alone, and a marker."""
    checkpointer = SafeCheckpointer(torch.nn.Linear(2, 2), str(folder), trainer=Progress())
    for name, iteration in iterations.items():
        checkpointer.save(name, iteration=iteration)
    torch.save({"model": {}}, folder / "teacher.pth")
    return checkpointer


@pytest.mark.parametrize("marker", [None, "", "model_0000007.pth", b"\xff\xfe", "folder"])
def test_without_a_usable_marker_the_newest_whole_checkpoint_counts(marker, tmp_path, caplog):
    """A run of 8 iterations that was continued: model_final is older than the last of the others."""
    names = {"model_0000003": 3, "model_final": 7, "model_0000011": 11, "model_0000015": 15}
    checkpointer = run_folder(tmp_path, names)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000015.pth")
    path = tmp_path / "last_checkpoint"
    path.unlink()
    if marker == "folder":
        path.mkdir()
    elif marker is not None:
        path.write_bytes(marker if isinstance(marker, bytes) else marker.encode())
    whole = (tmp_path / "model_0000015.pth").read_bytes()
    (tmp_path / "model_0000015.pth").write_bytes(whole[: len(whole) // 2])
    assert checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000011.pth")
    assert caplog.text.count("resuming from") == 1  # told once
    assert "model_0000011.pth, iteration 11" in caplog.text
    assert "model_0000015.pth: unreadable" in caplog.text and "teacher" not in caplog.text


def test_the_marker_decides_while_its_file_is_whole(tmp_path, caplog):
    checkpointer = run_folder(tmp_path, {"model_0000003": 3, "model_0000007": 7})
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000003.pth")
    assert "resuming" not in caplog.text
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000007.pth")


def test_folders_that_nothing_can_be_resumed_from(tmp_path):
    checkpointer = run_folder(tmp_path / ".", {})
    assert not checkpointer.has_checkpoint()  # teacher.pth is no checkpoint of a run
    (tmp_path / "model_0000003.pth").write_bytes(b"half")
    with pytest.raises(
        UserError, match=r"no whole checkpoint.*model_0000003\.pth: unreadable.* without --resume"
    ):
        checkpointer.has_checkpoint()
    assert not SafeCheckpointer(torch.nn.Linear(2, 2), str(tmp_path / "new")).has_checkpoint()


def stock_cfg_of(folder):
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"), allow_unsafe=False)
    return cfg


def test_the_plain_student_is_an_ordinary_detectron2_model(tmp_path):
    """Stock get_cfg, build_model, strict loading and DefaultPredictor give the distiller's detections
    at alpha 0, bit for bit."""
    model = tiny_model("era")
    cfg = tiny_cfg("era")
    path = save_plain_student(model.student, cfg, str(tmp_path / "student"))
    stock = stock_cfg_of(tmp_path / "student")
    assert "TEACHER" not in stock.MODEL and stock.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    weights = torch.load(path, weights_only=True)["model"]
    build_model(stock).load_state_dict(weights, strict=True)
    assert not [key for key in weights if "student" in key or "methods" in key]

    image = batch((0,), size=(96, 128))[0]["image"].permute(1, 2, 0).numpy().astype("uint8")
    found = DefaultPredictor(stock)(image)["instances"]
    predictor = DefaultPredictor(stock)
    predictor.model = model.eval()
    expected = predictor(image)["instances"]
    assert len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)


def test_an_r50_student_needs_nothing_of_this_project(tmp_path):
    """The flagship's student folder works in a Python that never imports era."""
    from builders import REPO

    from era.config import load_config

    small = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS",
             "16", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
             "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]  # fmt: skip
    cfg = load_config(str(REPO / "configs" / "era_r101_r50.yaml"), small)
    from era.config import student_config

    save_plain_student(build_model(student_config(cfg)), cfg, str(tmp_path / "student"))
    cv2.imwrite(str(tmp_path / "x.jpg"), np.full((60, 80, 3), 127, np.uint8))
    code = f"""
import sys, cv2
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
cfg = get_cfg()
cfg.merge_from_file({str(tmp_path / "student" / "config.yaml")!r})
cfg.INPUT.MIN_SIZE_TEST = 64
print(len(DefaultPredictor(cfg)(cv2.imread({str(tmp_path / "x.jpg")!r}))["instances"]))
assert "era" not in sys.modules
"""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
