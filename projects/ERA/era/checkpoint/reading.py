"""Checkpoints: safe reading, whole writing, and the plain student inside a distilled run.

A training checkpoint holds the student under ``student.``, the methods' modules under ``methods.``, the
optimiser, the scheduler and the iteration, the settings of the run, what an exact resume needs
(:mod:`era.engine.resume`), and the teacher's source and hash; never the teacher. Its SHA-256 stands beside it.
"""

from __future__ import annotations

import logging
import os
from typing import Any
from urllib.parse import urlsplit

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from era.addresses import is_hub, is_remote
from era.checkpoint.fetching import fetch
from era.checkpoint.finite import check_finite
from era.checkpoint.hub import WEIGHTS, hub_file
from era.checkpoint.safetensors import load_safetensors
from era.checkpoint.settings import differences
from era.checkpoint.unpickling import SafeUnpickler
from era.checkpoint.writing import damage, save_whole, write_text_whole
from era.errors import UserError

logger = logging.getLogger(__name__)

STUDENT_PREFIX = "student."


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that runs no pickled code, writes files whole or not at all, and knows
    the student inside a :class:`~era.modeling.distiller.Distiller`.

    Four cases load alike: a distilled or a plain file into a distiller or a plain model. A plain file
    fills a distiller's student; a distilled file gives a plain model its student, and a distiller that begins
    to train from it (:meth:`resume_or_load`) likewise.

    Args:
        model, save_dir, save_to_disk, checkpointables: as fvcore's.
        settings: of the run, :func:`era.checkpoint.settings.settings_of`; written into checkpoints and, when one is
            resumed from, compared with what is in it.

    Attributes:
        incompatible: what did not fit at the last load: ``missing_keys``, ``unexpected_keys`` and
            ``incorrect_shapes``; None before.
        filled_methods: whether the last load brought the methods' modules (adapters, projectors).
    """

    incompatible = None
    filled_methods = False
    _told = ""
    _student_alone = False  # whether a distilled file's modules of methods are left out
    _resuming = ""  # the file while it is resumed from

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        settings: dict[str, str] | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.settings = settings or {}

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As fvcore's; what is resumed from must fill the model exactly, and other settings are warned of. A run that
        does not resume takes the student alone from a distilled file: the modules of its methods were trained with
        another run's teacher and settings, and begin as this run built them.

        Raises:
            UserError: as :meth:`load` and :meth:`get_checkpoint_file`, or the checkpoint is of another model.
        """
        found = self.get_checkpoint_file() if resume else ""
        if not found:
            self._student_alone = True
            try:
                return self.load(path, checkpointables=[])
            finally:
                self._student_alone = False
        self._resuming = found
        try:
            return self.load(found)
        finally:
            self._resuming = ""

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """As Detectron2's, but addresses are fetched by :func:`fetch`, and every failure to read is one sentence.

        Raises:
            UserError: the file is absent, unreachable, no checkpoint, or not what its SHA-256 beside it says.
        """
        try:
            if is_hub(path):
                path = hub_file(path, WEIGHTS, what="weights")
            elif is_remote(path):
                query = urlsplit(path).query  # read by Detectron2, not asked for
                path = fetch(path, what="weights") + (f"?{query}" if query else "")
            file = urlsplit(path)._replace(query="").geturl()  # what Detectron2 opens
            if os.path.isfile(file) and (problem := damage(file)):
                raise UserError(
                    f"weights {path!r} are damaged ({problem}): expected the file as it was written; give another "
                    "one, or, if you changed it yourself, remove the file with the hash."
                )
            return super().load(path, *args, **kwargs)
        except UserError:
            raise
        except (AssertionError, OSError) as e:
            raise UserError(
                f"weights {path!r} cannot be opened ({_short(e)}): expected an existing file or a "
                "reachable address; correct the path, or download the file and give its path."
            ) from e
        except Exception as e:  # a file of anything can fail in any way
            raise UserError(
                f"weights {path!r} cannot be read ({_short(e)}): expected a checkpoint of tensors "
                "(.pth of torch.save, or .pkl of the model zoo); give another file."
            ) from e
        finally:
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".safetensors"):
            return {"model": load_safetensors(filename)}
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)  # torch.load: weights_only is its default
        with open(filename, "rb") as f:
            data = SafeUnpickler(f, encoding="latin1").load()
        if "model" in data and "__author__" in data:
            return data
        # Caffe2 and Detectron1 files: the weights alone, in their own names.
        data = data.get("blobs", data)
        weights = {k: v for k, v in data.items() if not k.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: dict[str, Any]):
        weights, student = checkpoint["model"], getattr(self.model, "student", None)
        is_distilled = any(key.startswith(STUDENT_PREFIX) for key in weights)
        takes_student = is_distilled and (student is None or self._student_alone)
        if takes_student:
            weights = checkpoint["model"] = strip_student(weights)
        self.filled_methods = student is not None and any(k.startswith("methods.") for k in weights)
        if student is not None and (takes_student or not is_distilled):
            inner = SafeCheckpointer(student)
            self.incompatible = inner._load_model(checkpoint)
        else:
            self.incompatible = super()._load_model(checkpoint)
        if self._resuming:
            problems = misfits(self.incompatible)
            if is_distilled != (student is not None):
                problems.insert(0, "is of a distiller" if is_distilled else "is of no distiller")
            self._compare(problems, checkpoint.get("settings", {}))
        return self.incompatible

    def _compare(self, problems: list[str], settings: dict[str, str]) -> None:
        """Refuse a checkpoint of another model; say which other settings have changed."""
        if problems:
            more = f" (and {len(problems) - 1} more keys differ)" if len(problems) > 1 else ""
            changed = ", ".join(differences(settings, self.settings, prefix="MODEL."))
            raise UserError(
                f"{self._resuming}, to resume from, does not fit this config's model: it {problems[0]}{more}"
                f"{'; ' * bool(changed)}{changed}; resume with that run's own settings, or start a new run in another "
                "OUTPUT_DIR."
            )
        if changed := differences(settings, self.settings):
            logger.warning(
                "Resuming with other settings than %s was written with, so the run is not the one that would have "
                "gone on: %s.",
                self._resuming, ", ".join(changed),
            )  # fmt: skip

    def has_checkpoint(self) -> bool:
        """Whether the folder holds a checkpoint to resume from.

        Raises:
            UserError: as :meth:`get_checkpoint_file`.
        """
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The file that ``last_checkpoint`` names, else the one of the latest iteration; "" if there is
        none. A file that cannot be read, or that its SHA-256 does not fit, is passed over with a warning.

        Raises:
            UserError: there are files, and none of them is whole.
        """
        tagged = self._tagged_file()
        if tagged and _problem(tagged) is None:
            return tagged
        files = self.get_all_checkpoint_files() if os.path.isdir(self.save_dir) else []
        problems = {path: _problem(path) for path in files}
        broken = [f"{path}: {problem}" for path, problem in sorted(problems.items()) if problem]
        iterations = {path: _iteration(path) for path in files if problems[path] is None}
        resumable = {path: i for path, i in iterations.items() if i >= 0}
        if not resumable:
            if broken:
                raise UserError(
                    f"{self.save_dir} holds no whole checkpoint to resume from ({'; '.join(broken)}): expected one of "
                    "this run; move the files away, or start without --resume."
                )
            return ""
        newest = max(resumable, key=resumable.__getitem__)
        marker = os.path.join(self.save_dir, "last_checkpoint")
        found = f"names {tagged}" if tagged else "is missing or cannot be read"
        skipped = f" (not from {'; '.join(broken)})" if broken else ""
        message = (
            f"{marker} {found}: resuming from {newest}, iteration {resumable[newest]}{skipped}."
        )
        if message != self._told:  # the folder is looked at several times
            logger.warning(message)
            self._told = message
        return newest

    def _tagged_file(self) -> str:
        try:
            return super().get_checkpoint_file()
        except (OSError, UnicodeDecodeError):
            return ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth``, its SHA-256 beside it, and ``last_checkpoint``: complete, or not at all.

        Raises:
            UserError: it cannot be written.
            FloatingPointError: weights, optimiser or whatever else is to be in it is not finite; nothing is written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "settings": self.settings}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        check_finite(data, path)
        logger.info("Saving checkpoint to %s", path)
        save_whole(data, path, with_hash=True)
        marker = os.path.join(self.save_dir, "last_checkpoint")
        write_text_whole(os.path.basename(path), marker)

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write the weights to ``<save_dir>/<name>.pth``, with the teacher they belong to but nothing to resume from.

        Raises:
            UserError: it cannot be written.
            FloatingPointError: as :meth:`save`.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **kwargs}
        if "teacher" in self.checkpointables:
            data["teacher"] = self.checkpointables["teacher"].state_dict()
        path = os.path.join(self.save_dir, f"{name}.pth")
        check_finite(data, path)
        save_whole(data, path, with_hash=True)


def load_exactly(model: nn.Module, path: str, *, what: str) -> None:
    """Load weights that must fill the whole model.

    Args:
        what: the config key that names the file, for the message.

    Raises:
        UserError: unreadable, of another architecture, or with a missing or differently shaped key.
    """
    checkpointer = SafeCheckpointer(model, save_to_disk=False)
    checkpointer.load(path, checkpointables=[])
    problems = misfits(checkpointer.incompatible)
    if problems:
        raise UserError(
            f"{what} {path!r} does not fit the model of its config: it {problems[0]}"
            f"{f' (and {len(problems) - 1} more keys differ)' if len(problems) > 1 else ''}; expected "
            "weights of exactly this architecture; give those weights or the config they belong to."
        )


def misfits(wrong) -> list[str]:
    """What keeps a file from filling a model exactly, one phrase a key; empty if nothing does.

    Args:
        wrong: :attr:`SafeCheckpointer.incompatible` after a load.
    """
    problems = [
        f"has {key} of shape {tuple(found)} where the model has {tuple(expected)}"
        for key, found, expected in wrong.incorrect_shapes
    ]
    misshapen = {key for key, _, _ in wrong.incorrect_shapes}  # these count as missing too
    problems += [f"lacks {key}" for key in wrong.missing_keys if key not in misshapen]
    # a deeper network's weights fill a shallower one without a gap; only what is left over tells
    return problems + [f"has {key}, which the model lacks" for key in wrong.unexpected_keys]


def peek(path: str) -> dict[str, Any] | None:
    """What a checkpoint holds, its tensors mapped and not read; None if it is not readable."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a file of anything can fail in any way
        return None
    return data if isinstance(data, dict) else {}


def _problem(path: str) -> str | None:
    """Why a file is passed over, None if it is whole."""
    return "unreadable" if peek(path) is None else damage(path)


def _iteration(path: str) -> int:
    """Iteration that a readable checkpoint was written after; -1 for weights alone."""
    data = peek(path) or {}
    iteration = data.get("iteration")
    return iteration if "trainer" in data and isinstance(iteration, int) else -1


def strip_student(weights: dict[str, Any]) -> dict[str, Any]:
    """The plain student's weights out of a distilled model's: keys under ``student.``, without it."""
    return {
        key[len(STUDENT_PREFIX) :]: value
        for key, value in weights.items()
        if key.startswith(STUDENT_PREFIX)
    }


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
