"""Checkpoints of other libraries: every tensor has its place or is named, and both networks compute the same."""

from __future__ import annotations

import functools
import importlib.util
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision
from builders import REPO, run_tool
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from era.checkpoint.reading import SafeCheckpointer
from era.config import load_config, student_config
from era.convert import forward
from era.convert.cli import convert
from era.convert.matching import BY_NAME, BY_ORDER
from era.convert.source import CAFFE, TORCHVISION, preprocessing_of
from era.errors import UserError

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)
SMALL = ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
R18 = str(REPO / "configs" / "plain_r18.yaml")
R50 = str(REPO / "configs" / "plain_r50.yaml")
MV2 = str(REPO / "configs" / "plain_mv2.yaml")
TIMM = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME"]


def lively(network: nn.Module, seed: int = 3) -> dict[str, torch.Tensor]:
    """The weights of a network, with batch norms that are not those of a fresh one."""
    draw = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=draw)
            module.running_var.uniform_(0.5, 1.5, generator=draw)
    return network.state_dict()


@functools.cache
def made(name: str) -> dict[str, torch.Tensor]:
    """Lively weights of a torchvision network."""
    torch.manual_seed(0)
    return lively(torchvision.models.get_model(name, weights=None))


# A ResNet-50 with narrow 3x3 convs, in groups.
NARROW = ["MODEL.RESNETS.NUM_GROUPS", 2, "MODEL.RESNETS.WIDTH_PER_GROUP", 8, *SMALL]


@functools.cache
def made_narrow() -> dict[str, torch.Tensor]:
    """Its weights, of torchvision's."""
    torch.manual_seed(0)
    bottleneck = torchvision.models.resnet.Bottleneck
    return lively(torchvision.models.ResNet(bottleneck, [3, 4, 6, 3], groups=2, width_per_group=8))


def save(weights: object, folder: Path, name: str = "source.pth") -> str:
    torch.save(weights, folder / name)
    return str(folder / name)


