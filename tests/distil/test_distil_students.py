"""Students by name, and what they start from; nothing is fetched but from a server of this machine."""

import functools
import http.server
import importlib.util
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from builders import REPO
from detectron2.modeling import build_backbone
from detectron2.utils.file_io import Detectron2Handler
from distil_case import make_stranger
from torch import nn

from era.checkpoint import fetching
from era.config import load_config, student_config
from era.convert.cli import convert
from era.convert.source import COUNTER, TORCHVISION
from era.distil import cli, configs, pretrained, students, timing
from era.distil.annotations import read_data
from era.distil.pretrained import find_start
from era.distil.request import argument_parser, read_request
from era.distil.students import STUDENTS, find_student
from era.engine.preflight import build_for_training
from era.errors import UserError

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)
TIMM = "mobilenetv3_small_050"
BOTTOM_UP = "backbone.bottom_up."


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return make_stranger(tmp_path_factory.mktemp("stranger"), pictures=4)


@pytest.fixture(scope="module")
def data(stranger):
    return read_data((str(stranger.folder / "my.json"), str(stranger.folder / "photos")), None, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with weights of networks as their libraries write them, and its address."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name in ("resnet18", "mobilenet_v2", "mobilenet_v3_small"):
        torch.save(lively(torchvision.models.get_model(name)), folder / f"{name}.pth")
    resnet = torch.load(folder / "resnet18.pth")
    named = {f"backbone.{k}": v for k, v in resnet.items() if not k.startswith("fc.")}
    named["roi_head.bbox_head.fc_cls.weight"] = torch.zeros(81, 1024)  # of 80 classes
    torch.save({"state_dict": named}, folder / "faster_rcnn_r18.pth")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def lively(network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a network whose batch norms are not those of a fresh one."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.state_dict()


def request_of(stranger, *more):
    own = stranger.args(Path("/nowhere"), *map(str, more))
    return read_request(argument_parser().parse_args([*own, "--num-gpus", "0"]))


def made(stranger, data, folder, *more):
    """Configs of a request in a folder, with what its student starts from put there."""
    request = request_of(stranger, "--baseline", *more)
    start = find_start(request)
    start.write(folder)
    chosen = configs.settle(request, data, start, memory_gib=None, workers=0)
    return configs.make_configs(request, data, chosen, folder), start


def unfilled(cfg) -> list[str]:
    """Tensors of the backbone that a config's weights leave as they were built."""
    frozen = cfg.clone()
    frozen.freeze()
    _, wrong = build_for_training(frozen, resume=False)
    return [n for n in wrong.missing_keys if n.startswith(BOTTOM_UP) and not n.endswith(COUNTER)]


STARTS = {
    "r18": ("r18", "resnet18.pth", "build_resnet_fpn_backbone"),
    "mv2": ("mv2", "mobilenet_v2.pth", "build_mobilenetv2_fpn_backbone"),
    "torchvision": ("torchvision:mobilenet_v3_small", "mobilenet_v3_small.pth", "build_torchvision_fpn_backbone"),
    "a detector of mmdetection": ("r18", "faster_rcnn_r18.pth", "build_resnet_fpn_backbone"),
}  # fmt: skip


@pytest.mark.parametrize("case", STARTS)
def test_weights_of_other_libraries_are_converted_on_the_way(stranger, data, files, tmp_path, case):
    name, file, builder = STARTS[case]
    found, start = made(stranger, data, tmp_path, "--student", name, "--student-weights", files[0] / file)  # fmt: skip
    cfg = found["plain"]
    assert builder == cfg.MODEL.BACKBONE.NAME
    assert str(tmp_path / "student_weights" / "model.pth") == cfg.MODEL.WEIGHTS
    assert cfg.INPUT.FORMAT == "RGB" and not (cfg.MODEL.RESNETS.STRIDE_IN_1X1 and name == "r18")
    assert (tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)) == (TORCHVISION.mean, TORCHVISION.std)  # fmt: skip
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN" and cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert not start.is_random and file in start.about and "by name" in start.about
    assert unfilled(cfg) == []
    alike = student_config(found["distilled"])
    assert alike.MODEL == student_config(cfg).MODEL and alike.INPUT.FORMAT == "RGB"
    teacher = found["teacher"]  # which keeps its own
    assert teacher.INPUT.FORMAT == "BGR" and teacher.MODEL.WEIGHTS.endswith("teacher.pth")


@needs_timm
def test_a_network_of_timm(stranger, data, tmp_path):
    import timm
    from safetensors.torch import save_file

    network = timm.create_model(TIMM, pretrained=False)
    save_file(lively(network), tmp_path / "model.safetensors")
    args = ["--student", f"timm:{TIMM}", "--student-weights", tmp_path / "model.safetensors"]
    found, _ = made(stranger, data, tmp_path, *args)
    assert found["plain"].MODEL.TIMM.NAME == TIMM and unfilled(found["plain"]) == []
    assert find_start(request_of(stranger, "--student", f"timm:{TIMM}")).is_random
    with pytest.raises(UserError, match=r"--student timm: is 'mobilenetv3_smal' \(is mobilenetv3"):
        find_student("timm:mobilenetv3_smal")


@pytest.fixture
def served(files, tmp_path, monkeypatch):
    """The public weights of r18 are on this machine."""
    monkeypatch.setattr(fetching, "get_cache_dir", lambda: str(tmp_path / "cache"))

    def serve(address):
        monkeypatch.setitem(STUDENTS, "r18", replace(STUDENTS["r18"], weights=address))

    return serve


def test_r18_starts_from_public_weights_where_none_are_named(stranger, data, files, served, tmp_path):  # fmt: skip
    served(f"{files[1]}/resnet18.pth")
    found, start = made(stranger, data, tmp_path / "out", "--student", "r18")
    assert start.conversion is not None and unfilled(found["plain"]) == []
    random, start = made(stranger, data, tmp_path, "--student", "r18", "--student-weights", "none")
    assert start.is_random and random["plain"].MODEL.WEIGHTS == ""
    assert (
        random["plain"].MODEL.RESNETS.NORM == "BN" and random["plain"].MODEL.BACKBONE.FREEZE_AT == 0
    )
    # With pretrained weights half the rate and half the schedule.
    keys = [{n: cfg[n].SOLVER for n in ("plain", "teacher")} for cfg in (found, random)]
    assert 2 * keys[0]["plain"].BASE_LR == keys[1]["plain"].BASE_LR
    assert keys[0]["teacher"].BASE_LR == keys[1]["teacher"].BASE_LR


def test_r50_starts_from_detectron2s_zoo(stranger, data, files, tmp_path, monkeypatch):
    """Its files hold a backbone under short names, with the statistics of its norms folded into weight and bias."""
    monkeypatch.setattr(fetching, "get_cache_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{files[1]}/")
    cfg = load_config(str(REPO / "configs" / "plain_r50.yaml"), ["MODEL.DEVICE", "cpu"])
    weights = {
        name: value.numpy()
        for name, value in build_backbone(cfg).bottom_up.state_dict().items()
        if not name.endswith(("running_mean", "running_var", COUNTER))
    }
    file = files[0] / "ImageNetPretrained" / "MSRA" / "R-50.pkl"
    file.parent.mkdir(parents=True)
    content = {"model": weights, "__author__": "MSRA", "matching_heuristics": True}
    file.write_bytes(pickle.dumps(content))
    found, start = made(stranger, data, tmp_path, "--student", "r50")
    assert found["plain"].MODEL.WEIGHTS == start.weights == STUDENTS["r50"].weights
    assert found["plain"].INPUT.FORMAT == "BGR" and found["plain"].MODEL.RESNETS.STRIDE_IN_1X1
    with pytest.raises(UserError, match=r"R-50.pkl is not of --student r101: backbone"):
        find_start(request_of(stranger, "--student", "r101", "--student-weights", file))


def test_without_a_network_it_says_what_to_do(stranger, served):
    served("http://127.0.0.1:9/resnet18.pth")  # where nobody listens
    with pytest.raises(UserError) as caught:
        find_start(request_of(stranger, "--student", "r18"))
    said = str(caught.value)
    assert said.startswith("the weights of ImageNet for --student r18 cannot be had: ")
    assert said.endswith("give a file with --student-weights FILE, or start from random weights with --student-weights none.")  # fmt: skip
    assert "\n" not in said


def test_the_public_addresses_are_those_of_the_recipes():
    for name, recipe in (("r18", "plain_r18"), ("mv2", "plain_mv2")):
        text = (REPO / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8")
        assert f"--weights {STUDENTS[name].weights} " in text
    assert STUDENTS["r34"].weights.startswith("https://download.pytorch.org/models/resnet34-")
    address = find_student("torchvision:mobilenet_v3_large").weights
    assert address.startswith("https://download.pytorch.org/models/mobilenet_v3_large-")


def test_weights_in_detectron2s_names_are_taken_as_they_are(stranger, data, files, tmp_path):
    recipe = str(REPO / "configs" / "plain_r18.yaml")
    convert(str(files[0] / "resnet18.pth"), recipe, str(tmp_path / "r18"))
    weights = str(tmp_path / "r18" / "model.pth")  # with its config beside it
    found, start = made(stranger, data, tmp_path / "out", "--student", "r18", "--student-weights", weights)  # fmt: skip
    cfg = found["plain"]
    assert weights == cfg.MODEL.WEIGHTS and start.conversion is None and unfilled(cfg) == []
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    (tmp_path / "r18" / "config.yaml").unlink()
    found, _ = made(stranger, data, tmp_path / "out", "--student", "r18", "--student-weights", weights)  # fmt: skip
    assert found["plain"].INPUT.FORMAT == "BGR" and found["plain"].MODEL.PIXEL_STD == [1.0] * 3
    with pytest.raises(
        UserError, match=r"--student-weights .*model.pth is not of --student toy: backbone"
    ):
        find_start(request_of(stranger, "--student", "toy", "--student-weights", weights))


@pytest.mark.parametrize(
    ("student", "file", "sentence"),
    [
        ("r34", "resnet18.pth", "is not of a ResNet-34 of torchvision's layers, as --student r34 is: it lacks"),
        ("mv2", "resnet18.pth", "is not of torchvision's mobilenet_v2, as --student mv2 is"),
        ("toy", "resnet18.pth", "expected a ResNet of Detectron2's own builder"),
    ],
)  # fmt: skip
def test_weights_of_another_network_are_refused(stranger, files, student, file, sentence):
    args = ["--student", student, "--student-weights", files[0] / file]
    with pytest.raises(UserError, match=sentence) as caught:
        find_start(request_of(stranger, *args))
    said = str(caught.value)
    assert (
        "\n" not in said
        and "config" not in said.replace("files of", "")
        and "--max-left" not in said
    )


def test_what_the_student_starts_from_is_told_before_anything_is_written(
    stranger, files, tmp_path, monkeypatch, capsys
):
    tried = []

    def steps(case, processes, *, on_gpu):
        tried.append(Path(case.cfg.MODEL.WEIGHTS).exists())
        return {"seconds": [1.0], "test_seconds": 0.1}

    monkeypatch.setattr(timing, "take_steps", steps)
    more = [
        "--student",
        "mv2",
        "--student-weights",
        str(files[0] / "mobilenet_v2.pth"),
        "--dry-run",
    ]
    assert cli.main(stranger.args(tmp_path / "o", *more)) == 0
    said = capsys.readouterr().out
    assert tried == [True, True] and not (tmp_path / "o").exists()
    assert "The student's weights, mobilenet_v2.pth, 255 tensors by name:" in said
    assert "INPUT.FORMAT BGR -> RGB" in said and "equal those of torchvision's mobilenet_v2" in said
    assert "from mobilenet_v2.pth, 255 tensors by name, its heads from the teacher's" in said


def test_help_has_a_line_for_every_student(capsys):
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["--help"])
    said = capsys.readouterr().out
    for name in (*STUDENTS, *(f"{library}:NAME" for library in students.LIBRARIES)):
        assert f"\n  {name} " in said
    assert pretrained.OPTION in said


def test_a_backbone_of_a_dense_family(stranger, data, files, tmp_path):
    args = [
        "--teacher",
        str(REPO / "configs" / "retinanet_teacher_r101.yaml"),
        "--student",
        "torchvision:mobilenet_v3_small",
    ]
    found, _ = made(
        stranger, data, tmp_path, *args, "--student-weights", files[0] / "mobilenet_v3_small.pth"
    )
    assert found["plain"].MODEL.BACKBONE.NAME == "build_retinanet_torchvision_fpn_backbone"
    configs.write_config(found["plain"], tmp_path / "plain.yaml")
    assert load_config(str(tmp_path / "plain.yaml")).dump() == found["plain"].dump()
