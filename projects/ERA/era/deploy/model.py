"""The models that are deployed: eager behind the runtime's interface, and the folder format ``detectron2``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import ImageList, Instances
from torch import nn

from era.checkpoint.reading import SafeCheckpointer, load_exactly
from era.config import load_config, student_config
from era.errors import UserError
from era.modeling.detectors import Detector, detector_of, family_of
from era.modeling.distiller import Distiller
from era.modeling.teacher_config import teacher_config
from era.registry import LAZY


def refuse_keypoints(detector: Detector, name: str) -> None:
    """Deployed models give boxes and masks.

    Args:
        name: of the format.

    Raises:
        UserError: the model predicts keypoints.
    """
    if detector.keypoint_on:
        raise UserError(
            f"the student predicts keypoints, and format {name} gives boxes and masks alone: set "
            "MODEL.KEYPOINT_ON False with weights that have no such head, or export format detectron2."
        )


def raw_outputs(found: Instances) -> tuple[torch.Tensor, ...]:
    """Boxes (n, 4), scores (n,), classes (n,) and, if the model predicts masks, their probabilities (n, M, M),
    of one image's detections before postprocessing."""
    outputs = found.pred_boxes.tensor, found.scores, found.pred_classes
    return (*outputs, found.pred_masks[:, 0]) if found.has("pred_masks") else outputs


class EagerBackend:
    """An eager model behind :class:`era_runtime.Predictor`; takes batches of any size.

    Args:
        model: a stock model of a known family, or a :class:`~era.modeling.distiller.Distiller`, in eval
            mode.
    """

    max_batch = None

    def __init__(self, model: nn.Module):
        is_distiller = isinstance(model, Distiller)
        self.detect = model.inference if is_distiller else detector_of(model).detect

    @torch.no_grad()
    def __call__(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
        """See :class:`era_runtime.predictor.Backend`."""
        inputs = [{"image": torch.from_numpy(image)} for image in images]
        return [
            tuple(output.cpu().numpy() for output in raw_outputs(found))
            for found in self.detect(inputs, do_postprocess=False)
        ]


class PaddedEagerBackend:
    """An eager model behind :class:`era_runtime.Predictor`, on batches that are padded to one shape.

    Args:
        model: an ordinary model of a known family, in eval mode.
        shape: (height, width), pixels.
    """

    max_batch = None

    def __init__(self, model: nn.Module, shape: tuple[int, int]):
        self.model, self.shape = model, shape

    @torch.no_grad()
    def __call__(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
        """See :class:`era_runtime.predictor.Backend`."""
        model = self.model
        batch = torch.zeros(len(images), 3, *self.shape)
        for own, image in zip(batch, map(torch.from_numpy, images), strict=True):
            own[:, : image.shape[1], : image.shape[2]] = (
                image - model.pixel_mean
            ) / model.pixel_std
        padded = ImageList.from_tensors(
            [batch],
            model.backbone.size_divisibility,
            padding_constraints=model.backbone.padding_constraints,
        ).tensor[0]
        inputs = ImageList(padded, [tuple(image.shape[1:]) for image in images])
        found = detector_of(model).detect_on(model.backbone(padded), inputs)
        return [tuple(output.numpy() for output in raw_outputs(own)) for own in found]


def refuse_python(cfg: CfgNode) -> None:
    """What a folder of format ``detectron2`` is loaded from is no code.

    Raises:
        UserError: a LazyConfig describes the model.
    """
    if cfg.MODEL.META_ARCHITECTURE == LAZY:
        raise UserError(
            f"format detectron2 writes a config in YAML, and {cfg.MODEL.LAZY.CONFIG_FILE}, a LazyConfig, describes the model in "
            "Python: export onnx or openvino."
        )


def save_folder(model: nn.Module, cfg: CfgNode, alpha: int, folder: Path) -> None:
    """Write ``model.pth`` and ``config.yaml``, and for alpha 1 ``teacher.yaml``, the teacher's config.

    At alpha 0 both are stock Detectron2 files; nothing of this project is in them.
    """
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    if alpha == 0:
        cfg = student_config(cfg)
        refuse_python(cfg)
    else:
        teacher = teacher_config(cfg)
        refuse_python(teacher)
        stock = student_config(cfg)
        teacher.merge_from_list(
            [
                family_of(student_config(teacher)).num_classes_key(),
                family_of(stock).num_classes_in(stock),
            ]
        )
        teacher.DATASETS.TRAIN = teacher.DATASETS.TEST = ()
        (folder / "teacher.yaml").write_text(teacher.dump(), encoding="utf-8")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.TEACHER.CONFIG_FILE, cfg.MODEL.TEACHER.WEIGHTS = "teacher.yaml", ""
        cfg.MODEL.TEACHER.OPTS = []
        # by now the teacher's heads are of the student's classes, whose names the folder keeps apart
        cfg.MODEL.DISTILLER.CLASS_MAP, cfg.MODEL.TEACHER.CLASSES = "exact", ""
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "model.pth", "."
    (folder / "config.yaml").write_text(cfg.dump(), encoding="utf-8")


def load_folder(folder: Path, manifest: dict) -> nn.Module:
    """The model of a deployment folder of format ``detectron2``, on the CPU in eval mode.

    Raises:
        UserError: weights and config do not fit each other.
    """
    cfg = load_config(str(folder / "config.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.LAZY.TRUST = False  # nor runs code
    cfg.MODEL.TEACHER.TRUST_PYTHON_CONFIG = False
    cfg.MODEL.TEACHER.WEIGHTS = ""  # a folder's config names nothing that is fetched
    if manifest["alpha"] == 0:
        model = build_model(cfg)
    else:
        cfg.MODEL.TEACHER.CONFIG_FILE = str(folder / "teacher.yaml")
        cfg.MODEL.TEACHER.ALLOW_RANDOM = True  # its heads come with model.pth
        model = build_model(cfg).deployable()
    load_exactly(model, str(folder / "model.pth"), what="the folder's")
    detector_of(model).set_score_threshold(manifest["score_threshold"])
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
