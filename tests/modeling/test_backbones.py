"""Backbones out of torchvision and timm, and Detectron2's own small ResNets."""

import importlib.util
import re
import sys

import pytest
import torch
import torchvision
from builders import REPO, batch, losses_of, tiny_cfg, tiny_model
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn

from era.config import get_era_cfg, load_config, student_config
from era.engine.preflight import build_model_of
from era.errors import UserError
from era.modeling.backbones import torchvision_bodies

has_timm = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not has_timm, reason="timm is not installed")
LEVELS = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
TORCHVISION = [
    # name, channels of res2..res5
    ("mobilenet_v3_small", [16, 24, 48, 96]),  # the last 1x1 conv to 576 is left out
    ("efficientnet_b0", [24, 40, 112, 320]),
    ("resnet18", [64, 128, 256, 512]),  # blocks lie in the network itself, not in one sequence
    ("regnet_y_400mf", [48, 104, 208, 440]),
]
TIMM = [
    ("mobilenetv3_small_050", [8, 16, 24, 288]),
    ("efficientnet_lite0", [24, 40, 112, 320]),
    ("convnext_atto", [40, 80, 160, 320]),  # layer norms, no map of stride 2
    ("repvgg_a0", [48, 96, 192, 1280]),
]


def backbone(kind, name="", *opts, family="", config="plain"):
    """The backbone of a toy config, by the kind of its builder, trainable unless ``opts`` say otherwise."""
    named = [f"MODEL.{kind.upper()}.NAME", name] if name else []
    cfg = load_config(str(REPO / "configs" / "toy" / f"{config}.yaml"), [
        "MODEL.BACKBONE.NAME", f"build_{family}{kind}_fpn_backbone", *named, *map(str, opts)
    ])  # fmt: skip
    torch.manual_seed(0)
    return build_backbone(student_config(cfg)).eval()


def refused(kind, name="", *opts) -> str:
    with pytest.raises(UserError) as caught:
        backbone(kind, name, *opts)
    return str(caught.value)


