"""What the tests of dense detectors share."""

from __future__ import annotations

import torch
from builders import batch, losses_of, tiny_model

from era.modeling.detectors import detector_of
from era.modeling.detectors.fcos import FCOS
from era.modeling.detectors.retinanet import RetinaNet

FAMILIES = {"retinanet": RetinaNet, "fcos": FCOS}
LOSSES = {
    "retinanet": {"loss_cls", "loss_box_reg"},
    "fcos": {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"},
}
OBJECTS = {"full": (2, 3), "half": (2, 0), "empty": (0, 0)}  # of two pictures


def recorded(name, objects=(2, 1), *opts):
    """A student, what it is as a detector, one recorded step of it and its losses."""
    student = tiny_model(f"{name}_plain", *opts)
    detector = detector_of(student)
    with detector.record() as recording:
        losses, _ = losses_of(student, batch(objects))
    return student, detector, recording, losses


def loud(model, seed=0):
    """Make a head's weights large, so that every term counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    return model
