"""Small runs with lively random weights, and their exports, made once a test session."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from era.config import load_config, student_config
from era.deploy import formats, parity
from era.deploy.batched import BatchForm
from era.deploy.export import export
from era.deploy.source import Source, load_source
from era.modeling.detectors import detector_of, family_of

ROOT = Path(__file__).resolve().parents[1]
SIZE = 96
SMALL = ["INPUT.MIN_SIZE_TEST", SIZE, "INPUT.MAX_SIZE_TEST", 128, "MODEL.DEVICE", "cpu"]
SMALL += ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.RPN.POST_NMS_TOPK_TEST", 40]
SMALL_MASKS = [*SMALL, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16]
_folder = tempfile.TemporaryDirectory(prefix="era-deploy-")  # removed when the process ends
FOLDER = Path(_folder.name)


def needs(name: str):
    """A parameter that is skipped where a format's packages are not installed."""
    missing = [p for p in formats.RUNTIMES[name] if importlib.util.find_spec(p) is None]
    return pytest.param(
        name, marks=pytest.mark.skipif(bool(missing), reason=f"{missing} not installed")
    )


def enliven(model, seed: int) -> None:
    """Random heads that tell images apart, so that there is something to detect."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if hasattr(model, "head"):  # a dense detector's
            for layer in (*model.head.cls_subnet, *model.head.bbox_subnet):
                if isinstance(layer, torch.nn.Conv2d):
                    layer.weight.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=draw)
            model.head.cls_score.weight.normal_(0, 0.1, generator=draw)
            model.head.bbox_pred.weight.normal_(0, 0.01, generator=draw)
            if hasattr(model.head, "ctrness"):
                model.head.ctrness.weight.normal_(0, 0.1, generator=draw)
            return
        stages = detector_of(model).box_stages
        for stage in stages:
            stage.predictor.cls_score.weight.normal_(0, 1.0, generator=draw)
            # The stages of a cascade are to move boxes.
            moves = 0.1 if len(stages) > 1 else 0.02
            stage.predictor.bbox_pred.weight.normal_(0, moves, generator=draw)
        model.proposal_generator.rpn_head.objectness_logits.weight.normal_(0, 0.5, generator=draw)
        if model.roi_heads.mask_on:
            model.roi_heads.mask_head.predictor.weight.normal_(0, 0.5, generator=draw)


def run(config: str = "era") -> Path:
    """OUTPUT_DIR of a distilled run of a toy config with its teacher beside it."""
    return _run(config)


@functools.cache
def _run(config: str) -> Path:
    torch.manual_seed(0)
    configs = ROOT / "configs/toy"
    folder = FOLDER / "runs" / config
    folder.mkdir(parents=True)
    cfg = load_config(str(configs / f"{config}.yaml"), SMALL)
    teacher_config = ROOT / cfg.MODEL.TEACHER.CONFIG_FILE
    teacher_weights = FOLDER / f"{teacher_config.stem}.pth"
    teacher = build_model(load_config(str(teacher_config), SMALL))
    enliven(teacher, 2)
    torch.save({"model": teacher.state_dict()}, teacher_weights)
    cfg.merge_from_list(
        ["MODEL.TEACHER.CONFIG_FILE", str(teacher_config),
         "MODEL.TEACHER.OPTS", SMALL, "MODEL.TEACHER.WEIGHTS", str(teacher_weights)],
    )  # fmt: skip
    model = build_model(cfg)
    enliven(model.student, 3)
    with torch.no_grad():
        for parameter in model.methods.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@functools.cache
def mask_run(*opts) -> Path:
    """OUTPUT_DIR of a plain Mask R-CNN."""
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    cfg = load_config(str(ROOT / "configs/toy/mask_plain.yaml"), [*SMALL_MASKS, *opts])
    model = build_model(cfg)
    enliven(model, 2)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def source(alpha: int, config: str = "era") -> Source:
    """The distilled run's student, see :func:`quiet_source`."""
    return _source(alpha, config)


@functools.cache
def _source(alpha: int, config: str) -> Source:
    return quiet_source(run(config), alpha)


@functools.cache
def mask_source() -> Source:
    """The Mask R-CNN, see :func:`quiet_source`."""
    return quiet_source(mask_run())


def quiet_source(folder: Path, alpha: int = 0) -> Source:
    """A run's student with a score threshold above what it finds on one of the even images."""
    key = score_key(folder)
    first = load_source(run=str(folder), alpha=alpha, opts=[key, 0.05]).predictor()
    blank = (first(image).scores for image in parity.blank_images(first.rules))
    threshold = float(min(scores.max(initial=0.05) for scores in blank)) + 0.01
    assert any(
        (first(image).scores > threshold).sum() > 3 for image in parity.sample_images(first.rules)
    ), "the test's own model must detect something"
    return load_source(run=str(folder), alpha=alpha, opts=[key, threshold])


def score_key(folder: Path) -> str:
    """The config key of the score threshold of a run's student."""
    family = family_of(student_config(load_config(str(folder / "config.yaml"))))
    return family.num_classes_key().replace("NUM_CLASSES", "SCORE_THRESH_TEST")


def exported(name: str, alpha: int = 0, config: str = "era") -> tuple[Path, parity.Report]:
    """A deployment folder of that format, and its parity report."""
    return _exported(name, alpha, config)


@functools.cache
def _exported(name: str, alpha: int, config: str) -> tuple[Path, parity.Report]:
    folder = FOLDER / f"{config}-{name}-{alpha}"
    return folder, export(source(alpha, config), name, str(folder))


@functools.cache
def mask_exported(name: str) -> tuple[Path, parity.Report]:
    """The same of the Mask R-CNN."""
    folder = FOLDER / f"{name}-masks"
    return folder, export(mask_source(), name, str(folder))


FIXED = BatchForm(3, (96, 128))  # as the toy pictures are scaled, and for portraits smaller


def batch_exported(
    config: str, form: BatchForm, alpha: int = 0, name: str = "onnx"
) -> tuple[Path, parity.Report]:
    """A deployment folder over batches, and its parity report; ``masks`` is the Mask R-CNN."""
    return _batch_exported(config, form, alpha, name)


@functools.cache
def _batch_exported(
    config: str, form: BatchForm, alpha: int, name: str
) -> tuple[Path, parity.Report]:
    folder = FOLDER / f"{config}-{name}-{alpha}-{'fixed' if form.shape else 'any'}"
    return folder, export(batch_source(config, alpha), name, str(folder), form=form)


def batch_source(config: str, alpha: int = 0) -> Source:
    """What :func:`batch_exported` exports."""
    return mask_source() if config == "masks" else source(alpha, config)