def trainable(module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_mobilenetv2_gives_the_maps_before_each_halving_and_before_the_classifiers_conv():
    found = backbone("mobilenetv2")
    torch.manual_seed(1)
    reference = torchvision.models.mobilenet_v2(weights=None).eval()
    weights = {k.removeprefix("body."): v for k, v in found.bottom_up.state_dict().items()}
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert {key.split(".")[1] for key in missing if key.startswith("features")} == {"18"}
    image, maps = torch.rand(2, 3, 64, 96), {}
    with torch.no_grad():
        x = image
        for index, block in enumerate(reference.features):
            x = block(x)
            maps[index] = x
        given = found.bottom_up(image)
    assert list(given) == ["res2", "res3", "res4", "res5"]
    for name, index in zip(given, (3, 6, 13, 17), strict=True):
        torch.testing.assert_close(given[name], maps[index])
        shape = found.bottom_up.output_shape()[name]
        assert tuple(maps[index].shape) == (
            2,
            shape.channels,
            64 // shape.stride,
            96 // shape.stride,
        )
    assert [s.channels for s in found.bottom_up.output_shape().values()] == [24, 32, 96, 320]


@pytest.mark.parametrize("kind, name, channels",
                         [*(("torchvision", *row) for row in TORCHVISION),
                          *(pytest.param("timm", *row, marks=needs_timm) for row in TIMM)])  # fmt: skip
def test_maps_have_the_strides_and_channels_that_are_said(kind, name, channels):
    found = backbone(kind, name)
    with torch.no_grad():
        maps = found.bottom_up(torch.rand(1, 3, 96, 64))
        levels = found(torch.rand(1, 3, 96, 64))
    assert {k: m.shape[1] for k, m in maps.items()} == dict(zip(LEVELS, channels, strict=True))
    for key, stride in LEVELS.items():
        assert maps[key].shape[-2:] == (96 // stride, 64 // stride)
        assert found.bottom_up.output_shape()[key].stride == stride
    assert set(levels) == {"p3", "p4", "p5", "p6"}
    assert trainable(found.bottom_up) == {n for n, _ in found.bottom_up.named_parameters()}


@pytest.mark.parametrize(
    "family, config, levels",
    [
        ("", "plain", {"p3", "p4", "p5", "p6"}),
        ("retinanet_", "retinanet_plain", {"p3", "p4", "p5", "p6", "p7"}),
        ("fcos_", "fcos_plain", {"p3", "p4", "p5", "p6", "p7"}),
    ],
)
def test_every_family_has_its_pyramid(family, config, levels):
    found = backbone("mobilenetv2", family=family, config=config)
    with torch.no_grad():
        assert set(found(torch.rand(1, 3, 128, 128))) >= levels
    if family:
        source = found.top_block.p6.in_channels
        assert source == (320 if family == "retinanet_" else found.output_shape()["p5"].channels)


KINDS = [
    ("mobilenetv2", ""),
    pytest.param("timm", "mobilenetv3_small_050", marks=needs_timm),
    pytest.param("timm", "efficientnet_lite0", marks=needs_timm),
]


@pytest.mark.parametrize("kind, name", KINDS)
def test_frozen_norms_compute_what_the_norms_compute_in_eval_mode(kind, name):
    plain = backbone(kind, name, "MODEL.RESNETS.NORM", "BN").bottom_up
    draw = torch.Generator().manual_seed(3)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=draw)
            module.running_var.uniform_(0.5, 1.5, generator=draw)
    frozen = backbone(kind, name, "MODEL.RESNETS.NORM", "FrozenBN").bottom_up
    frozen.load_state_dict(plain.state_dict(), strict=False)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain(image)
        frozen.train()  # statistics of the batch do not count
        found = frozen(image)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())
    for key, map_ in expected.items():  # up to rounding, which grows through a hundred layers
        assert (found[key] - map_).abs().max() < 1e-4 * map_.abs().max()


@pytest.mark.parametrize("kind, name", KINDS[:2])
def test_freezing_follows_the_stages(kind, name):
    """What the frozen stages give does not change with training, everything behind them does."""
    counts = []
    for freeze_at in (0, 1, 2, 3, 4, 5):
        found = backbone(kind, name, "MODEL.BACKBONE.FREEZE_AT", freeze_at).bottom_up.train()
        counts.append(len(trainable(found)))
        maps = found(torch.rand(2, 3, 64, 64))
        has_gradient = [m.requires_grad for m in maps.values()]
        assert has_gradient == [k > freeze_at for k in (2, 3, 4, 5)]
        norms = [m for m in found.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.weight.requires_grad for m in norms), "a frozen stage's norms are frozen too"
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0
    assert len(set(counts)) == 6


def test_sync_batch_norm_is_detectron2s_word_for_it():
    found = backbone("mobilenetv2", "", "MODEL.RESNETS.NORM", "SyncBN").bottom_up
    norms = [m for m in found.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)


@pytest.mark.parametrize("depth", [18, 34])
def test_detectron2s_own_small_resnets(depth):
    cfg = load_config(str(REPO / "configs" / "plain_r18.yaml"), [
        "MODEL.RESNETS.DEPTH", depth, "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 32
    ])  # fmt: skip
    found = build_backbone(cfg)
    assert [s.channels for s in found.bottom_up.output_shape().values()] == [64, 128, 256, 512]
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256
    with pytest.raises(UserError, match="RES2_OUT_CHANNELS = 64 for R18/R34"):
        build_model_of(cfg)


def test_a_student_learns_through_them():
    """A distilled step reaches every trainable weight, and the plain student is one of stock Detectron2."""
    name = ["MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"]
    model = tiny_model("era", *name)
    losses, _ = losses_of(model, batch())
    assert any(key.startswith("loss_era") for key in losses)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.student.backbone.parameters())
    stock = get_cfg()
    stock.merge_from_other_cfg(student_config(tiny_cfg("era", *name)))
    build_model(stock).load_state_dict(model.student.state_dict())


