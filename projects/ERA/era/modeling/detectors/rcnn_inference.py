"""R-CNN inference with the heads of two models, and with a backbone and heads of different ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from detectron2.modeling import Backbone, GeneralizedRCNN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from era import compat

if TYPE_CHECKING:
    from era.modeling.detectors.rcnn import RCNN


class BlendedRCNN:
    """Student backbone and FPN, then predictions ``(1 - alpha) * student's + alpha * teacher's heads``.

    RPN logits and deltas are blended before proposals are chosen, ROI class logits and box deltas before
    detections are; anchors, proposals and box coders are common. Of a cascade each stage's are blended, on the boxes
    that the blended ones of the stage before give. Thresholds and top-k counts are the
    student's. At alpha 1 the student's heads are not run, and masks and keypoints, if any, come from the
    student on the final boxes.

    Args:
        student: provides backbone, its own heads, anchors and test settings.
        teacher: only its RPN and ROI box heads are used.
        estimate: from the student's feature maps and preprocessed batch to the maps that the teacher's heads see.
        alpha: above 0, at most 1.
    """

    def __init__(
        self,
        student: RCNN,
        teacher: RCNN,
        estimate: Callable[[dict, Tensor], dict],
        alpha: float,
    ):
        self.student = student
        self.estimate = estimate
        self.judges = [(alpha, teacher, True)]  # weight, detector, whether it reads the estimate
        if alpha < 1:
            self.judges.append((1 - alpha, student, False))

    def __call__(self, batched_inputs: list[dict], do_postprocess: bool = True) -> list:
        """As ``GeneralizedRCNN.inference``: a dict with ``instances`` an image, or raw Instances."""
        student = self.student.model
        images = student.preprocess_image(batched_inputs)
        features = student.backbone(images.tensor)
        inputs = {True: self.estimate(features, images.tensor), False: features}
        proposals = self._proposals(images, features, inputs)
        results = self._detections(inputs, proposals)
        results = student.roi_heads.forward_with_given_boxes(features, results)
        if do_postprocess:
            return compat.postprocess(results, batched_inputs, images.image_sizes)
        return results

    def _proposals(
        self, images: ImageList, features: dict[str, Tensor], inputs: dict[bool, dict]
    ) -> list[Instances]:
        own = self.student.model.proposal_generator
        anchors = own.anchor_generator([features[level] for level in own.in_features])
        outputs = [judge.predict_anchors(inputs[est]) for _, judge, est in self.judges]
        logits = [self._blend(level) for level in zip(*(p[0] for p in outputs), strict=True)]
        deltas = [self._blend(level) for level in zip(*(p[1] for p in outputs), strict=True)]
        # below alpha 1 both box coders are equal, which is checked when the method is built
        coder = self.judges[0][1].model.proposal_generator
        return find_top_rpn_proposals(
            compat.decode_proposals(coder, anchors, deltas),
            logits,
            images.image_sizes,
            own.nms_thresh,
            own.pre_nms_topk[False],
            own.post_nms_topk[False],
            own.min_box_size,
            False,
        )

    def _detections(self, inputs: dict[bool, dict], proposals: list[Instances]) -> list[Instances]:
        own = self.student.box_stages[-1].predictor
        teacher, by_stage, boxes = self.judges[0][1], [], []
        for stage, (_, predictor) in enumerate(teacher.box_stages):
            if stage > 0:
                proposals = proposals_from(boxes, proposals)
            outputs = [
                judge.predict_stage(stage, inputs[est], proposals) for _, judge, est in self.judges
            ]
            predictions = tuple(self._blend(parts) for parts in zip(*outputs, strict=True))
            boxes = predictor.predict_boxes(predictions, proposals)
            by_stage.append(predictor.predict_probs(predictions, proposals))
        results, _ = fast_rcnn_inference(
            boxes,
            [sum(scores) * (1.0 / len(by_stage)) for scores in zip(*by_stage, strict=True)],
            [p.image_size for p in proposals],
            own.test_score_thresh,
            own.test_nms_thresh,
            own.test_topk_per_image,
        )
        return results

    def _blend(self, predictions) -> Tensor:
        """Weighted sum over the judges; the prediction itself when there is one."""
        if len(self.judges) == 1:
            return predictions[0]
        return sum(
            weight * prediction
            for (weight, _, _), prediction in zip(self.judges, predictions, strict=True)
        )


def proposals_from(boxes: Sequence[Tensor], proposals: Sequence[Instances]) -> list[Instances]:
    """What the next stage of a cascade sees: the boxes that a stage decoded out of its proposals, cut to their image,
    without gradient; rows stay.

    Args:
        boxes: (R, 4) an image.
        proposals: the stage's own, for the sizes of the images.
    """
    found = []
    for own, before in zip(boxes, proposals, strict=True):
        clipped = Boxes(own.detach())
        clipped.clip(before.image_size)
        found.append(Instances(before.image_size, proposal_boxes=clipped))
    return found


def rcnn_with_heads(student: RCNN, teacher: RCNN, backbone: Backbone) -> GeneralizedRCNN:
    """A box detector in eval mode of a backbone and copies of the teacher's heads.

    It computes what :class:`BlendedRCNN` computes at alpha 1 where the backbone gives the estimate. The
    heads get the student's test settings, the model the student's preprocessing.
    """
    rpn = copy.deepcopy(teacher.model.proposal_generator)
    own = student.model.proposal_generator
    rpn.nms_thresh, rpn.min_box_size = own.nms_thresh, own.min_box_size
    rpn.pre_nms_topk, rpn.post_nms_topk = dict(own.pre_nms_topk), dict(own.post_nms_topk)
    roi_heads = copy.deepcopy(teacher.model.roi_heads)
    for head in ("mask", "keypoint"):  # a Mask R-CNN may teach; its boxes are what is used
        setattr(roi_heads, f"{head}_on", False)
        for part in ("in_features", "pooler", "head"):
            if hasattr(roi_heads, f"{head}_{part}"):
                delattr(roi_heads, f"{head}_{part}")
    model = GeneralizedRCNN(
        backbone=backbone,
        proposal_generator=rpn,
        roi_heads=roi_heads,
        pixel_mean=student.model.pixel_mean.flatten().tolist(),
        pixel_std=student.model.pixel_std.flatten().tolist(),
        input_format=student.model.input_format,
    )
    settings = student.box_stages[-1].predictor
    for stage in type(teacher)(model).box_stages:
        for key in ("test_score_thresh", "test_nms_thresh", "test_topk_per_image"):
            setattr(stage.predictor, key, getattr(settings, key))
    return model.requires_grad_(False).eval()
