"""Detectors of mmdetection: a model's own weights under mmdetection's names come back to their places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from builders import REPO
from detectron2.modeling import build_model

from era.config import load_config, student_config
from era.convert.cli import convert
from era.convert.mmdetection import in_detectron2s_order
from era.errors import UserError

CONFIGS = REPO / "configs"
SMALL = [
    "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 2, "MODEL.ROI_HEADS.NUM_CLASSES", 5, "MODEL.RETINANET.NUM_CLASSES", 5,
]  # fmt: skip
# Detectron2's names and mmdetection's, written down by hand.
TO_MMDETECTION = {
    "proposal_generator.rpn_head.conv": "rpn_head.rpn_conv",
    "proposal_generator.rpn_head.objectness_logits": "rpn_head.rpn_cls",
    "proposal_generator.rpn_head.anchor_deltas": "rpn_head.rpn_reg",
    "roi_heads.box_head.fc1": "roi_head.bbox_head.shared_fcs.0",
    "roi_heads.box_head.fc2": "roi_head.bbox_head.shared_fcs.1",
    "roi_heads.box_predictor.cls_score": "roi_head.bbox_head.fc_cls",
    "roi_heads.box_predictor.bbox_pred": "roi_head.bbox_head.fc_reg",
    "roi_heads.mask_head.mask_fcn1": "roi_head.mask_head.convs.0.conv",
    "roi_heads.mask_head.mask_fcn2": "roi_head.mask_head.convs.1.conv",
    "roi_heads.mask_head.deconv": "roi_head.mask_head.upsample",
    "roi_heads.mask_head.predictor": "roi_head.mask_head.conv_logits",
    "head.cls_score": "bbox_head.retina_cls",
    "head.bbox_pred": "bbox_head.retina_reg",
    **{f"head.cls_subnet.{2 * i}": f"bbox_head.cls_convs.{i}.conv" for i in range(4)},
    **{f"head.bbox_subnet.{2 * i}": f"bbox_head.reg_convs.{i}.conv" for i in range(4)},
    **{
        f"roi_heads.{part}.{k}.{layer}": f"roi_head.bbox_head.{k}.{name}"
        for k in range(3)
        for part, layer, name in (
            ("box_head", "fc1", "shared_fcs.0"), ("box_head", "fc2", "shared_fcs.1"),
            ("box_predictor", "cls_score", "fc_cls"), ("box_predictor", "bbox_pred", "fc_reg"),
        )
    },
}  # fmt: skip
RESNET = {"stem.conv1.norm": "bn1", "stem.conv1": "conv1"}


def mmdetection_names(model, *, first_level: int) -> dict[str, torch.Tensor]:
    """The model's weights as mmdetection would have saved them."""
    found = {}
    for key, value in model.state_dict().items():
        layer, kind = key.rsplit(".", 1)
        if layer.startswith("backbone.bottom_up."):
            layer = layer.removeprefix("backbone.bottom_up.")
            layer = RESNET.get(layer, layer)
            layer = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", layer)
            layer = layer.replace("shortcut.norm", "downsample.1").replace(
                "shortcut", "downsample.0"
            )
            layer = "backbone." + re.sub(r"conv(\d)\.norm", r"bn\1", layer)
        elif layer.startswith("backbone.fpn_"):
            name, level = re.fullmatch(r"backbone\.fpn_(lateral|output)(\d)", layer).groups()
            kind_of_conv = "lateral_convs" if name == "lateral" else "fpn_convs"
            layer = f"neck.{kind_of_conv}.{int(level) - first_level}.conv"
        elif layer.startswith("backbone.top_block.p"):
            layer = f"neck.fpn_convs.{3 + int(layer[-1]) - 6}.conv"
        else:
            layer = TO_MMDETECTION[layer]
        if layer in ("bbox_head.retina_cls", "bbox_head.retina_reg"):
            # nine anchors: three sizes s and three proportions r; row r * 3 + s there is s * 3 + r here
            rows = value.reshape(9, -1, *value.shape[1:])
            value = torch.stack([rows[s * 3 + r] for r in range(3) for s in range(3)]).reshape(
                value.shape
            )
        found[f"{layer}.{kind}"] = value
    return found


def lively_model(config: str, opts):
    torch.manual_seed(1)
    cfg = load_config(str(CONFIGS / config), [*opts, "MODEL.DEVICE", "cpu"])
    model = build_model(student_config(cfg))
    draw = torch.Generator().manual_seed(2)
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", ".bias")):
            value.normal_(0, 0.1, generator=draw)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=draw)
    return model.eval()


CASES = {
    "Mask R-CNN": ("mask_plain_r50.yaml", 2),
    "Cascade R-CNN": ("cascade_plain_r50.yaml", 2),
    "RetinaNet": ("retinanet_plain_r50.yaml", 3),
}


