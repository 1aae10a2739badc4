"""A small Faster R-CNN for the toy data as a LazyConfig: the same detector as configs/toy/plain.yaml.

`model` is the student; `frame` names the YAML config with all the rest (data, schedule, methods, teacher).
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, GeneralizedRCNN, ResNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, StandardROIHeads

WIDTHS = (16, 32, 64, 128)  # of res2 to res5
CHANNELS, CLASSES = 64, 8
LEVELS, ROI_LEVELS = ["p3", "p4", "p5", "p6"], ["p3", "p4", "p5"]


def narrow_stages(widths):
    """res2 to res5 of one basic block each."""
    return [
        ResNet.make_stage(
            BasicBlock,
            1,
            stride_per_block=[1 if i == 0 else 2],
            in_channels=widths[max(i - 1, 0)],
            out_channels=width,
            norm="BN",
        )
        for i, width in enumerate(widths)
    ]


model = L(GeneralizedRCNN)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=16, norm="BN"),
            stages=L(narrow_stages)(widths=WIDTHS),
            out_features=["res2", "res3", "res4", "res5"],
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=CHANNELS,
        top_block=L(LastLevelMaxPool)(),
    ),
    proposal_generator=L(RPN)(
        in_features=LEVELS,
        head=L(StandardRPNHead)(in_channels=CHANNELS, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[24], [36], [52], [76]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=128,
        positive_fraction=0.5,
        pre_nms_topk=(300, 200),
        post_nms_topk=(150, 100),
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=CLASSES,
        batch_size_per_image=32,
        positive_fraction=0.5,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=ROI_LEVELS,
        box_pooler=L(ROIPooler)(
            output_size=7,
            scales=(1.0 / 8, 1.0 / 16, 1.0 / 32),
            sampling_ratio=1,
            pooler_type="ROIAlignV2",
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels=CHANNELS, height=7, width=7),
            conv_dims=[],
            fc_dims=[256, 256],
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=256),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
        ),
    ),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[57.375, 57.120, 58.395],
    input_format="BGR",
)

frame = {"config_file": "configs/toy/plain.yaml", "opts": ["OUTPUT_DIR", "output/lazy/plain"]}
