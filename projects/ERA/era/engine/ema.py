"""``MODEL.EMA``: the exponential moving average of the weights, which is what is evaluated, kept and deployed.

Averaged are the trained parameters and the statistics (floating-point buffers, such as BatchNorm's) of what detects:
the student, and the modules of methods whose inference can use the teacher's heads (``Method.alpha_key``), because at
alpha > 0 both are one detector. The other methods' modules serve training alone and stay as they are. Training itself
knows nothing of the average.

After step n, counted from 0, ``average = d * average + (1 - d) * weights`` with ``d = min(DECAY, (1 + n) / (10 + n))``:
the warm-up of TensorFlow's ``ExponentialMovingAverage(decay, num_updates)``, also PaddlePaddle's, by which the weights
that the run started from are forgotten and the average is over about the last tenth of the run until DECAY is reached.
Statistics are averaged as the weights are, as timm and the YOLO detectors do; counters are those of the model.

A checkpoint's ``model`` holds the average, as everybody who reads one wants it; under ``ema`` lie the weights that
training goes on with, and the number of updates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from era.checkpoint.reading import SafeCheckpointer
from era.errors import UserError
from era.modeling.distiller import Distiller
from era.registry import methods_of

logger = logging.getLogger(__name__)

KEY = "ema"  # of a checkpoint
UNFIT = "expected the weights of this run's averaged tensors; resume from another checkpoint, or start a new run"


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is averaged of a model, by its name in the model's ``state_dict``: the tensors themselves."""
    if isinstance(model, Distiller):
        parts = {"student.": model.student}
        parts |= {f"methods.{n}.": m for n, m in model.methods.items() if m.alpha_key}
    else:
        parts = {"": model}
    return {
        prefix + name: tensor
        for prefix, part in parts.items()
        for name, tensor in part.state_dict(keep_vars=True).items()
        if tensor.is_floating_point()
        and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }


class WeightAverage:
    """The average beside a model that trains.

    Args:
        model: without DDP around it, on its device; its weights are where the average begins.
        decay: the greatest d, from 0 to below 1.

    Attributes:
        updates: steps that were averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self._inside = averaged_tensors(model)  # the model's own
        self._beside = {name: t.detach().clone() for name, t in self._inside.items()}
        self._applied = 0

    def restart(self) -> None:
        """Begin with the model's present weights."""
        self.updates = 0
        _copy(self._inside, self._beside)

    def next_decay(self) -> float:
        """d of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def update(self) -> None:
        """After a step: the model's weights enter the average."""
        assert not self._applied, "the model holds the average"
        average, weights = list(self._beside.values()), list(self._inside.values())
        if average:
            get_ema_multi_avg_fn(self.next_decay())(average, weights, None)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average; its own weights come back after, to the bit. It may be nested."""
        if not self._applied:
            self._exchange()
        self._applied += 1
        try:
            yield
        finally:
            self._applied -= 1
            if not self._applied:
                self._exchange()

    def state_dict(self) -> dict:
        """For a checkpoint whose ``model`` holds the average, inside :meth:`applied`: what training goes on with."""
        assert self._applied, "the model does not hold the average"
        return {"updates": self.updates, "weights": dict(self._beside)}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of :meth:`state_dict`; the model holds the average that was saved, and has its own weights after.

        Raises:
            ValueError: the state is of another form or of other weights.
        """
        updates, weights = read_state(state, self._inside)
        self.updates = updates
        _copy(weights, self._beside)
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, inside in self._inside.items():
            beside = self._beside[name]
            kept = inside.detach().clone()  # one tensor at a time: no third copy of the model
            inside.copy_(beside)
            beside.copy_(kept)


