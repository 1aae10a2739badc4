"""Time and size of the trained models, measured in one process when no training runs any more."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import nn

from era.addresses import check_bases
from era.data.pictures import picture_mapper
from era.devices import wait_for_gpus
from era.engine.hooks import STUDENT_FOLDER
from era.engine.preflight import build_for_evaluation
from era.modeling.distiller import Distiller
from era.runs.plan import Run

IMAGES = 40  # per model
WARM_UP = 5  # images per model whose time does not count


@dataclass(frozen=True)
class Measurement:
    """What a model costs where it is used."""

    parameters: int | None  # of everything that inference runs; None = not known
    image_seconds: float  # median, batch of one image


def measure(runs: Sequence[Run], *, images: int = IMAGES) -> dict[str, Measurement]:
    """Parameters and seconds an image of every run's model, on one thread, batch size 1.

    The models take turns on each image, so that a machine that slows down slows all of them.
    """
    models = {run.name: load(run) for run in runs}
    inputs = _inputs(runs[0].config, images)
    with _one_thread():
        times = interleaved_times(list(models.values()), inputs, warm_up=WARM_UP)
    return {
        name: Measurement(count_parameters(model), statistics.median(seconds))
        for (name, model), seconds in zip(models.items(), times, strict=True)
    }


def load(run: Run) -> nn.Module:
    """A run's model as one would deploy it, in eval mode.

    A training's model is its plain student, read by stock Detectron2 alone: that it loads shows that it
    is an ordinary detector. What an evaluation evaluates, such as a student with the teacher's heads, is
    the ordinary model that the method makes of it; where it makes none, the distiller itself.
    """
    if run.iterations:
        cfg = get_cfg()
        folder = run.folder / STUDENT_FOLDER
        check_bases(str(folder / "config.yaml"), what="the student's config")
        cfg.merge_from_file(str(folder / "config.yaml"), allow_unsafe=False)
        model = build_model(cfg)
        DetectionCheckpointer(model).load(str(folder / "model_final.pth"))
        return model.eval()
    cfg = run.config.clone()
    cfg.defrost()
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_for_evaluation(cfg, resume=False)
    if isinstance(model, Distiller):
        made = [method.deployable(model.detector) for method in model.methods.values()]
        model = next((deployable for deployable in made if deployable is not None), model)
    return model.eval()


def count_parameters(model: nn.Module) -> int | None:
    """Parameters that inference uses; None of a distiller, which holds more than that."""
    if isinstance(model, Distiller):
        return None
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def interleaved_times(
    models: Sequence[nn.Module], inputs: Sequence[dict], *, warm_up: int
) -> list[list[float]]:
    """Seconds of every model on every input, the models taking turns.

    Args:
        warm_up: the first inputs are run this many times more, before anything is timed.
    """
    times: list[list[float]] = [[] for _ in models]
    for turn, item in enumerate([*inputs[:warm_up], *inputs]):
        # Another model begins each time, so that none always follows the same one.
        for index in (i % len(models) for i in range(turn, turn + len(models))):
            wait_for_gpus()
            start = time.perf_counter()
            models[index]([item])
            wait_for_gpus()
            if turn >= min(warm_up, len(inputs)):
                times[index].append(time.perf_counter() - start)
    return times


def _inputs(cfg: CfgNode, count: int) -> list[dict]:
    mapper = picture_mapper(cfg, is_train=False)
    return [mapper(entry) for entry in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:count]]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
