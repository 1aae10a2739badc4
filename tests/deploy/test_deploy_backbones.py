"""Small backbones in ONNX and OpenVINO: their maps are those of eager, at several sizes.

A whole detector on one of them is exported in ``tests/engine/test_small_student.py``.
"""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from deploy_case import FOLDER, ROOT, needs
from detectron2.modeling import build_backbone
from torch import nn

from era.config import load_config
from era.deploy.formats import OPSET, quiet

BACKBONES = {
    "MobileNetV2": ["NAME", "build_mobilenetv2_fpn_backbone"],
    "MobileNetV3": ["NAME", "build_torchvision_fpn_backbone", "MODEL.TORCHVISION.NAME", "mobilenet_v3_small"],
    "ResNet-18": ["NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18,
                  "MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
    **{
        f"timm's {name}": ["NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", name]
        for name in ("efficientnet_lite0", "tf_efficientnet_lite0", "convnext_atto", "repvgg_a0")
    },
}  # fmt: skip
SIZES = [(64, 96), (96, 64), (96, 160), (224, 96)]  # divisible by 32, as in a detector


class Maps(nn.Module):
    """A backbone that gives a tuple, as a graph does."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, image):
        return tuple(self.backbone(image).values())


@functools.cache
def graph(name: str) -> tuple[nn.Module, str]:
    """The backbone and FPN of a toy config, and the ONNX file of it with free height and width."""
    if "timm" in name and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    torch.manual_seed(0)
    key, value, *opts = BACKBONES[name]
    opts = [f"MODEL.BACKBONE.{key}", value, *opts]
    cfg = load_config(str(ROOT / "configs" / "toy" / "plain.yaml"), opts)
    model = Maps(build_backbone(cfg)).eval()
    path = FOLDER / f"backbone-{len(list(FOLDER.glob('backbone-*')))}.onnx"
    levels = list(model.backbone.output_shape())
    with torch.no_grad(), quiet():
        torch.onnx.export(
            model, (torch.rand(1, 3, 96, 128),), str(path), opset_version=OPSET, dynamo=False,
            input_names=["image"], output_names=levels,
            dynamic_axes={k: {2: f"{k}_height", 3: f"{k}_width"} for k in ("image", *levels)},
        )  # fmt: skip
    return model, str(path)


def onnx(path: str):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})


def openvino(path: str):
    import openvino as ov

    compiled = ov.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: list(compiled(image).values())


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("runtime", [
    pytest.param(load, marks=needs(load.__name__).marks, id=load.__name__) for load in (onnx, openvino)
])  # fmt: skip
def test_maps_equal_eagers_at_many_sizes(runtime, name):
    model, path = graph(name)
    run, draw = runtime(path), torch.Generator().manual_seed(1)
    for size in SIZES:
        image = torch.rand(1, 3, *size, generator=draw) * 4 - 2
        with torch.no_grad():
            expected = model(image)
        for map_, found in zip(expected, run(image.numpy()), strict=True):
            found = torch.from_numpy(found)
            assert map_.shape == found.shape
            assert (map_ - found).abs().max() < 1e-4 * map_.abs().max(), size
