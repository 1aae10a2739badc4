"""What a training step of an R-CNN leaves for the methods, watched by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from era.modeling.detectors.rcnn_heads import keypoints_recorded
from era.modeling.detectors.rcnn_losses import RCNNRecording
from era.modeling.detectors.recording import Predictions

if TYPE_CHECKING:
    from era.modeling.detectors.rcnn import RCNN


@contextmanager
def recorded(detector: RCNN, kind: type[RCNNRecording] = RCNNRecording) -> Iterator[RCNNRecording]:
    """:meth:`Detector.record`: forward hooks and one wrapped method (the RPN's public ``label_and_sample_anchors``) are put on at
    entry and taken off at exit. Of a cascade it is the first stage that is watched.

    Args:
        kind: of the recording.
    """
    model = detector.model
    rpn, roi_heads = model.proposal_generator, model.roi_heads
    recording = kind(anchors_per_image=rpn.batch_size_per_image, num_classes=detector.num_classes)

    def on_rpn_input(_module, args):
        recording.images, recording.features, recording.targets = args

    def on_stages(_module, _args, output):
        recording.stages = output

    def on_anchors(_module, _args, output):
        recording.anchors = output

    def on_rpn_head(_module, _args, output):
        recording.rpn_output = output

    def on_roi_heads(_module, _args, output):
        recording.proposals = output[0]

    def on_pooler(_module, _args, output):
        if recording.roi_features is None:  # later stages pool at boxes of their own
            recording.roi_features = output

    def on_first_layer(_module, _args, output):
        recording.hidden = output

    def on_box_head(_module, _args, output):
        recording.vectors = output

    def on_predictor(_module, _args, output):
        recording.predictions = Predictions(*output)

    label_and_sample = rpn.label_and_sample_anchors

    def label_and_keep(anchors, gt_instances):
        labels, boxes = label_and_sample(anchors, gt_instances)
        recording.anchor_labels, recording.anchor_boxes = labels, boxes
        return labels, boxes

    handles = [
        rpn.register_forward_pre_hook(on_rpn_input),
        rpn.anchor_generator.register_forward_hook(on_anchors),
        rpn.rpn_head.register_forward_hook(on_rpn_head),
        roi_heads.register_forward_hook(on_roi_heads),
        roi_heads.box_pooler.register_forward_hook(on_pooler),
        detector.box_head.register_forward_hook(on_box_head),
        detector.box_predictor.register_forward_hook(on_predictor),
    ]
    if detector.stage_shapes:
        handles.append(model.backbone.bottom_up.register_forward_hook(on_stages))
    for layer in getattr(detector.box_head, "fcs", [])[:1]:
        handles.append(layer.register_forward_hook(on_first_layer))
    rpn.label_and_sample_anchors = label_and_keep
    try:
        with keypoints_recorded(detector, recording):
            yield recording
    finally:
        del rpn.label_and_sample_anchors
        for handle in handles:
            handle.remove()
