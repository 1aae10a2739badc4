"""Every method in two processes, and the first runs of those that first train a part of their own: no weight without a gradient, equal gradients, and what one process has of both
images, but for the terms whose docstrings say that they follow from how a batch is split."""

from pathlib import Path

import pytest
import torch
from builders import NOTHING_SAMPLED, batch, losses_of, tiny_cfg, tiny_model
from detectron2.engine import launch
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from era.registry import METHOD_REGISTRY

OPTIONS = {
    "ERA": ["MODEL.ERA.TWI.PROPOSALS_PER_IMAGE", "0"],
    "CRLD": ["MODEL.CRLD.CONFIDENCE_WEAK", "0.0", "MODEL.CRLD.CONFIDENCE_STRONG", "0.0"],
    "ReviewKD": ["MODEL.REVIEWKD.NORM", "GN"],
    "DSKD": ["MODEL.DSKD.FC_DIM", "16"],
    "SSKD, its head": ["MODEL.SSKD.STAGE", "head"],
    "TRED, its parts": ["MODEL.TRED.STAGE", "disentangle"],
}
# Statistics over what a process has of a batch.
SPLIT = {
    "PKD": "a channel's mean and deviation over the images of a process",
    "DIST": "columns over the proposals of a process",
    "R2KD": "columns and ranks over the proposals of a process",
    "CRLD": "means over the objects of a process and over its background",
    "CrossKD": "scale of the student's maps, and normalisers by what the teacher sees",
    "ResidualKD": "BatchNorm of the assistant, over the images of a process",
    "SSKD": "an object is compared with the others of its process",
    "SSKD, its head": "an object is compared with the others of its process",
    "TRED, its parts": "distances between the rows of a process",
}
METHODS = sorted({name for name, _ in METHOD_REGISTRY} | OPTIONS.keys())
IMAGES = batch((2, 2), seed=4)


def step_of(row, inputs):
    """Losses of a step, and the gradient of every weight that is trained, averaged over processes if there are two."""
    name = row.partition(",")[0]
    options = ["MODEL.DISTILLER.METHODS", f"('{name}',)", *NOTHING_SAMPLED, *OPTIONS.get(row, [])]
    if "p2" in tiny_cfg().MODEL[name.upper()].get("LEVELS", []):  # the toy pyramid begins at p3
        options += [f"MODEL.{name.upper()}.LEVELS", "['p3', 'p4', 'p5']"]
    model = tiny_model("era", *options)
    wrapped = model
    if comm.get_world_size() > 1:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    losses, _ = losses_of(wrapped, inputs)
    sum(losses.values()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    return {key: value.detach() for key, value in losses.items()}, gradients


def _of_one_image(folder):
    rank = comm.get_rank()
    found = {name: step_of(name, [IMAGES[rank]]) for name in METHODS}
    torch.save(found, Path(folder) / f"{rank}.pth")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """What each of two processes has of one image, by method."""
    folder = tmp_path_factory.mktemp("halves")
    launch(_of_one_image, 2, dist_url="auto", args=(str(folder),))
    return [torch.load(folder / f"{rank}.pth") for rank in (0, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_take_one_step(name, halves):
    (a, first), (b, second) = (half[name] for half in halves)
    losses, gradients = step_of(name, IMAGES)
    assert a.keys() == b.keys() == losses.keys()
    assert None not in gradients.values() and first.keys() == second.keys() == gradients.keys()
    for key, value in first.items():
        assert value is not None and torch.isfinite(value).all(), key
        assert torch.equal(value, second[key]), key
    if name in SPLIT:
        return
    for key, value in losses.items():
        torch.testing.assert_close((a[key] + b[key]) / 2, value, rtol=1e-4, atol=1e-6, msg=key)
    for key, value in gradients.items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_what_follows_from_the_split_does(halves):
    """A method that is excused above differs there: none is excused without need."""
    for name in SPLIT:
        (a, _), (b, _) = (half[name] for half in halves)
        losses, _ = step_of(name, IMAGES)
        apart = [
            key
            for key, value in losses.items()
            if not torch.isclose((a[key] + b[key]) / 2, value, rtol=1e-4, atol=1e-6)
        ]
        assert apart, name
