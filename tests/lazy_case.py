"""What the tests of LazyConfigs share: a tiny ViT of Detectron2's own as a teacher."""

from __future__ import annotations

import pytest
from builders import REPO, tiny_model

FASTER = str(REPO / "configs" / "lazy" / "toy_faster_rcnn.py")
VIT = str(REPO / "configs" / "lazy" / "toy_vit_teacher.py")
TRUST = ["MODEL.TEACHER.TRUST_PYTHON_CONFIG", "True"]
SMALL_VIT = [
    "model.backbone.net.embed_dim=16", "model.backbone.net.depth=2", "model.backbone.net.num_heads=2",
    "model.backbone.out_channels=16", "model.proposal_generator.head.in_channels=16",
    "model.roi_heads.box_head.input_shape.channels=16", "model.roi_heads.box_head.fc_dims=[32]",
    "model.roi_heads.box_predictor.input_shape.channels=32",
]  # fmt: skip
SMALL_RCNN = [  # as builders.TINY
    "model.backbone.out_channels=16", "model.proposal_generator.head.in_channels=16",
    "model.roi_heads.box_head.input_shape.channels=16", "model.roi_heads.box_head.fc_dims=[32,32]",
    "model.roi_heads.box_predictor.input_shape.channels=32",
]  # fmt: skip


def vit(*opts, lazy=(), path=VIT):
    """Overrides of a student's config that name the tiny ViT as its teacher; Detectron2's ViT needs timm."""
    pytest.importorskip("timm")
    return [
        "MODEL.TEACHER.CONFIG_FILE",
        str(path),
        "MODEL.TEACHER.OPTS",
        str([*SMALL_VIT, *lazy]),
        *TRUST,
        *opts,
    ]


def under_vit(*opts, config: str = "era", **where):
    """A tiny distiller under the tiny ViT."""
    return tiny_model(config, *vit(*opts, **where))
