"""Room for checkpoints: what is foreseen is what files take, and too little stops a run before it starts."""

import pytest
import torch
from builders import batch, cli, losses_of, tiny_cfg, tiny_model
from detectron2.solver import build_optimizer

from era.checkpoint.reading import SafeCheckpointer
from era.engine import room
from era.engine.launch import train_net
from era.errors import UserError


def test_a_checkpoint_is_as_large_as_foreseen(tmp_path):
    cfg = tiny_cfg("methods/pkd", "OUTPUT_DIR", str(tmp_path), "MODEL.PKD.LEVELS", "['p3']")
    model = tiny_model("methods/pkd", "MODEL.PKD.LEVELS", "['p3']")
    optimizer = build_optimizer(cfg, model)
    losses, _ = losses_of(model, batch((2, 1)))
    sum(losses.values()).backward()
    optimizer.step()
    SafeCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_0000000")
    found = (tmp_path / "model_0000000.pth").stat().st_size
    expected = room.room_for(cfg, model).checkpoint
    assert expected == pytest.approx(
        found, rel=0.15
    )  # a file of so small tensors is a tenth zip entries
    assert expected <= found


@pytest.mark.parametrize(
    ("period", "iterations", "count"), [(10, 35, 3 + 1), (100, 35, 1), (35, 35, 2), (0, 35, 1)]
)
def test_how_many_checkpoints_there_are_at_a_time(tmp_path, period, iterations, count):
    cfg = tiny_cfg("plain", "OUTPUT_DIR", str(tmp_path))
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER = period, iterations
    assert room.room_for(cfg, torch.nn.Linear(2, 3)).count == count


def test_the_numbers_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda folder: 1000)
    (tmp_path / "model_0000009.pth").write_bytes(b"x" * 50)  # overwritten by the run
    cfg = tiny_cfg("plain", "OUTPUT_DIR", str(tmp_path))
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER = 10, 10
    found = room.room_for(cfg, torch.nn.Linear(2, 3))  # 9 weights of 4 bytes
    assert (found.checkpoint, found.count, found.weights) == (2 * 36, 2, 36)
    assert (found.needed, found.free) == (180, 1050)


def test_a_frozen_weight_has_no_momentum(tmp_path):
    model = torch.nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    cfg = tiny_cfg("plain", "OUTPUT_DIR", str(tmp_path))
    assert room.room_for(cfg, model).checkpoint == 36 + 24


def test_training_refuses_a_full_disk_before_it_writes(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"OUTPUT_DIR .*too little room .*1 checkpoint.*free"):
        train_net(cli(tiny_data, tmp_path / "out", "SOLVER.MAX_ITER", "1"))
    assert not (tmp_path / "out").exists()