def refused(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(folder: Path, *opts) -> tuple[nn.Module, SafeCheckpointer]:
    """The model of a converted folder's own config, with its checkpoint."""
    cfg = student_config(load_config(str(folder / "config.yaml"), list(opts)))
    assert str(folder / "model.pth") == cfg.MODEL.WEIGHTS
    assert cfg.MODEL.DEVICE == get_cfg().MODEL.DEVICE
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    checkpointer = SafeCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    return model, checkpointer


def test_torchvisions_resnet18_fills_detectron2s_own(tmp_path, capsys):
    weights = made("resnet18")
    source = save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path)
    # what R50's recipe says of pictures is Caffe's
    config = R50, ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, *SMALL]
    found = convert(source, config[0], str(tmp_path / "out"), config[1])
    assert (found.how, found.left) == (BY_NAME, ["fc.weight", "fc.bias"])
    # 20 convs and their norms, of 5 tensors each without the counter
    assert len(found.places) == len(found.renamed) == 20 * 5
    assert set(found.new) and not any(name.startswith("backbone.bottom_up") for name in found.new)
    model, checkpointer = loaded(tmp_path / "out")
    assert {k.split(".")[0] for k in checkpointer.incompatible.missing_keys} <= {
        "backbone",
        "proposal_generator",
        "roi_heads",
    }
    assert not checkpointer.incompatible.unexpected_keys
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(1)).float()
    normed = (image / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    own = torchvision.models.resnet18(weights=None).eval()
    own.load_state_dict(weights)
    with torch.no_grad():
        maps = model.backbone.bottom_up(model.preprocess_image([{"image": image}]).tensor)
        x = own.maxpool(own.relu(own.bn1(own.conv1(normed[None]))))
        for k in range(1, 5):
            x = getattr(own, f"layer{k}")(x)
            torch.testing.assert_close(maps[f"res{k + 1}"], x, rtol=1e-3, atol=1e-4)
    said = capsys.readouterr().out
    assert "INPUT.FORMAT BGR -> RGB" in said and "MODEL.RESNETS.STRIDE_IN_1X1 True -> False" in said
    assert "conv1.weight -> stem.conv1.weight" in said and "fc.weight, fc.bias" in said
    assert "res2, res3, res4, res5 equal those of a ResNet-18" in said
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert len(report["placed"]) == 100 and report["left"] == found.left
    assert all(value < 1e-6 for value in report["largest_difference"].values())
    cfg = load_config(str(tmp_path / "out" / "config.yaml"))
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", False)
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def test_the_recipes_own_preprocessing_is_that_of_its_weights(tmp_path):
    for config, name in ((R18, "resnet18"), (MV2, "mobilenet_v2")):
        convert(save(made(name), tmp_path), config, str(tmp_path / name), SMALL)
        report = json.loads((tmp_path / name / "conversion.json").read_text())
        assert report["changed_keys"] == {}


def test_the_stride_is_where_the_style_says(tmp_path):
    """Of Caffe's bottlenecks in the first conv: the weights are the same, the maps are not."""
    source = save(made_narrow(), tmp_path)
    maps = {}
    for style, in_1x1 in (("torchvision", False), ("caffe", True)):
        found = convert(source, R50, str(tmp_path / style), NARROW, preprocessing=style)
        assert found.left == ["fc.weight", "fc.bias"]
        model, _ = loaded(tmp_path / style)
        cfg = load_config(str(tmp_path / style / "config.yaml"))
        assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is in_1x1
        assert ("BGR" if in_1x1 else "RGB") == cfg.INPUT.FORMAT
        with torch.no_grad():
            maps[style] = model.backbone.bottom_up(torch.ones(1, 3, 64, 64))["res5"]
    assert not torch.allclose(*maps.values(), rtol=0.01)


def test_mobilenetv2_by_name_and_by_order(tmp_path):
    """Names of another implementation, without torchvision's inner groups, are matched by kinds and shapes in order."""
    weights = made("mobilenet_v2")
    by_name = convert(save(weights, tmp_path), MV2, str(tmp_path / "a"), SMALL)
    flat = {f"net.{i}.{k.rsplit('.', 1)[-1]}": v for i, (k, v) in enumerate(weights.items())}
    by_order = convert(save(flat, tmp_path), MV2, str(tmp_path / "b"), SMALL)
    assert (by_name.how, by_order.how) == (BY_NAME, BY_ORDER)
    assert not by_name.renamed and len(by_order.renamed) == len(by_order.places) == 17 * 15
    assert len(by_name.left) == 5 + 2  # the last conv with its norm, and the classifier
    assert by_name.weights.keys() == by_order.weights.keys()
    assert all(torch.equal(v, by_order.weights[k]) for k, v in by_name.weights.items())


@needs_timm
@pytest.mark.parametrize("name, left", [
    ("mobilenetv3_small_050", {"conv_head", "classifier"}),
    ("convnext_atto", {"head"}),  # names of stages are joined where timm takes its maps
    ("repvgg_a0", {"head"}),
])  # fmt: skip
def test_timms_own_files(name, left, tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False)
    save_file(lively(network), tmp_path / "model.safetensors")
    opts = [*TIMM, name, *SMALL]
    found = convert(str(tmp_path / "model.safetensors"), R50, str(tmp_path / "out"), opts)
    assert {key.split(".")[0] for key in found.left} == left
    cfg = load_config(str(tmp_path / "out" / "config.yaml"))
    mean = [255 * value for value in network.pretrained_cfg["mean"]]
    assert pytest.approx(mean, abs=1e-3) == cfg.MODEL.PIXEL_MEAN and cfg.INPUT.FORMAT == "RGB"


def test_half_precision_becomes_single(tmp_path):
    weights = {k: v.half() if v.is_floating_point() else v for k, v in made("resnet18").items()}
    found = convert(save(weights, tmp_path), R18, str(tmp_path / "out"), SMALL)
    assert {value.dtype for value in found.weights.values()} == {torch.float32}


META = "model = dict(backbone=dict(style='{style}'))\nimg_norm_cfg = dict(mean=[1.0, 2.5, 3], std=[4, 5.0, 6.0], to_rgb={rgb})"


def test_what_mmdetection_says_of_its_pictures():
    assert preprocessing_of("") == TORCHVISION
    assert preprocessing_of("style='caffe'") == CAFFE
    said = preprocessing_of(META.format(style="caffe", rgb=False))
    assert (said.mean, said.std) == ((1.0, 2.5, 3.0), (4.0, 5.0, 6.0))
    assert (said.channel_order, said.stride_in_1x1) == ("BGR", True)
    said = preprocessing_of(META.format(style="pytorch", rgb=True).replace("to_rgb", "bgr_to_rgb"))
    assert (said.channel_order, said.stride_in_1x1) == ("RGB", False)


@pytest.mark.parametrize(
    "config, opts, network, message",
    [
        # a deeper network fills a shallower one without a gap
        (R18, [], "resnet34", r"of another model than its config: .*of \d+ tensors \(4\d%, at most 10%\)"),
        (R18, [], "resnet50", r"layer1\.0\.conv1\.weight is of shape \(64, 64, 1, 1\)|not of a ResNet-18"),
        (R50, [], "resnet18", r"is not of a ResNet-50 of torchvision's layers.*it lacks layer1\.0\.conv3\.weight"),
        (MV2, [], "mobilenet_v3_small", r"is not of torchvision's mobilenet_v2.*it lacks features\.1"),
        (R18, ["MODEL.BACKBONE.NAME", "build_small_resnet_fpn_backbone"], "resnet18", "expected a ResNet of Detectron2's own builder"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(config, opts, network, message, tmp_path):
    text = refused(save(made(network), tmp_path), config, str(tmp_path / "out"), [*opts, *SMALL])
    assert re.search(message, text), text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.pth"], "nothing is left"


def test_the_share_that_may_be_left_can_be_said(tmp_path):
    source = save(made("resnet34"), tmp_path)
    found = convert(source, R18, str(tmp_path / "out"), SMALL, max_left=0.5)
    assert 0.4 < found.left_share < 0.5
    assert "--max-left is 2: expected a share" in refused(
        source, R18, str(tmp_path / "b"), max_left=2
    )


class RunsCode:
    def __reduce__(self):
        return open, ("/tmp/era-must-not-exist", "w")


def test_bad_files_are_one_sentence(tmp_path):
    out = str(tmp_path / "out")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"state_dict": RunsCode()}))
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    cases = [
        ("absent.pth", "which is no file"),
        ("code.pth", "cannot be read without running code"),
        ("text.pth", "expected tensors by name"),
        ("text.safetensors", "is no safetensors file|needs the package safetensors"),
        (Path(save([1, 2], tmp_path, "list.pth")).name, "holds no tensors by name"),
        (Path(save({"optimizer": {}}, tmp_path, "none.pth")).name, "holds no tensors by name"),
        (Path(save({"backbone.bottom_up.stem.conv1.weight": torch.ones(1)}, tmp_path, "own.pth")).name,
         "has Detectron2's names already"),
    ]  # fmt: skip
    for name, message in cases:
        text = refused(str(tmp_path / name), R18, out, SMALL)
        assert re.search(message, text), text
    assert not Path(out).exists() and not Path("/tmp/era-must-not-exist").exists()
    nan = {k: v * float("nan") if k == "conv1.weight" else v for k, v in made("resnet18").items()}
    assert re.search(
        r"cannot be used \(.*stem\.conv1", refused(save(nan, tmp_path), R18, out, SMALL)
    )
    Path(out).mkdir()
    (Path(out) / "mine").touch()
    assert "is not an empty folder" in refused(save(made("resnet18"), tmp_path), R18, out, SMALL)
    assert [p.name for p in Path(out).iterdir()] == ["mine"]


def test_a_wrong_place_is_seen_on_the_picture(tmp_path, monkeypatch):
    """Injected: two layers of equal shape change places after the matching."""
    real = forward.compare_maps

    def swapped(model, library, weights, preprocessing):
        a, b = "layer1.0.conv2.weight", "layer1.1.conv2.weight"
        return real(model, library, {**weights, a: weights[b], b: weights[a]}, preprocessing)

    monkeypatch.setattr("era.convert.cli.compare_maps", swapped)
    text = refused(save(made("resnet18"), tmp_path), R18, str(tmp_path / "out"), SMALL)
    assert re.search(r"does not compute what a ResNet-18 .* computes: res2 differs by", text)
    assert not (tmp_path / "out").exists()


def test_the_command_says_it_in_one_sentence(tmp_path):
    done = run_tool("convert_weights.py", "--weights", tmp_path / "absent.pth",
                    "--config-file", R18, "--output", tmp_path / "out")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: --weights is") and "Traceback" not in done.stderr
