"""Scalars of a run, sent to Weights & Biases or to MLflow beside TensorBoard and ``metrics.json``.

Where they go is said to those packages in their own way, by their environment: ``WANDB_MODE offline`` keeps them on this
machine, ``MLFLOW_TRACKING_URI`` names the server or data base. A run that is resumed goes on in the same run of
theirs. What cannot be sent is told once and costs the run nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from era.checkpoint.writing import write_text_whole
from era.engine.resume import WINDOW
from era.errors import UserError

logger = logging.getLogger(__name__)

FILE = "tracking.json"  # in OUTPUT_DIR: the run's ids, by tracker
MLFLOW_BATCH = 1000  # metrics of one request, MLflow's own limit


class Tracker(Protocol):
    """One of those services."""

    def start(self, run: str) -> str:
        """Begin a run, or go on with the one of that id; its id."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Scalars of one iteration."""

    def finish(self, *, done: bool) -> None:
        """The run has come to its end, or was stopped before."""


class Wandb:
    """Weights & Biases. The iteration is an axis of its own, for what a resumed run repeats comes again."""

    def __init__(self, cfg: CfgNode):
        self._cfg = cfg
        self._run = None

    def start(self, run: str) -> str:
        """See :class:`Tracker`."""
        import wandb

        cfg = self._cfg
        self._run = wandb.init(
            project=cfg.TRACKING.PROJECT,
            name=run_name(cfg),
            dir=cfg.OUTPUT_DIR,
            config=yaml.safe_load(cfg.dump()),
            id=run or None,
            resume="allow",
        )
        self._run.define_metric("*", step_metric="iteration")
        return self._run.id

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._run.log({"iteration": iteration, **values})

    def finish(self, *, done: bool) -> None:
        """See :class:`Tracker`."""
        self._run.finish(exit_code=0 if done else 1)


class Mlflow:
    """MLflow, by its client alone."""

    def __init__(self, cfg: CfgNode):
        self._cfg = cfg
        self._client = self._id = None

    def start(self, run: str) -> str:
        """See :class:`Tracker`."""
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run:
            self._client.update_run(run, status="RUNNING")
            self._id = run
            return run
        project = self._cfg.TRACKING.PROJECT
        experiment = self._client.get_experiment_by_name(project)
        where = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self._id = self._client.create_run(where, run_name=run_name(self._cfg)).info.run_id
        self._client.log_text(self._id, self._cfg.dump(), "config.yaml")
        return self._id

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, iteration) for name, value in values.items()]
        for first in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + MLFLOW_BATCH])

    def finish(self, *, done: bool) -> None:
        """See :class:`Tracker`."""
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


TRACKERS: dict[str, Callable[[CfgNode], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def check_tracking(cfg: CfgNode) -> None:
    """``TRACKING.WRITERS`` names what is there.

    Raises:
        UserError: a name that is not known, a package that is not installed, or no place for MLflow.
    """
    for name in cfg.TRACKING.WRITERS:
        if name not in TRACKERS:
            raise UserError(
                f"TRACKING.WRITERS names {name!r}: expected some of {', '.join(TRACKERS)}; TensorBoard's files are written anyway."
            )
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"TRACKING.WRITERS names {name}, whose package is not installed: run pip install 'era-detectron2[{name}]', or "
                "take it out."
            )
    if "mlflow" in cfg.TRACKING.WRITERS and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            "TRACKING.WRITERS names mlflow, but MLFLOW_TRACKING_URI is not set: expected the address of a server, or "
            "sqlite:///FILE with the whole of MLflow installed; set it."
        )


def run_name(cfg: CfgNode) -> str:
    """``TRACKING.NAME``, or the last part of ``OUTPUT_DIR``."""
    return cfg.TRACKING.NAME or os.path.basename(os.path.abspath(cfg.OUTPUT_DIR))


class TrackingWriter(EventWriter):
    """Sends every scalar that is new, smoothed as in ``metrics.json``. Of the main process alone.

    Args:
        name: of :data:`TRACKERS`.
        cfg: of the run.
        is_resumed: whether the run goes on from a checkpoint; asked at the first write.
    """

    def __init__(self, name: str, cfg: CfgNode, is_resumed: Callable[[], bool]):
        self.name = name
        self._tracker: Tracker | None = TRACKERS[name](cfg)
        self._path = os.path.join(cfg.OUTPUT_DIR, FILE)
        self._is_resumed = is_resumed
        self._is_started = False
        self._last = -1

    def write(self) -> None:
        """New scalars, by iteration."""
        new: dict[int, dict[str, float]] = {}
        for name, (value, at) in get_event_storage().latest_with_smoothing_hint(WINDOW).items():
            if at > self._last and math.isfinite(value):
                new.setdefault(at, {})[name] = value
        for iteration, values in sorted(new.items()):
            self._do(lambda tracker, i=iteration, v=values: tracker.log(i, v))
            self._last = iteration

    def close(self) -> None:
        """Told whether an error or a signal ended the run."""
        done = sys.exc_info()[1] is None
        if self._is_started:
            self._do(lambda tracker: tracker.finish(done=done))

    def _do(self, action: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            if not self._is_started:
                self._start(self._tracker)
            action(self._tracker)
        except Exception as e:  # whatever their packages and servers raise
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
            logger.warning(
                "%s takes no scalars any more (%s); the run goes on, and metrics.json has all of them.",
                self.name,
                reason,
            )
            self._tracker = None

    def _start(self, tracker: Tracker) -> None:
        ids = _ids(self._path) if self._is_resumed() else {}
        ids[self.name] = tracker.start(ids.get(self.name, ""))
        write_text_whole(json.dumps(ids), self._path)
        self._is_started = True


def _ids(path: str) -> dict[str, str]:
    """Of the run that is resumed; of a file that cannot be read, none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return {name: found[name] for name in TRACKERS if isinstance(found.get(name), str)}
    except (OSError, ValueError, AttributeError):
        return {}