@pytest.mark.parametrize("case", CASES)
def test_a_detector_comes_back_whole(case, tmp_path):
    config, first_level = CASES[case]
    model = lively_model(config, SMALL)
    weights = mmdetection_names(model, first_level=first_level)
    assert len(weights) == len(model.state_dict())
    torch.save({"meta": {"epoch": 1}, "state_dict": weights}, tmp_path / "mm.pth")
    found = convert(str(tmp_path / "mm.pth"), str(CONFIGS / config), str(tmp_path / "out"), SMALL)
    assert (found.left, found.new) == ([], [])
    assert len(found.places) == len(weights)
    for key, value in model.state_dict().items():
        assert torch.equal(found.weights[key], value), key


def test_rows_of_a_retinanet_follow_its_anchors():
    """mmdetection's anchors of p3, by its formula: proportions outside, sizes inside."""
    cfg = load_config(str(CONFIGS / "retinanet_plain_r50.yaml"), SMALL)
    theirs = []
    for proportion in (0.5, 1.0, 2.0):
        for octave in range(3):
            side = 8 * 4 * 2 ** (octave / 3)
            height, width = side * proportion**0.5, side / proportion**0.5
            theirs += [-width / 2, -height / 2, width / 2, height / 2]
    model = lively_model("retinanet_plain_r50.yaml", SMALL)
    own = next(iter(model.anchor_generator.cell_anchors))
    found = in_detectron2s_order("head.bbox_pred.bias", torch.tensor(theirs), cfg)
    torch.testing.assert_close(found.view(9, 4), own)
    assert not torch.allclose(torch.tensor(theirs).view(9, 4), own)


def test_a_cascades_mask_heads_are_left(tmp_path):
    """Of three Detectron2 has the last; a box detector none of them."""
    masks = ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", *SMALL]
    config = "cascade_plain_r50.yaml"
    model = lively_model(config, masks)
    weights = {}
    for key, value in mmdetection_names(model, first_level=2).items():
        if ".mask_head." in key:
            for k in range(3):  # only the last is the model's own
                name = key.replace("mask_head.", f"mask_head.{k}.")
                weights[name] = value if k == 2 else value + 1
        else:
            weights[key] = value
    torch.save({"state_dict": weights}, tmp_path / "mm.pth")
    args = str(tmp_path / "mm.pth"), str(CONFIGS / config)
    found = convert(*args, str(tmp_path / "masks"), masks, max_left=0.2)
    assert {name.split(".")[2] for name in found.left} == {"0", "1"} and len(found.left) == 2 * 8
    for key, value in model.state_dict().items():
        assert torch.equal(found.weights[key], value), key
    found = convert(*args, str(tmp_path / "boxes"), SMALL, max_left=0.2)
    assert all(name.startswith("roi_head.mask_head.") for name in found.left) and found.new == []
    assert len(found.left) == 3 * 8


def test_a_backbone_alone_leaves_the_rest_new(tmp_path):
    model = lively_model("plain_r50.yaml", SMALL)
    weights = mmdetection_names(model, first_level=2)
    weights = {k: v for k, v in weights.items() if k.startswith("backbone.")}
    torch.save({"state_dict": weights}, tmp_path / "mm.pth")
    found = convert(str(tmp_path / "mm.pth"), str(CONFIGS / "plain_r50.yaml"), str(tmp_path / "out"), SMALL)  # fmt: skip
    assert found.left == [] and not any("bottom_up" in name for name in found.new)
    assert len(found.new) == 16 + 6 + 8  # FPN, RPN, box head


@pytest.mark.parametrize("meta, channel_order", [
    ("backbone=dict(style='caffe')", "BGR"), ("backbone=dict(style='pytorch')", "RGB"),
])  # fmt: skip
def test_the_style_in_the_file_counts(meta, channel_order, tmp_path):
    weights = mmdetection_names(lively_model("plain_r50.yaml", SMALL), first_level=2)
    torch.save({"meta": {"config": meta}, "state_dict": weights}, tmp_path / "mm.pth")
    convert(str(tmp_path / "mm.pth"), str(CONFIGS / "plain_r50.yaml"), str(tmp_path / "out"), SMALL)
    cfg = load_config(str(tmp_path / "out" / "config.yaml"))
    assert channel_order == cfg.INPUT.FORMAT
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is (channel_order == "BGR")


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("neck.fpn_convs.1.conv.bias"), r"fills the FPN of the config's model by half: backbone\.fpn_output3\.bias"),
    (lambda w: w.pop("roi_head.bbox_head.fc_reg.bias"), r"fills the heads .* by half: roi_heads\.box_predictor\.bbox_pred\.bias"),
    (lambda w: w.update({"roi_head.bbox_head.fc_cls.bias": torch.zeros(81)}),
     r"fc_cls\.bias is of shape \(81,\) where roi_heads\.box_predictor\.cls_score\.bias is \(6,\)"),
])  # fmt: skip
def test_what_fits_by_half_is_refused(change, message, tmp_path):
    weights = mmdetection_names(lively_model("plain_r50.yaml", SMALL), first_level=2)
    change(weights)
    torch.save(weights, tmp_path / "mm.pth")
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / "mm.pth"), str(CONFIGS / "plain_r50.yaml"), str(tmp_path / "out"), SMALL)  # fmt: skip
    assert not Path(tmp_path / "out").exists()
