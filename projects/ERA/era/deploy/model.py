"""The models that are deployed, both ordinary ``GeneralizedRCNN``: the plain student (alpha 0), and the
student's backbone with MBRNet under copies of the teacher's heads (alpha 1)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, build_model
from torch import nn

from era.checkpoint.reading import SafeCheckpointer, load_exactly
from era.config import load_config, student_config
from era.errors import UserError
from era.modeling.teacher import teacher_config


def refuse_masks(model: GeneralizedRCNN, what: str) -> None:
    """Deployed models give boxes.

    Raises:
        UserError: the model has a mask or keypoint head.
    """
    if model.roi_heads.mask_on or model.roi_heads.keypoint_on:
        raise UserError(
            f"the student has a mask or keypoint head, and {what} deploys boxes alone: set MODEL.MASK_ON "
            "and MODEL.KEYPOINT_ON False with weights that have no such heads."
        )


def thresholds(model: GeneralizedRCNN) -> dict[str, float | int]:
    """Score threshold, NMS threshold (IoU) and most detections an image."""
    head = model.roi_heads.box_predictor
    return {
        "score_threshold": head.test_score_thresh,
        "nms_threshold": head.test_nms_thresh,
        "max_detections": head.test_topk_per_image,
    }


class EagerBackend:
    """An eager model behind :class:`era_runtime.Predictor`; takes batches of any size.

    Args:
        model: ``GeneralizedRCNN`` or :class:`~era.modeling.distiller.Distiller`, in eval mode.
    """

    max_batch = None

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.no_grad()
    def __call__(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """See :class:`era_runtime.predictor.Backend`."""
        inputs = [{"image": torch.from_numpy(image)} for image in images]
        return [
            (
                r.pred_boxes.tensor.cpu().numpy(),
                r.scores.cpu().numpy(),
                r.pred_classes.cpu().numpy(),
            )
            for r in self.model.inference(inputs, do_postprocess=False)
        ]


def save_folder(model: GeneralizedRCNN, cfg: CfgNode, alpha: int, folder: Path) -> None:
    """Write ``model.pth`` and ``config.yaml``, and for alpha 1 ``teacher.yaml``, the teacher's config.

    At alpha 0 both are stock Detectron2 files; nothing of this project is in them.
    """
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    if alpha == 0:
        cfg = student_config(cfg)
    else:
        teacher = teacher_config(cfg)
        (folder / "teacher.yaml").write_text(teacher.dump(), encoding="utf-8")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.TEACHER.CONFIG_FILE, cfg.MODEL.TEACHER.WEIGHTS = "teacher.yaml", ""
        cfg.MODEL.TEACHER.OPTS = []
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "model.pth", "."
    (folder / "config.yaml").write_text(cfg.dump(), encoding="utf-8")


def load_folder(folder: Path, manifest: dict) -> GeneralizedRCNN:
    """The model of a deployment folder of format ``detectron2``, on the CPU in eval mode.

    Raises:
        UserError: weights and config do not fit each other.
    """
    cfg = load_config(str(folder / "config.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TEACHER.WEIGHTS = ""  # a folder's config names nothing that is fetched
    if manifest["alpha"] == 0:
        model = build_model(cfg)
    else:
        cfg.MODEL.TEACHER.CONFIG_FILE = str(folder / "teacher.yaml")
        cfg.MODEL.TEACHER.ALLOW_RANDOM = True  # its heads come with model.pth
        model = build_model(cfg).deployable()
    load_exactly(model, str(folder / "model.pth"), what="the folder's")
    return model.requires_grad_(False).eval()


class WholeCheckpointer(SafeCheckpointer):
    """Remembers which weights the last file held.

    Attributes:
        keys: names of the weights in the file as it was.
    """

    keys: frozenset[str] = frozenset()

    def _load_model(self, checkpoint: dict):
        self.keys = frozenset(checkpoint["model"])
        return super()._load_model(checkpoint)