def read_state(state: object, like: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Updates and weights out of a checkpoint, which may come from anybody.

    Args:
        like: tensors whose names and shapes the weights must have.

    Raises:
        ValueError: it is of another form, or they have others.
    """
    match state:
        case {"updates": int(updates), "weights": dict(weights)} if updates >= 0:
            pass
        case _:
            raise ValueError(f"its {KEY!r} is of another form")
    if wrong := sorted(map(str, weights.keys() ^ like.keys())):
        raise ValueError(f"its {KEY!r} and the run differ in {wrong[0]}")
    for name, tensor in like.items():
        if not isinstance(weights[name], Tensor) or weights[name].shape != tensor.shape:
            raise ValueError(f"{name} of its {KEY!r} is not of shape {tuple(tensor.shape)}")
    return updates, weights


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def average_of(cfg: CfgNode, model: nn.Module) -> WeightAverage | None:
    """The average that a config asks for, None if it asks for none."""
    return WeightAverage(model, cfg.MODEL.EMA.DECAY) if cfg.MODEL.EMA.ENABLED else None


def averaged(average: WeightAverage | None):
    """A context in which the model holds its average; of none nothing changes."""
    return nullcontext() if average is None else average.applied()


class UpdateAverage(HookBase):
    """Averages after every step, before anything looks at the average."""

    def __init__(self, average: WeightAverage):
        self.average = average

    def before_train(self) -> None:
        """The average begins with the weights that training begins with, where a checkpoint has brought none."""
        if self.average.updates == 0:
            self.average.restart()

    def after_step(self) -> None:
        """See :meth:`WeightAverage.update`."""
        self.average.update()


class AveragingCheckpointer(SafeCheckpointer):
    """Writes the average as the weights of the model, with those that training goes on with beside them.

    Args:
        average: None where there is none; then files are as ever.
    """

    def __init__(self, *args, average: WeightAverage | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.average = average

    def save(self, name: str, **kwargs) -> None:
        """As :meth:`SafeCheckpointer.save`."""
        with averaged(self.average):
            extra = {} if self.average is None else {KEY: self.average.state_dict()}
            super().save(name, **extra, **kwargs)

    def save_weights(self, name: str, **kwargs) -> None:
        """As :meth:`SafeCheckpointer.save_weights`."""
        with averaged(self.average):
            super().save_weights(name, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As :meth:`SafeCheckpointer.resume_or_load`. A run with an average that goes on from a checkpoint without
        one begins to average there; a run without goes on as if there had never been one.

        Raises:
            UserError: also where what the checkpoint says of its average is of another form.
        """
        found = self.get_checkpoint_file() if resume else ""
        content = super().resume_or_load(path, resume=resume)
        if not found:
            return content
        state = content.pop(KEY, None)
        try:
            if state is not None and self.average is not None:
                self.average.load_state_dict(state)
            elif state is not None:
                inside = averaged_tensors(self.model)
                _copy(read_state(state, inside)[1], inside)
        except ValueError as e:
            raise UserError(f"{found}, to resume from, cannot be used ({e}): {UNFIT}.") from e
        if (state is None) != (self.average is None):
            logger.warning(
                "MODEL.EMA.ENABLED is %s and %s was written with %s: %s.",
                self.average is not None, found, state is not None,
                "the average begins with its weights" if state is None else "its average is left out",
            )  # fmt: skip
        return content


def check_average(cfg: CfgNode) -> None:
    """The keys of ``MODEL.EMA``, before a training.

    Raises:
        UserError: a decay outside its range, or settings beside which there is no average.
    """
    keys = cfg.MODEL.EMA
    if not 0 <= keys.DECAY < 1:  # NaN neither
        raise UserError(
            f"MODEL.EMA.DECAY is {keys.DECAY}: expected 0 or more and below 1, such as 0.9998; set it so."
        )
    if not keys.ENABLED:
        return
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise UserError(
            "MODEL.EMA.ENABLED and TEST.PRECISE_BN.ENABLED are both True: BatchNorm's statistics would be computed with "
            "other weights than those that are evaluated; set one of the two False."
        )
    for name, method in methods_of(cfg).items():
        if method.prepares(cfg):
            raise UserError(
                f"MODEL.EMA.ENABLED is True in a run that trains a part of {name} alone: there is no detector to "
                "average; set it False, and True in the run that distils."
            )
