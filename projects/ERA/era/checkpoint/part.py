"""A part of a method that an earlier run trained, read into the method of this run."""

from __future__ import annotations

from typing import Any

from torch import nn

from era.checkpoint.reading import SafeCheckpointer, misfits
from era.errors import UserError


def load_part(module: nn.Module, path: str, prefix: str, *, what: str, teacher: str) -> None:
    """Fill a module from the training checkpoint of the run that trained it.

    Args:
        module: filled in place, all of it.
        path: the checkpoint.
        prefix: what its names begin with there, ``methods.<name>.<attribute>.``.
        what: the config key that names the file, for messages.
        teacher: SHA-256 of this run's teacher, :attr:`era.modeling.teacher.Teacher.sha256`; the part was trained
            on what that one says.

    Raises:
        UserError: no file is named, or it is absent, unreadable, without this part, of another shape, or trained on
            another teacher.
    """
    if not path:
        raise UserError(
            f'{what} is "": expected the checkpoint of the run that trains this part first; run that one, and name '
            "its model_final.pth."
        )
    checkpointer = _PartCheckpointer(module, prefix)
    data = checkpointer.load(path, checkpointables=[])
    if not checkpointer.found:
        raise UserError(
            f"{what} {path!r} holds no {prefix}*: expected the checkpoint of the run that trains this part first; "
            "name that run's model_final.pth."
        )
    found = data.get("teacher", {}).get("sha256")
    if found != teacher:
        raise UserError(
            f"{what} {path!r} was trained with another teacher than MODEL.TEACHER.WEIGHTS names (SHA-256 "
            f"{str(found)[:12]}..., now {teacher[:12]}...): train the part again with this teacher, or name that one."
        )
    if problems := misfits(checkpointer.incompatible):
        raise UserError(
            f"{what} {path!r} does not fit: below {prefix} it {problems[0]}; expected a part of the shape that this "
            "run's config describes; train it again, or give both runs the same settings."
        )


class _PartCheckpointer(SafeCheckpointer):
    """Reads what begins with ``prefix`` alone."""

    found = False

    def __init__(self, module: nn.Module, prefix: str):
        super().__init__(module, save_to_disk=False)
        self.prefix = prefix

    def _load_model(self, checkpoint: dict[str, Any]):
        weights = {
            key[len(self.prefix) :]: value
            for key, value in checkpoint["model"].items()
            if key.startswith(self.prefix)
        }
        self.found = bool(weights)
        checkpoint["model"] = weights
        return super()._load_model(checkpoint)
