"""What differs by the kind of device: the CPU, GPUs by CUDA, and Apple's GPU by MPS (Metal Performance Shaders).

MPS is built to what torch 2.11 and torchvision 0.26 say of it; nobody has run it here (docs/devices.md).
"""

from __future__ import annotations

import os

import torch

from era.errors import UserError

CPU, CUDA, MPS = "cpu", "cuda", "mps"
FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"  # environment, read when torch is imported: 1 = on the CPU what MPS has no kernel for
# Operations that a detector here can need and that have no kernel for MPS. torchvision's nms, roi_align and the backward of
# roi_align have one since 0.16 (pytorch/vision pull request 7643), the last in float32 alone; of deform_conv2d the forward
# has since 0.23 (9017).
WITHOUT_MPS_KERNEL = {
    "torchvision::_deform_conv2d_backward": "the backward pass of deformable convs (MODEL.RESNETS.DEFORM_ON_PER_STAGE)",
}


def kind_of(device: str | torch.device) -> str:
    """:data:`CPU`, :data:`CUDA` or :data:`MPS` of a device such as ``cuda:1``.

    Raises:
        UserError: it is none of them.
    """
    kind = str(device).partition(":")[0]
    if kind not in (CPU, CUDA, MPS):
        raise UserError(f"MODEL.DEVICE is {str(device)!r}: expected cpu, cuda or mps; set it so.")
    return kind


def is_there(device: str) -> bool:
    """Whether this machine has a device of that kind."""
    return {CPU: lambda: True, CUDA: torch.cuda.is_available, MPS: torch.backends.mps.is_available}[
        kind_of(device)
    ]()


def check_mps(*, processes: int, mixed_precision: bool, deformable: bool) -> str:
    """A run on MPS can begin.

    Args:
        processes: of the run.
        mixed_precision: whether it is asked for.
        deformable: whether the model has deformable convs.

    Returns:
        What is to be warned of, "" for nothing.

    Raises:
        UserError: there is no such device, or it cannot do what is asked for.
    """
    if not torch.backends.mps.is_available():
        why = "this torch was built without MPS" if not torch.backends.mps.is_built() else "macOS 12.3 or later on Apple silicon is needed"  # fmt: skip
        raise UserError(f"MODEL.DEVICE is mps, which this machine does not have ({why}): set it cpu or cuda.")  # fmt: skip
    if processes > 1:
        raise UserError(
            f"--num-gpus is {processes} and MODEL.DEVICE mps: Apple's GPU is one, and torch averages no gradients of several "
            "processes on it; ask for 1."
        )
    if mixed_precision:
        raise UserError(
            "SOLVER.AMP.ENABLED is True and MODEL.DEVICE mps: torchvision's ROIAlign has no backward pass in half precision "
            "there; set SOLVER.AMP.ENABLED False."
        )
    has_fallback = os.environ.get(FALLBACK) == "1"
    missing = "; ".join(f"{name}, {what}" for name, what in WITHOUT_MPS_KERNEL.items())
    if deformable and not has_fallback:
        raise UserError(
            f"MODEL.DEVICE is mps, which has no kernel for {missing}: set {FALLBACK}=1 in the environment before Python starts, "
            "and such operations run on the CPU, or leave the deformable convs out."
        )
    if has_fallback:
        return ""
    return (
        f"{FALLBACK} is not set: an operation without a kernel for MPS ends the run; with {FALLBACK}=1 in the environment "
        f"before Python starts it runs on the CPU. Known ones that this project can need: {missing}."
    )


def widest_float(device: str | torch.device) -> torch.dtype:
    """float64, but for MPS, which has none: float32."""
    return torch.float32 if torch.device(device).type == MPS else torch.float64


def seed_devices(seed: int) -> None:
    """Seed the random numbers of the GPUs in use."""
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def synchronise(device: str | torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    device = torch.device(device)
    if device.type == CUDA:
        torch.cuda.synchronize(device)
    elif device.type == MPS:
        torch.mps.synchronize()


def wait_for_gpus() -> None:
    """As :func:`synchronise`, of whichever GPU this process uses."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def gpu_name(device: str | torch.device | None = None) -> str | None:
    """Of a GPU; None = the first that there is, None if there is none."""
    if device is None:
        device = next((kind for kind in (CUDA, MPS) if is_there(kind)), CPU)
    kind = torch.device(device).type
    return {CPU: lambda: None, CUDA: lambda: torch.cuda.get_device_name(device), MPS: lambda: "Apple GPU (MPS)"}[kind]()  # fmt: skip
