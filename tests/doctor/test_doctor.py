"""The doctor from its command line: a good run, and each fault made for real."""

import functools
import json
import os
import time

import pytest
import torch
from builders import cli, run_tool, tiny_model
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from era.config import load_config
from era.data.datasets import register_from_config
from era.data.toy import ToySpec, generate
from era.doctor import pictures
from era.doctor.cli import NAMES, main
from era.doctor.teacher import average_precision, some_records
from era.engine import room
from era.errors import UserError

STEPS = ("one process", "two processes")


def skip(*names):
    return [word for name in names for word in ("--skip", name)]


def only(*names):
    return skip(*(name for name in NAMES if name not in names))


def doctor(config, *options):
    """The doctor's command line out of that of train_net.py: options go before the overrides."""
    return [*config[:2], *map(str, options), *config[2:]]


def examine(config, tmp_path, *options):
    """Exit status, and the findings by name."""
    status = main(doctor(config, "--json", tmp_path / "found.json", *options))
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["start"] is (status == 0)
    return status, {found["name"]: found for found in report["checks"]}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """Weights that fit the tiny teacher and know nothing."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": tiny_model().teacher.model.state_dict()}, path)
    return str(path)


@pytest.fixture
def own_data(tmp_path, request):
    """A dozen pictures that a test may damage: the folder, and the overrides that name them."""
    generate(tmp_path / "toy", ToySpec(train_images=6, val_images=2, image_size=64))
    root = next(
        p for p in (tmp_path / "toy", tmp_path / "toy" / "era_toy") if (p / "train").is_dir()
    )
    names = [f"{request.node.name}_{s}" for s in ("train", "val")]
    triples = [
        [name, str(root / "annotations" / f"{s}.json"), str(root / s)]
        for name, s in zip(names, ("train", "val"), strict=True)
    ]
    return root, [
        "DATASETS.COCO_FORMAT", str(triples),
        "DATASETS.TRAIN", str((names[0],)), "DATASETS.TEST", str((names[1],)),
        "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    ]  # fmt: skip


def test_a_good_run_from_the_script(tiny_data, tmp_path, teacher_file):
    config = cli(tiny_data, tmp_path / "out", "MODEL.TEACHER.WEIGHTS", teacher_file)
    options = ("--json", "-", "--least-ap", "0", "--steps", "1", "--teacher-images", "2")
    done = run_tool("doctor.py", *doctor(config, *options), timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert tuple(found) == NAMES
    assert {check["status"] for check in found.values()} <= {"ok", "warning"}, done.stderr
    for name in ("data", "models", "disk", "pairing", "pictures", "teacher", *STEPS, "prediction"):
        assert found[name]["status"] == "ok", found[name]
    for processes, name in enumerate(STEPS, start=1):
        details = found[name]["details"]
        assert details["processes"] == processes and len(details["peak_mib"]) == processes
        assert len(details["seconds"]) == 1 and details["losses"]["loss_cls"] > 0
    assert "say anything about a GPU" in str(found["prediction"]["details"]["assumptions"])
    assert "It can start" in done.stderr and "p3" in done.stderr
    left = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert left == ["out/doctor/pictures.jsonl"]  # nothing else is written


def test_the_table_of_student_and_teacher(tiny_data, tmp_path, capsys):
    config = cli(
        tiny_data, tmp_path / "out", "MODEL.TEACHER.OPTS", "['MODEL.FPN.OUT_CHANNELS', '24']",
        config="methods/pkd",
    )  # fmt: skip
    status, found = examine(config, tmp_path, *only("models", "pairing"))
    assert status == 0
    levels = {row["level"]: row for row in found["pairing"]["details"]["levels"]}
    assert set(levels) == {"p3", "p4", "p5", "p6"}
    assert (levels["p3"]["student channels"], levels["p3"]["teacher channels"]) == (16, 24)
    assert levels["p3"]["comparison"] == "channels differ: needs an adapter"
    assert [levels[p]["student stride"] for p in ("p3", "p4", "p5", "p6")] == [8, 16, 32, 64]
    (method,) = found["pairing"]["details"]["methods"]
    assert method["method"] == "pkd" and method["needs"] == "teacher"
    assert "weights" in found["pairing"]["lines"]
    assert "they read" in capsys.readouterr().out


def test_a_broken_picture_and_its_repair(own_data, tmp_path, monkeypatch):
    root, names = own_data
    config = cli(names, tmp_path / "out")
    bad = sorted((root / "train").iterdir())[2]
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    status, found = examine(config, tmp_path, *only("data", "pictures"))
    assert status == 1
    assert found["pictures"]["status"] == "wrong"
    (problem,) = found["pictures"]["details"]["problems"]
    assert str(bad) in problem and "cannot be read" in problem

    bad.write_bytes(whole)
    decoded = []
    plain = pictures.decoded_size
    monkeypatch.setattr(
        pictures, "decoded_size", lambda cfg, path: decoded.append(path) or plain(cfg, path)
    )
    status, found = examine(config, tmp_path, *only("data", "pictures"))
    assert (status, decoded) == (0, [str(bad)])  # the others were seen whole before
    assert found["pictures"]["details"]["decoded_before"] == 7

    decoded.clear()
    other = sorted((root / "val").iterdir())[0]
    later = other.stat().st_mtime_ns + 10**9
    os.utime(other, ns=(later, later))  # somebody wrote it anew
    examine(config, tmp_path, *only("data", "pictures"))
    assert decoded == [str(other)]


def test_an_interrupted_look_at_the_pictures_goes_on(own_data, tmp_path, monkeypatch, capsys):
    _, names = own_data
    config = cli(names, tmp_path / "out")
    plain, decoded = pictures.decoded_size, []

    def stops(cfg, path):
        if len(decoded) == 4:
            raise KeyboardInterrupt
        decoded.append(path)
        return plain(cfg, path)

    monkeypatch.setattr(pictures, "decoded_size", stops)
    monkeypatch.setattr(pictures, "usable_cores", lambda: 1)
    assert main(doctor(config, *only("data", "pictures"))) == 130
    assert "Interrupted at: pictures" in capsys.readouterr().err
    with (tmp_path / "out" / pictures.JOURNAL).open("a") as journal:
        journal.write('["/cut/off')  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(pictures, "decoded_size", plain)
    status, found = examine(config, tmp_path, *only("data", "pictures"))
    assert status == 0
    assert found["pictures"]["details"]["decoded_before"] == 4


def test_a_picture_of_another_size_than_said(own_data, tmp_path):
    root, names = own_data
    bad = sorted((root / "train").iterdir())[0]
    Image.new("RGB", (64, 40)).save(bad)
    for _ in range(2):  # the journal does not hide it
        status, found = examine(cli(names, tmp_path / "out"), tmp_path, *only("data", "pictures"))
        assert status == 1
        assert "64 x 40 pixels and its annotation says 64 x 64" in found["pictures"]["lines"]


def test_an_absent_annotation_file(tiny_data, tmp_path):
    config = cli(tiny_data, tmp_path / "out", "DATASETS.COCO_FORMAT", "[['gone', 'no.json', 'no']]")
    config += ["DATASETS.TRAIN", "('gone',)"]
    status, found = examine(config, tmp_path, *skip("models"))
    assert status == 1
    assert found["data"]["status"] == "wrong" and "does not exist" in found["data"]["sentence"]
    for name in ("pictures", "teacher", *STEPS, "prediction"):
        assert found[name]["status"] == "not checked"


def test_a_full_disk(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda folder: 1000)
    config = cli(tiny_data, tmp_path / "out")
    status, found = examine(config, tmp_path, *only("models", "disk"))
    assert status == 1
    assert found["disk"]["status"] == "wrong" and "too little room" in found["disk"]["sentence"]
    monkeypatch.setattr(room, "free_bytes", lambda folder: 4 * 10**6)
    status, found = examine(config, tmp_path, *only("models", "disk"))
    assert (status, found["disk"]["status"]) == (0, "ok")
    monkeypatch.setattr(room, "free_bytes", lambda folder: 2 * 10**6)
    status, found = examine(config, tmp_path, *only("models", "disk"))
    assert (status, found["disk"]["status"]) == (0, "warning")


def test_the_wrong_teacher(tiny_data, tmp_path, teacher_file):
    config = cli(tiny_data, tmp_path / "out", "MODEL.TEACHER.WEIGHTS", teacher_file)
    status, found = examine(config, tmp_path, *only("data", "models", "teacher"))
    assert status == 0  # it may be meant
    assert found["teacher"]["status"] == "warning"
    assert "is it the right teacher" in found["teacher"]["sentence"]
    assert 0 <= found["teacher"]["details"]["AP"] < 10
    assert found["teacher"]["details"]["pictures"] == 4


def test_an_environment_without_pkg_resources(tmp_path):
    (tmp_path / "pkg_resources.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pkg_resources'\")"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run_tool("doctor.py", "--help", env={"PYTHONPATH": path})
    assert done.returncode == 1
    assert "setuptools below 81" in done.stderr and "Traceback" not in done.stderr


def test_ap_is_of_the_chosen_pictures_and_their_classes(own_data, tmp_path):
    """Detections that are the ground truth of some pictures: AP 100, though the set has more."""
    _, names = own_data
    cfg = load_config("", ["MODEL.DEVICE", "cpu", *names])
    register_from_config(cfg)
    name = cfg.DATASETS.TRAIN[0]
    records = some_records(name, 2)
    assert [record["image_id"] for record in records] == [1, 4]  # of six, spread evenly
    truth = {record["file_name"]: record["annotations"] for record in records}

    def detects_all(inputs, shift=0):
        (item,) = inputs
        found = Instances((item["height"], item["width"]))
        annotations = truth[item["file_name"]]
        boxes = BoxMode.convert(
            torch.tensor([a["bbox"] for a in annotations]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS
        )
        found.pred_boxes = Boxes(boxes)
        classes = torch.tensor([a["category_id"] for a in annotations])
        found.pred_classes, found.scores = (classes + shift) % 8, torch.ones(len(annotations))
        return [{"instances": found}]

    assert average_precision(cfg, detects_all, name, records) == pytest.approx(100.0)
    shifted = functools.partial(detects_all, shift=1)  # another order of the classes
    assert average_precision(cfg, shifted, name, records) < 30


def test_a_random_teacher(tiny_data, tmp_path):
    status, found = examine(
        cli(tiny_data, tmp_path / "out"), tmp_path, *only("data", "models", "teacher")
    )
    assert (status, found["teacher"]["status"]) == (0, "warning")
    assert "random weights" in found["teacher"]["sentence"]


def test_a_teacher_of_another_architecture(tiny_data, tmp_path, teacher_file):
    config = cli(tiny_data, tmp_path / "out", "MODEL.TEACHER.WEIGHTS", teacher_file)
    config += ["MODEL.TEACHER.OPTS", "['MODEL.FPN.OUT_CHANNELS', '24']"]
    status, found = examine(config, tmp_path, *skip("pictures"))
    assert status == 1
    assert found["models"]["status"] == "wrong"
    assert "does not fit the model" in found["models"]["sentence"]
    for name in ("disk", "pairing", "teacher", *STEPS, "prediction"):
        assert found[name]["status"] == "not checked"


def test_levels_that_one_of_them_lacks(tiny_data, tmp_path):
    config = cli(
        tiny_data, tmp_path / "out", "MODEL.PKD.LEVELS", "['p2', 'p3']", config="methods/pkd"
    )
    status, found = examine(config, tmp_path, *only("models", "pairing"))
    assert status == 1
    assert "has no ['p2']" in found["models"]["sentence"]


def test_weights_of_something_else(tiny_data, tmp_path):
    torch.save({"model": {"somebody.elses": torch.zeros(3)}}, tmp_path / "other.pth")
    config = cli(tiny_data, tmp_path / "out", "MODEL.WEIGHTS", str(tmp_path / "other.pth"))
    status, found = examine(config, tmp_path, *only("models"))
    assert status == 1
    assert "fills 0 of" in found["models"]["sentence"]


def test_a_step_that_fails(tiny_data, tmp_path):
    config = cli(tiny_data, tmp_path / "out", "SOLVER.BASE_LR", "1e38")
    status, found = examine(
        config, tmp_path, "--steps", "2", *only("data", "models", "one process", "prediction")
    )
    assert status == 1
    assert found["one process"]["status"] == "wrong"
    assert "cannot take a step" in found["one process"]["sentence"]
    assert "NaN" in found["one process"]["sentence"]
    assert found["prediction"]["status"] == "not checked"


def test_a_step_that_hangs(tiny_data, tmp_path):
    start = time.monotonic()
    status, found = examine(
        cli(tiny_data, tmp_path / "out"),
        tmp_path, "--step-timeout", "1", *only("data", "models", "two processes"),
    )  # fmt: skip
    assert time.monotonic() - start < 30
    assert status == 0  # the run is of one process
    assert found["two processes"]["status"] == "warning"
    assert "not done after 1 s" in found["two processes"]["sentence"]


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        (("--steps", "0"), (), "--steps is 0"),
        (("--least-ap", "nan"), (), "--least-ap is nan"),
        (("--num-gpus", "0"), (), "--num-gpus is 0"),
        (("--json", "/no/such/folder/x.json"), (), "whose folder does not exist"),
        ((), ("SOLVER.NO_SUCH_KEY", "1"), "NO_SUCH_KEY"),
        ((), ("MODEL.DISTILLER.METHODS", "['NOBODY']"), "names 'NOBODY'"),
    ],
)
def test_a_users_mistake_is_one_sentence(tiny_data, tmp_path, options, overrides, message):
    with pytest.raises(UserError, match=message):
        main(doctor(cli(tiny_data, tmp_path / "out", *overrides), *options))


def test_a_machine_without_the_gpu_that_was_asked_for(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = cli(tiny_data, tmp_path / "out", "MODEL.DEVICE", "cuda")
    status, found = examine(config, tmp_path, *only("devices"))
    assert (status, found["devices"]["status"]) == (0, "warning")
    assert "No GPU on this machine" in found["devices"]["sentence"]


def test_whatever_a_check_stumbles_over_is_wrong_with_the_run(tiny_data, tmp_path, monkeypatch):
    def stumbles(cfg, model):
        raise RuntimeError("of a library")

    monkeypatch.setattr("era.doctor.models.check_room", stumbles)
    status, found = examine(cli(tiny_data, tmp_path / "out"), tmp_path, *only("models", "disk"))
    assert status == 1
    assert found["disk"]["sentence"] == "RuntimeError: of a library"
    assert "Traceback" in found["disk"]["details"]["traceback"]
