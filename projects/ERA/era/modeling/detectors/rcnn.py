"""The student is a stock Detectron2 model; this file watches one of its training steps.

The student's own ``forward`` runs unchanged, so its losses are those of plain training whatever a method
does. What the methods need of the step is recorded by hooks that live only while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from era.errors import UserError


@dataclass
class Recording:
    """What a training step of the student produced on its way to the losses.

    Attributes:
        images: the student's preprocessed, padded batch.
        targets: ground truth of each image, boxes in pixels of the resized image.
        features: FPN maps, level name to (B, C_S, H, W), with gradient.
        anchors: the RPN's anchors, one :class:`Boxes` a level, pixels.
        anchor_labels: per image, (sum of H * W * A,) of 1 object, 0 background, -1 not sampled.
        anchor_boxes: per image, the matched ground-truth box of every anchor, (sum of H * W * A, 4).
        anchors_per_image: ``MODEL.RPN.BATCH_SIZE_PER_IMAGE``, what the RPN's losses are divided by.
        proposals: per image, the sampled proposals with ``gt_classes`` (and ``gt_boxes`` if any).
        roi_features: the box pooler's output on those proposals, (R, C_S, P, P), with gradient.
        roi_predictions: class logits (R, K + 1) and box deltas (R, 4K or 4), with gradient.
        chosen: what :func:`era.methods.era.proposals.chosen_proposals` chose of ``proposals``, by count.
    """

    images: ImageList = None
    targets: list[Instances] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    anchors: list[Boxes] = field(default_factory=list)
    anchor_labels: list[Tensor] = field(default_factory=list)
    anchor_boxes: list[Tensor] = field(default_factory=list)
    anchors_per_image: int = 0
    proposals: list[Instances] = field(default_factory=list)
    roi_features: Tensor = None
    roi_predictions: tuple[Tensor, Tensor] = None
    chosen: dict[int, object] = field(default_factory=dict)


def check_student(student: nn.Module) -> None:
    """A student that can be distilled: GeneralizedRCNN with an FPN, an RPN and one box head.

    Raises:
        UserError: it is something else.
    """
    found = None
    if not isinstance(student, GeneralizedRCNN):
        found = f"a {type(student).__name__}"
    elif not isinstance(student.proposal_generator, RPN):
        found = f"a {type(student.proposal_generator).__name__} as proposal generator"
    elif not isinstance(student.roi_heads, StandardROIHeads) or not isinstance(
        student.roi_heads.box_predictor, FastRCNNOutputLayers
    ):
        found = f"{type(student.roi_heads).__name__} as ROI heads"
    elif student.roi_heads.train_on_pred_boxes:
        found = "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES True, which moves the proposals"
    if found:
        raise UserError(
            f"the student has {found}: expected a GeneralizedRCNN with an RPN and StandardROIHeads "
            "trained on the RPN's proposals; change MODEL.DISTILLER.STUDENT_META_ARCHITECTURE, "
            "MODEL.PROPOSAL_GENERATOR or MODEL.ROI_HEADS."
        )


@contextmanager
def record(student: GeneralizedRCNN) -> Iterator[Recording]:
    """Record the student's next training forward.

    Forward hooks and one wrapped method (the RPN's public ``label_and_sample_anchors``) are put on at
    entry and taken off at exit, also when the forward fails.
    """
    recording = Recording(anchors_per_image=student.proposal_generator.batch_size_per_image)
    rpn, roi_heads = student.proposal_generator, student.roi_heads

    def on_rpn_input(_module, args):
        recording.images, recording.features, recording.targets = args

    def on_anchors(_module, _args, output):
        recording.anchors = output

    def on_roi_heads(_module, _args, output):
        recording.proposals = output[0]

    def on_pooler(_module, _args, output):
        recording.roi_features = output

    def on_predictor(_module, _args, output):
        recording.roi_predictions = output

    label_and_sample = rpn.label_and_sample_anchors

    def label_and_keep(anchors, gt_instances):
        labels, boxes = label_and_sample(anchors, gt_instances)
        recording.anchor_labels, recording.anchor_boxes = labels, boxes
        return labels, boxes

    handles = [
        rpn.register_forward_pre_hook(on_rpn_input),
        rpn.anchor_generator.register_forward_hook(on_anchors),
        roi_heads.register_forward_hook(on_roi_heads),
        roi_heads.box_pooler.register_forward_hook(on_pooler),
        roi_heads.box_predictor.register_forward_hook(on_predictor),
    ]
    rpn.label_and_sample_anchors = label_and_keep
    try:
        yield recording
    finally:
        del rpn.label_and_sample_anchors
        for handle in handles:
            handle.remove()
