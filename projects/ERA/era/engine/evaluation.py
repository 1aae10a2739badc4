"""COCO evaluation of distillers, teachers and plain detectors."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn

from era.data.pictures import BadTestPictures, MarkingMapper, ReadableLoader, picture_mapper
from era.modeling.distiller import Distiller

logger = logging.getLogger(__name__)


class DetectionEvaluator(COCOEvaluator):
    """COCOEvaluator of boxes, and of masks where the model predicts them.

    No detection at all is AP 0 in all of these, because that is what it is; stock reports nan for boxes then,
    and nothing for masks.
    """

    _loader: ReadableLoader | None = None
    _skips = False

    def watch(self, loader: ReadableLoader, *, skips: bool) -> None:
        """What to do about the loader's bad pictures: a warning if ``skips``, else an end without figures."""
        self._loader, self._skips = loader, skips

    def evaluate(self, img_ids=None):
        """See ``COCOEvaluator``.

        Raises:
            BadTestPictures: in every process, if one of them met a bad picture that is not to be skipped.
        """
        mine = self._loader.bad if self._loader is not None else []
        bad = [sentence for part in comm.all_gather(mine) for sentence in part]
        if bad:
            message = f"{len(bad)} pictures of the test set {self._metadata.name!r} cannot be used, first: {bad[0]}"
            if not self._skips:
                raise BadTestPictures(
                    f"{message}, or set INPUT.ON_BAD_IMAGE skip to count what is on them as missed"
                )
            logger.warning("%s; INPUT.ON_BAD_IMAGE skip: what is on them counts as missed", message)
        return super().evaluate(img_ids)

    def process(self, inputs, outputs):
        """Take the detections of some images; see ``COCOEvaluator``."""
        if any(output["instances"].has("pred_masks") for output in outputs):
            self._tasks = ("bbox", "segm")
        super().process(inputs, outputs)

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if coco_eval is None:
            results = dict.fromkeys(results, 0.0)
        return results


def build_test_loader(cfg: CfgNode, name: str) -> ReadableLoader:
    """Detectron2's loader of a test set, which leaves out pictures that cannot be used and remembers why."""
    mapper = MarkingMapper(picture_mapper(cfg, is_train=False))
    return ReadableLoader(build_detection_test_loader(cfg, name, mapper=mapper))


def evaluate(cfg: CfgNode, model: nn.Module, *, output_dir: str | None = None) -> OrderedDict:
    """COCO metrics of a model on every ``DATASETS.TEST``.

    Args:
        output_dir: where detections go; default ``OUTPUT_DIR/inference``.

    Returns:
        ``{"bbox": {"AP": ..., ...}}`` for one dataset, with ``segm`` beside it if the model predicts masks;
        for several, that by dataset name. AP in points of 100. Empty on processes other than the main one.

    Raises:
        BadTestPictures: in every process, with ``INPUT.ON_BAD_IMAGE stop``, at the end of a dataset with pictures
            that cannot be used. With skip that is a warning, and what is on them counts as missed.
    """
    results = OrderedDict()
    output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
    for name in cfg.DATASETS.TEST:
        loader = build_test_loader(cfg, name)
        evaluator = DetectionEvaluator(name, output_dir=output_dir)
        evaluator.watch(loader, skips=cfg.INPUT.ON_BAD_IMAGE == "skip")
        results[name] = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            logger.info("Evaluation results for %s in csv format:", name)
            print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def evaluate_teacher(cfg: CfgNode, distiller: Distiller) -> OrderedDict:
    """COCO metrics of the distiller's teacher on the student's test images."""
    logger.info("Evaluating the teacher (TEST.EVAL_TEACHER True) ...")
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", "teacher")
    return evaluate(cfg, distiller.teacher, output_dir=folder)
