"""Scalars that go to Weights & Biases and MLflow: offline, in files of this machine."""

import json
import logging
import time

import pytest
from builders import cli, tiny_cfg
from detectron2.utils.events import EventStorage

from era.engine import tracking
from era.engine.launch import train_net
from era.engine.tracking import TrackingWriter, check_tracking
from era.errors import UserError


class Noted:
    """A service that notes what it is told, and fails at an iteration."""

    def __init__(self, fails_at=None):
        self.told, self.fails_at = [], fails_at

    def start(self, run):
        self.told.append(("start", run))
        return run or "new"

    def log(self, iteration, values):
        if iteration == self.fails_at:
            raise ConnectionError("no route\nto host")
        self.told.append((iteration, dict(values)))

    def finish(self, *, done):
        self.told.append(("finish", done))


@pytest.fixture
def writer_of(tmp_path, monkeypatch):
    """Writers to one service, in one folder."""

    def build(service, *, resumed=False):
        monkeypatch.setitem(tracking.TRACKERS, "wandb", lambda cfg: service)
        return TrackingWriter(
            "wandb", tiny_cfg("plain", "OUTPUT_DIR", str(tmp_path)), lambda: resumed
        )

    return build


def written(writer, first, last):
    with EventStorage(first) as storage:
        for i in range(first, last):
            storage.put_scalar("loss", float(i), smoothing_hint=False)
            if i % 2:
                storage.put_scalar("AP", float("nan") if i == 3 else 50.0, smoothing_hint=False)
                writer.write()
            storage.step()
        writer.close()


def test_what_is_new_is_sent_once_and_nan_is_left_out(writer_of):
    service = Noted()
    written(writer_of(service), 0, 6)
    assert service.told == [
        ("start", ""), (1, {"loss": 1.0, "AP": 50.0}), (3, {"loss": 3.0}), (5, {"loss": 5.0, "AP": 50.0}),
        ("finish", True),
    ]  # fmt: skip


def test_a_resumed_run_goes_on_and_a_new_one_in_the_same_folder_does_not(writer_of, tmp_path):
    written(writer_of(Noted()), 0, 2)
    assert json.loads((tmp_path / "tracking.json").read_text()) == {"wandb": "new"}
    again, anew = Noted(), Noted()
    written(writer_of(again, resumed=True), 2, 4)
    written(writer_of(anew), 0, 2)
    assert again.told[0] == ("start", "new") and anew.told[0] == ("start", "")
    (tmp_path / "tracking.json").write_text('{"wandb": ["damaged"]}')
    written(writer_of(again, resumed=True), 2, 4)
    assert again.told[-3] == ("start", "")


def test_a_service_that_fails_is_told_once_and_the_run_goes_on(writer_of, caplog):
    service = Noted(fails_at=3)
    with caplog.at_level(logging.WARNING):
        written(writer_of(service), 0, 8)
    assert [item[0] for item in service.told] == ["start", 1]
    assert caplog.text.count("wandb takes no scalars any more (no route); the run goes on") == 1


def test_the_end_of_a_run_that_was_stopped_is_told(writer_of):
    service = Noted()
    with pytest.raises(KeyboardInterrupt), EventStorage(0) as storage:
        writer = writer_of(service)
        storage.put_scalar("loss", 1.0)
        writer.write()
        try:
            raise KeyboardInterrupt
        finally:
            writer.close()
    assert service.told[-1] == ("finish", False)


def test_weights_and_biases_offline(tiny_data, tmp_path, monkeypatch):
    """A run and its continuation, through the command line: the same run of theirs."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    args = cli(
        tiny_data, run, "TRACKING.WRITERS", "('wandb',)", "DATASETS.TEST", "()", config="plain"
    )
    train_net([*args, "SOLVER.MAX_ITER", "2"])
    name = json.loads((run / "tracking.json").read_text())["wandb"]
    train_net(["--resume", *args, "SOLVER.MAX_ITER", "4"])
    assert json.loads((run / "tracking.json").read_text())["wandb"] == name
    files = sorted((run / "wandb").glob(f"offline-run-*-{name}*/run-{name}*.wandb"))
    assert len(files) == 2
    for file in files:
        until_it_holds(file, b"total_loss")


def until_it_holds(file, text: bytes) -> None:
    """Their own process writes the file, and is not done when the run is."""
    end = time.monotonic() + 30
    while text not in file.read_bytes():
        assert time.monotonic() < end, f"{file} has no {text}"
        time.sleep(0.1)


def test_mlflow_in_files(tiny_data, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    args = cli(tiny_data, run, "TRACKING.WRITERS", "('mlflow',)", "TRACKING.NAME", "first", "DATASETS.TEST", "()",
               config="plain")  # fmt: skip
    train_net([*args, "SOLVER.MAX_ITER", "2"])
    train_net(["--resume", *args, "SOLVER.MAX_ITER", "4"])
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("era").experiment_id])
    assert found.info.run_name == "first" and found.info.status == "FINISHED"
    sent = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "total_loss")}
    with open(run / "metrics.json") as file:
        kept = {line["iteration"]: line["total_loss"] for line in map(json.loads, file)}
    # metrics.json has the lines of one run of 4 iterations, and none where the first run ended
    assert set(kept) == {3} and set(sent) == {1, 3} and sent[3] == pytest.approx(kept[3])
    text = client.download_artifacts(found.info.run_id, "config.yaml", str(tmp_path))
    with open(text) as file:
        assert "TRACKING:" in file.read()


@pytest.mark.parametrize("writers, message", [
    (("tensorbord",), r"TRACKING\.WRITERS names 'tensorbord': expected some of wandb, mlflow; TensorBoard's files"),
    (("wandb",), r"names wandb, whose package is not installed: run pip install 'era-detectron2\[wandb\]'"),
    (("mlflow",), r"MLFLOW_TRACKING_URI is not set: expected the address of a server"),
])  # fmt: skip
def test_what_is_not_there_is_refused(writers, message, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    has = {"mlflow": object()}
    monkeypatch.setattr(tracking.importlib.util, "find_spec", has.get)
    with pytest.raises(UserError, match=message):
        check_tracking(tiny_cfg("plain", "TRACKING.WRITERS", str(writers)))
