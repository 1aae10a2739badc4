"""FCOS by a YAML config: its keys, and the model that Detectron2's lazy config ``common/models/fcos.py`` builds."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos


def add_fcos_config(cfg: CfgNode) -> None:
    """Add ``MODEL.FCOS``, with the values of Detectron2's lazy config; its meaning of the keys is that of
    ``MODEL.RETINANET``."""
    cfg.MODEL.FCOS = CfgNode()
    cfg.MODEL.FCOS.NUM_CLASSES = 80  # foreground
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.FCOS.NUM_CONVS = 4  # convs of a tower, as wide as the FPN, before the last layers
    cfg.MODEL.FCOS.NORM = (
        "GN"  # after each of them; GN has 32 groups, of channels that these divide
    )
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01  # class probability at the start, by the bias
    # An anchor point is an object's within so many strides of its centre; arXiv 2006.09214, section 2.2.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25  # alpha
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0  # gamma
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2  # of sqrt(class probability * centerness)
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000  # of each level, before NMS
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6  # IoU


def build_fcos(cfg: CfgNode) -> fcos.FCOS:
    """Detectron2's FCOS as ``MODEL.FCOS`` describes it, with ``MODEL.BACKBONE`` and ``MODEL.PIXEL_MEAN`` and ``_STD``."""
    keys, backbone = cfg.MODEL.FCOS, build_backbone(cfg)
    shapes = [backbone.output_shape()[level] for level in keys.IN_FEATURES]
    head = fcos.FCOSHead(
        input_shape=shapes,
        num_classes=keys.NUM_CLASSES,
        conv_dims=[shapes[0].channels] * keys.NUM_CONVS,
        prior_prob=keys.PRIOR_PROB,
        norm=keys.NORM,
    )
    return fcos.FCOS(
        backbone=backbone,
        head=head,
        head_in_features=list(keys.IN_FEATURES),
        num_classes=keys.NUM_CLASSES,
        center_sampling_radius=keys.CENTER_SAMPLING_RADIUS,
        focal_loss_alpha=keys.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=keys.FOCAL_LOSS_GAMMA,
        test_score_thresh=keys.SCORE_THRESH_TEST,
        test_topk_candidates=keys.TOPK_CANDIDATES_TEST,
        test_nms_thresh=keys.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


build_fcos.__name__ = "FCOS"  # what MODEL.META_ARCHITECTURE names
META_ARCH_REGISTRY.register(build_fcos)