def test_a_teacher_may_have_one_too():
    """With a key of its own, which a teacher's config knows as any config does."""
    opts = ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone",
            "MODEL.TORCHVISION.NAME", "mobilenet_v3_small"]  # fmt: skip
    model = tiny_model("era", teacher_opts=opts)
    assert "backbone.bottom_up.body.features.0.0.weight" in model.teacher.model.state_dict()
    losses, _ = losses_of(model, batch())
    assert losses["loss_era_feature"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_keys_of_a_backbone_stay_with_it():
    cfg = get_era_cfg()
    assert (cfg.MODEL.TORCHVISION.NAME, cfg.MODEL.TIMM.NAME) == ("", "")
    for name, key in (("torchvision", "TORCHVISION"), ("timm", "TIMM")):
        for family in ("", "retinanet_", "fcos_"):
            cfg.MODEL.BACKBONE.NAME = f"build_{family}{name}_fpn_backbone"
            plain = student_config(cfg)
            assert {"TORCHVISION", "TIMM"} & set(plain.MODEL) == {key}
    cfg.MODEL.BACKBONE.NAME = "build_mobilenetv2_fpn_backbone"
    assert set(student_config(cfg).MODEL) == set(get_cfg().MODEL)


@pytest.mark.parametrize(
    "kind, name, opts, message",
    [
        ("torchvision", "", [], r"MODEL\.TORCHVISION\.NAME is ''.*correct the name"),
        ("torchvision", "mobilenet_v3", [], r"such as .*mobilenet_v3_small.*correct the name"),
        ("torchvision", "swin_t", [], r"torchvision's swin_t cannot be a backbone.*strides 4 to 32"),
        ("torchvision", "vit_b_16", [], r"cannot be a backbone \(Wrong image height"),
        ("torchvision", "inception_v3", [], "cannot be a backbone.*takes pictures of any size"),
        ("mobilenetv2", "", ["MODEL.RESNETS.NORM", "GN"], "NORM is 'GN'.*BN, FrozenBN, SyncBN"),
        ("mobilenetv2", "", ["MODEL.BACKBONE.FREEZE_AT", 6], r"FREEZE_AT is 6.*\[0, 1, 2, 3, 4, 5\]"),
        ("mobilenetv2", "", ["MODEL.FPN.IN_FEATURES", ["res1"]], r"ask for res1.*res2 \(stride 4\)"),
        pytest.param("timm", "convnext_atto", ["MODEL.BACKBONE.FREEZE_AT", 1],
                     r"no map of stride 2 .*\[0, 2, 3, 4, 5\]", marks=needs_timm),
        pytest.param("timm", "mobilenetv3", [], "MODEL.TIMM.NAME is 'mobilenetv3'.*correct",
                     marks=needs_timm),
        pytest.param("timm", "hf-hub:timm/resnet18.a1_in1k", [], "expected a network of timm",
                     marks=needs_timm),
        pytest.param("timm", "vit_tiny_patch16_224", [], "cannot be a backbone", marks=needs_timm),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(kind, name, opts, message):
    text = refused(kind, name, *opts)
    assert re.search(message, text), text
    assert text.count("\n") == 0


def test_without_timm_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in refused("timm", "resnet18")


def test_a_block_that_is_not_fed_by_the_one_before_ends_the_chain():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, stride=4, padding=1)
            self.second = nn.Conv2d(4, 5, 3, stride=2, padding=1)

        def forward(self, x):
            return self.second(self.first(x) + 1)  # what lies between is in no block

    assert torchvision_bodies.strides_of(Skips()) == [(4, 4)]
    frozen = torchvision_bodies.freeze_norm(nn.Sequential(nn.BatchNorm2d(2)))
    assert isinstance(frozen[0], FrozenBatchNorm2d)
