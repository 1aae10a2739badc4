"""What several tests build: tiny configs, models and batches."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

import era  # noqa: F401 - registers the models
from era.config import load_config

REPO = Path(__file__).resolve().parent.parent
TOY = REPO / "configs" / "toy"

# A detector of a few ten thousand weights; student and teacher differ in width.
TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "8",
    "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "60",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "40",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "32",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
    "MODEL.FCOS.NORM", "",  # GroupNorm's 32 groups need wider maps
    "SOLVER.IMS_PER_BATCH", "2",
]  # fmt: skip
TINY_TEACHER = [
    "MODEL.RESNETS.DEPTH", "10",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "16",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "16",
    "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.FCOS.NORM", "",
]  # fmt: skip
# ERA judged by the ground truth, on raw maps, as its first version had it: the tests of single terms start from it.
HARD_ERA = [
    "MODEL.ERA.STANDARDIZE", "none",
    "MODEL.ERA.FEATURE_WEIGHT", "1.0",
    "MODEL.ERA.RESIDUAL_WEIGHT", "1.0",
    "MODEL.ERA.SCALES", "[1.0, 0.5, 0.25, 0.125]",
    "MODEL.ERA.TWI.RPN_WEIGHT", "1.0",
    "MODEL.ERA.TWI.ROI_WEIGHT", "1.0",
    "MODEL.ERA.TWI.SOFT_RPN_WEIGHT", "0.0",
    "MODEL.ERA.TWI.SOFT_ROI_WEIGHT", "0.0",
    "MODEL.ERA.TWI.SOFT_DENSE_WEIGHT", "0.0",
    "MODEL.ERA.TWI.SOFT_POSITIONS", "all",
]  # fmt: skip

# Nothing is sampled: all anchors, and as many proposals from every image, so that losses of a batch of as many objects
# an image are the mean of its images' losses.
NOTHING_SAMPLED = [
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "100000",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "12", "MODEL.RPN.NMS_THRESH", "1.0",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0", "MODEL.RPN.POSITIVE_FRACTION", "1.0",
    "MODEL.RESNETS.NORM", "FrozenBN",
]  # fmt: skip
MASKS = [
    "MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8",
]  # fmt: skip
# The toy student on levels p2 to p6 in the place of p3 to p6.
FROM_P2 = [
    "MODEL.FPN.IN_FEATURES", "['res2', 'res3', 'res4', 'res5']",
    "MODEL.RPN.IN_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p6']",
    "MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [24], [36], [52], [76]]",
    "MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p3', 'p4', 'p5']",
]  # fmt: skip


def tiny_cfg(config: str = "era", *opts, teacher: str = "teacher", teacher_opts=()):
    """A toy config shrunk to test size, with a random teacher of another one where there is one, and ERA as
    :data:`HARD_ERA`."""
    cfg = load_config(str(TOY / f"{config}.yaml"), TINY)
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        cfg.MODEL.TEACHER.CONFIG_FILE = str(TOY / f"{teacher}.yaml")
        cfg.MODEL.TEACHER.WEIGHTS = ""
        cfg.MODEL.TEACHER.ALLOW_RANDOM = True
        cfg.MODEL.TEACHER.OPTS = [*TINY_TEACHER, *teacher_opts]
    cfg.merge_from_list([*HARD_ERA, *opts])
    return cfg


def tiny_model(
    config: str = "era", *opts, seed: int = 0, teacher: str = "teacher", teacher_opts=()
):
    """The model of :func:`tiny_cfg`, from a seed."""
    torch.manual_seed(seed)
    return build_model(tiny_cfg(config, *opts, teacher=teacher, teacher_opts=teacher_opts))


def cli(tiny_data, output, *opts, config="era"):
    """Arguments of train_net.py for a tiny run."""
    random_teacher = [
        "MODEL.TEACHER.WEIGHTS", "", "MODEL.TEACHER.ALLOW_RANDOM", "True",
        "MODEL.TEACHER.OPTS", str(TINY_TEACHER),
    ]  # fmt: skip
    return [
        "--config-file", str(REPO / "configs" / "toy" / f"{config}.yaml"),
        *TINY, *HARD_ERA, *tiny_data, *random_teacher, "OUTPUT_DIR", str(output), *opts,
    ]  # fmt: skip


class Once:
    """A loader that gives these batches, in order."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def batch(objects=(2, 1), *, size=(64, 64), seed: int = 0, num_classes: int = 8) -> list[dict]:
    """Inputs as Detectron2's mapper makes them: random pixels, ``objects[i]`` boxes in image i."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for count in objects:
        height, width = size
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.5
        extent = 8 + torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.4
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1).reshape(-1, 4))
        instances.gt_classes = torch.randint(0, num_classes, (count,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator).float()
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def masked_batch(objects, seed: int = 0) -> list[dict]:
    """As :func:`batch`, every object with a mask of all of its image."""
    inputs = batch(objects, seed=seed)
    for item in inputs:
        item["instances"].gt_masks = BitMasks(torch.ones(len(item["instances"]), 64, 64))
    return inputs


def losses_of(model, inputs, seed: int = 7):
    """Training losses of one step from a fixed random state, and what it put into the storage."""
    torch.manual_seed(seed)
    with EventStorage(0) as storage:
        return model(inputs), storage


def train_history(
    config: str, *opts, inputs=batch, steps: int = 4, teacher: str = "teacher"
) -> list[dict[str, float]]:
    """Losses of a few optimiser steps from one seed, as Detectron2 builds and trains.

    Args:
        teacher: as of :func:`tiny_cfg`.
        inputs: called with the images' object counts and ``seed``, the number of the step.
    """
    torch.manual_seed(3)
    cfg = tiny_cfg(config, *opts, teacher=teacher)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    history = []
    with EventStorage(0):
        for step in range(steps):
            losses = model(inputs((2, 1, 0), seed=step))
            history.append({k: v.item() for k, v in losses.items()})
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    return history


def digest(folder: Path) -> dict[str, str]:
    """Hash of every file below ``folder``, by its relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def run_tool(name: str, *args, env=None, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run a script of ``tools/`` from the repository's root, as a user would."""
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / name), *map(str, args)],
        cwd=REPO,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
