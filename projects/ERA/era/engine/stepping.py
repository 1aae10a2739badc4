"""One optimiser step: forward and backward of its batches, what is checked before the weights are touched, the update."""

from __future__ import annotations

import time
from collections import deque
from contextlib import nullcontext

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from era import compat
from era.devices import widest_float
from era.engine.guard import (
    MAX_LOSS,
    Buffers,
    Diverged,
    TakenStep,
    bad_gradients,
    check_losses,
    gradients_in_words,
)
from era.engine.watch import LossWatch

# float16 skips a step whose scaled gradients overflow and halves the scale, from 65536. Below this (fairseq's
# bound; thirty steps in a row) no scale helps.
MIN_LOSS_SCALE = 1e-4


class StepTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer with gradient accumulation and mixed precision on GPU and CPU, which stops before
    numbers that are not finite, or losses out of every bound, reach the weights.

    Args:
        model, data_loader, optimizer: as SimpleTrainer.
        accumulation_steps: batches whose mean gradient makes one optimiser step.
        amp_dtype: type of autocast, None for float32 throughout. float16 scales the loss.
        device_type: ``cuda``, ``cpu`` or ``mps``, for autocast.
        max_loss: ``SOLVER.MAX_LOSS``.
        watch: warns of losses that teach nothing; None for nobody.

    Attributes:
        steps: what the last steps, two at most, were taken on; the newest last.
        buffers: the model's as they were before the newest step.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation_steps: int = 1,
        amp_dtype: torch.dtype | None = None,
        device_type: str = "cuda",
        max_loss: float = MAX_LOSS,
        watch: LossWatch | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.accumulation_steps = accumulation_steps
        self.amp_dtype = amp_dtype
        self.device_type = device_type
        self.max_loss = max_loss
        self.watch = watch
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=amp_dtype == torch.float16)
        self.steps: deque[TakenStep] = deque(maxlen=2)
        self.buffers = Buffers(model)

    def run_step(self) -> None:
        """One optimiser step: forward and backward of every batch in it, then the update.

        Raises:
            Diverged: in all processes alike: a loss or a gradient is not finite, or a loss is above ``max_loss``; the
                weights are as before the step.
            FloatingPointError: a detector's own, in this process alone.
        """
        assert self.model.training, "the model was changed to eval mode"
        self.optimizer.zero_grad()
        self.buffers.remember()
        step = TakenStep(self.iter, [float(g["lr"]) for g in self.optimizer.param_groups])
        self.steps.append(step)
        data_time, total = 0.0, {}
        for index in range(self.accumulation_steps):
            start = time.perf_counter()
            data = compat.next_batch(self)
            data_time += time.perf_counter() - start
            step.batches.append(data)
            is_last = index == self.accumulation_steps - 1
            with self._no_sync() if not is_last else nullcontext():
                losses = self._forward(data)
                if self.watch is not None and index == 0:
                    self.watch.look_at_gradients(losses, self.grad_scaler.scale)
                self.grad_scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0.0) + loss.detach()
        self.after_backward()
        step.losses = numbers(total)
        by_process = comm.all_gather((step.losses, data_time))
        check_losses([losses for losses, _ in by_process], self.max_loss, self.iter)
        means = self._note(by_process, data_time)
        self._check_gradients()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.watch is not None:
            self.watch.see(means)

    def _forward(self, data: list[dict]) -> dict[str, Tensor]:
        """The losses of a batch, each by its part of the step."""
        with torch.autocast(
            self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            losses = self.model(data)
        return {name: loss / self.accumulation_steps for name, loss in losses.items()}

    def _note(
        self, by_process: list[tuple[dict[str, float], float]], data_time: float
    ) -> dict[str, float]:
        """Into the event storage, under Detectron2's names; the mean losses over all processes."""
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time, cur_iter=self.iter)
        names = by_process[0][0]
        means = {name: np.mean([losses[name] for losses, _ in by_process]) for name in names}
        if comm.is_main_process():
            storage.put_scalar("data_time", max(t for _, t in by_process), cur_iter=self.iter)
            storage.put_scalar("total_loss", sum(means.values()), cur_iter=self.iter)
            if len(means) > 1:
                storage.put_scalars(cur_iter=self.iter, **means)
        return means

    def _check_gradients(self) -> None:
        # DDP has averaged the gradients: every process sees the same and stops alike.
        if self.grad_scaler.is_enabled():  # it looks at the gradients itself, and skips the step
            scale = self.grad_scaler.get_scale()
            if scale < MIN_LOSS_SCALE:
                raise Diverged(
                    f"gradients in float16 were not finite at any loss scale down to {scale:.1e} "
                    f"at iteration {self.iter}",
                    gradients=bad_gradients(self.model),
                )
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not torch.isfinite(get_total_norm(gradients)):  # all that the host waits for
            found = bad_gradients(self.model)
            raise Diverged(
                f"a gradient became infinite or NaN at iteration {self.iter} ({gradients_in_words(found)})",
                gradients=found,
            )

    def _no_sync(self):
        is_ddp = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if is_ddp else nullcontext()

    def state_dict(self) -> dict:
        """Optimiser, hooks, and the loss scale of float16."""
        state = super().state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Inverse of :meth:`state_dict`; a checkpoint of a run in another precision is accepted."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    """Scalars by name, fetched from their device in one go."""
    if not losses:
        return {}
    scalars = [loss.detach().reshape(()) for loss in losses.values()]
    values = torch.stack([scalar.to(widest_float(scalar.device)) for scalar in scalars])
    return dict(zip(losses, values.tolist(), strict=True))
