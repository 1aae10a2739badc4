"""The settings of a run inside its checkpoints, to name what has changed when it is resumed."""

from __future__ import annotations

from detectron2.config import CfgNode

# What may change without changing what the run computes.
FREE = {
    "OUTPUT_DIR", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINTS_KEPT",
    "SOLVER.MAX_SECONDS", "SOLVER.MAX_LOSS", "MODEL.DISTILLER.MAX_TASK_RATIO",
}  # fmt: skip


def settings_of(cfg: CfgNode, *, processes: int) -> dict[str, str]:
    """Every key of a config with its value as text, and the number of processes."""
    return {"processes": str(processes), **dict(_flat(cfg, ""))}


def differences(then: dict[str, str], now: dict[str, str], *, prefix: str = "") -> list[str]:
    """What has changed, "KEY was a and is b"; a key that only one of the two has is a version's, and left out."""
    return [
        f"{key} was {then[key]} and is {value}"
        for key, value in now.items()
        if key.startswith(prefix) and key not in FREE and then.get(key, value) != value
    ]


def _flat(cfg: CfgNode, prefix: str):
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
