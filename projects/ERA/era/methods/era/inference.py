"""Inference between the plain student (alpha 0) and the teacher's heads on the estimate (alpha 1)."""

from __future__ import annotations

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from era.methods.era.mbrnet import FeatureEstimator
from era.methods.era.twi import roi_predictions, rpn_predictions


class BlendedDetector:
    """Student backbone and FPN, then predictions ``(1 - alpha) * student + alpha * teacher's heads``.

    RPN logits and deltas are blended before proposals are chosen, ROI class logits and box deltas before
    detections are; anchors, proposals and box coders are common. The teacher's heads see ``e_N``.
    Thresholds and top-k counts are the student's. At alpha 1 the student's heads are not run, and masks
    and keypoints, if any, come from the student on the final boxes.

    Not a module: it owns nothing.

    Args:
        student: provides backbone, its own heads, anchors and test settings.
        teacher: the teacher's model; only its RPN and ROI box heads are used.
        estimator: gives ``e_N``.
        alpha: above 0, at most 1.
    """

    def __init__(
        self,
        student: GeneralizedRCNN,
        teacher: GeneralizedRCNN,
        estimator: FeatureEstimator,
        alpha: float,
    ):
        self.student = student
        self.estimator = estimator
        self.alpha = alpha
        # (weight, RPN, ROI heads, whether they read the estimate)
        self.judges = [(alpha, teacher.proposal_generator, teacher.roi_heads, True)]
        if alpha < 1:
            self.judges.append((1 - alpha, student.proposal_generator, student.roi_heads, False))

    def __call__(self, batched_inputs: list[dict], do_postprocess: bool = True):
        """As ``GeneralizedRCNN.inference``: a dict with ``instances`` an image, or raw Instances."""
        student = self.student
        images = student.preprocess_image(batched_inputs)
        features = student.backbone(images.tensor)
        inputs = {True: self.estimator.final(features), False: features}
        proposals = self._proposals(images, features, inputs)
        results = self._detections(inputs, proposals)
        results = student.roi_heads.forward_with_given_boxes(features, results)
        if do_postprocess:
            return GeneralizedRCNN._postprocess(results, batched_inputs, images.image_sizes)
        return results

    def _proposals(
        self, images: ImageList, features: dict[str, Tensor], inputs: dict[bool, dict]
    ) -> list[Instances]:
        own = self.student.proposal_generator
        anchors = own.anchor_generator([features[level] for level in own.in_features])
        by_judge = [rpn_predictions(rpn, inputs[est]) for _, rpn, _, est in self.judges]
        logits = [self._blend(level) for level in zip(*(p[0] for p in by_judge), strict=True)]
        deltas = [self._blend(level) for level in zip(*(p[1] for p in by_judge), strict=True)]
        coder = self.judges[0][1]  # below alpha 1 both coders are equal, which is checked at build
        return find_top_rpn_proposals(
            coder._decode_proposals(anchors, deltas),
            logits,
            images.image_sizes,
            own.nms_thresh,
            own.pre_nms_topk[False],
            own.post_nms_topk[False],
            own.min_box_size,
            False,
        )

    def _detections(self, inputs: dict[bool, dict], proposals: list[Instances]) -> list[Instances]:
        own = self.student.roi_heads.box_predictor
        boxes: list[Boxes] = [p.proposal_boxes for p in proposals]
        by_judge = [roi_predictions(roi, inputs[est], boxes) for _, _, roi, est in self.judges]
        predictions = (
            self._blend([p[0] for p in by_judge]),
            self._blend([p[1] for p in by_judge]),
        )
        coder = self.judges[0][2].box_predictor
        results, _ = fast_rcnn_inference(
            coder.predict_boxes(predictions, proposals),
            coder.predict_probs(predictions, proposals),
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
            for (weight, *_), prediction in zip(self.judges, predictions, strict=True)
        )
