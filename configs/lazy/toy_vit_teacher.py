"""A small ViT with a simple feature pyramid (ViTDet, arXiv 2203.16527) as a teacher on the toy data: the heads of
toy_faster_rcnn.py on p3 to p6 of Detectron2's own ViT."""

from functools import partial

from detectron2.config import LazyCall as L
from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from .toy_faster_rcnn import CHANNELS, model

model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=128,
        patch_size=16,
        embed_dim=96,
        depth=4,
        num_heads=4,
        drop_path_rate=0.1,
        window_size=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_block_indexes=[0, 2],  # the others see the whole picture
        use_rel_pos=True,
        out_feature="last_feat",
    ),
    in_feature="last_feat",
    out_channels=CHANNELS,
    scale_factors=(2.0, 1.0, 0.5),  # of stride 16: p3 to p5; p6 is a part of p5
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
    square_pad=128,
)
model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
model.input_format = "RGB"

frame = {"config_file": "configs/toy/plain.yaml", "opts": ["OUTPUT_DIR", "output/lazy/vit_teacher"]}
