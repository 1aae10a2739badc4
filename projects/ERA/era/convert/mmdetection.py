"""Names of mmdetection's detectors, from version 2.0 on, in Detectron2's words.

Known: Faster, Mask and Cascade (Mask) R-CNN and RetinaNet on an FPN. Of a cascade's three mask heads Detectron2 has the last
one alone. Both number classes alike with the background last, and lay out ROI features and box deltas alike; only
RetinaNet's anchors stand in another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from detectron2.config import CfgNode
from torch import Tensor

BACKBONE = "backbone."
PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")
# mmdetection's name to Detectron2's.
RULES: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"rpn_head\.rpn_conv\.", "proposal_generator.rpn_head.conv."),
    (r"rpn_head\.rpn_cls\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"rpn_head\.rpn_reg\.", "proposal_generator.rpn_head.anchor_deltas."),
    (
        r"roi_head\.bbox_head\.(\d+\.)?shared_fcs\.(\d+)\.",
        lambda found: f"roi_heads.box_head.{found[1] or ''}fc{int(found[2]) + 1}.",
    ),
    (r"roi_head\.bbox_head\.(\d+\.)?fc_cls\.", r"roi_heads.box_predictor.\1cls_score."),
    (r"roi_head\.bbox_head\.(\d+\.)?fc_reg\.", r"roi_heads.box_predictor.\1bbox_pred."),
    (
        r"roi_head\.mask_head\.(?:2\.)?convs\.(\d+)\.conv\.",
        lambda found: f"roi_heads.mask_head.mask_fcn{int(found[1]) + 1}.",
    ),
    (r"roi_head\.mask_head\.(?:2\.)?upsample\.", "roi_heads.mask_head.deconv."),
    (r"roi_head\.mask_head\.(?:2\.)?conv_logits\.", "roi_heads.mask_head.predictor."),
    (
        r"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.",
        lambda found: f"head.{'cls' if found[1] == 'cls' else 'bbox'}_subnet.{2 * int(found[2])}.",
    ),
    (r"bbox_head\.retina_cls\.", "head.cls_score."),
    (r"bbox_head\.retina_reg\.", "head.bbox_pred."),
)


def is_mmdetection(names: list[str]) -> bool:
    """Whether names are of an mmdetection detector, or of a backbone that one of its relatives saved."""
    return any(name.startswith(BACKBONE) for name in names)


def is_part(name: str) -> bool:
    """Whether a tensor is of a detector's neck or heads."""
    return name.startswith(PARTS)


def detector_name(name: str, levels: list[int]) -> str:
    """What Detectron2 calls a tensor of neck or heads; any text for one that it does not have.

    Args:
        levels: of the model's FPN on the backbone's maps, such as 2, 3, 4, 5.
    """
    if found := re.match(r"neck\.(lateral|fpn)_convs\.(\d+)\.conv\.(.*)", name):
        kind, index, rest = found[1], int(found[2]), found[3]
        if index < len(levels):
            return (
                f"backbone.fpn_{'lateral' if kind == 'lateral' else 'output'}{levels[index]}.{rest}"
            )
        return f"backbone.top_block.p{levels[-1] + index - len(levels) + 1}.{rest}"
    for pattern, replacement in RULES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def in_detectron2s_order(name: str, value: Tensor, cfg: CfgNode) -> Tensor:
    """A tensor whose rows are the anchors of RetinaNet, in Detectron2's order: mmdetection counts sizes within proportions,
    Detectron2 proportions within sizes. Any other tensor as it is.

    Args:
        name: Detectron2's.
        value: (A * n, ...).
    """
    if not re.match(r"head\.(cls_score|bbox_pred)\.", name):
        return value
    sizes = len(cfg.MODEL.ANCHOR_GENERATOR.SIZES[0])
    proportions = len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0])
    if value.shape[0] % (sizes * proportions):
        return value  # of other anchors: its shape will not fit
    rows = value.reshape(proportions, sizes, -1, *value.shape[1:])
    return rows.transpose(0, 1).reshape(value.shape)
