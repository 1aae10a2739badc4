"""The launcher: processes that meet and part, and runs that diverge."""

import os
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from builders import Once, cli, run_tool, tiny_cfg
from detectron2.engine import launch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from PIL import Image

from era import compat
from era.engine.launch import argument_parser, launch_processes, train_net
from era.engine.processes import Outcome
from era.engine.stepping import StepTrainer
from era.errors import UserError


@contextmanager
def in_use(port):
    """A port of this machine that somebody else listens at; 0 = any."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", port))
            other.listen()
        except OSError:  # by another program of this machine, which is as good
            yield port
        else:
            yield other.getsockname()[1]


def test_two_processes_through_the_command_line(tiny_data, tmp_path):
    """Also while the port of Detectron2's default --dist-url is in use, as by another run."""
    default_port = int(argument_parser().get_default("dist_url").rpartition(":")[2])
    with in_use(default_port):
        done = run_tool(
            "train_net.py", "--num-gpus", "2",
            *cli(tiny_data, tmp_path / "run", "SOLVER.MAX_ITER", "2", "SOLVER.AMP.ENABLED", "True",
                 "SOLVER.ACCUMULATION_STEPS", "2", "SOLVER.IMS_PER_BATCH", "4",
                 "MODEL.ERA.NORM", "GN"),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "World size: 2" in done.stdout
    assert (tmp_path / "run" / "student" / "model_final.pth").exists()


def test_a_picture_that_one_process_cannot_read_stops_all(tiny_data, tmp_path):
    """Its head is whole, so that it is met in training; whichever process meets it says so."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        noise = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(photos / name)
    broken = photos / "b.png"
    broken.write_bytes(broken.read_bytes()[:-3000])
    done = run_tool(
        "train_net.py", "--num-gpus", "2",
        *cli(tiny_data, tmp_path / "run", "SOLVER.MAX_ITER", "50", "SOLVER.IMS_PER_BATCH", "4",
             "DATASETS.IMAGE_FOLDERS", f"[['photos', '{photos}']]", "DATASETS.UNLABELED", "('photos',)",
             "SOLVER.UNLABELED_PER_BATCH", "2"),
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors and all(f"the picture {broken} cannot be read (" in line for line in errors)
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_in_between(monkeypatch):
    """One that was named is an error in one sentence; one that was found is replaced by another."""
    args = argument_parser().parse_args(["--num-gpus", "2"])
    with in_use(0) as taken:
        args.dist_url = f"tcp://127.0.0.1:{taken}"
        with pytest.raises(UserError, match=rf"{args.dist_url} \(the port is in use\).*name") as e:
            launch_processes(print, args)
    assert "\n" not in str(e.value)

    traceback, hows = e.value.__cause__.msg, []  # what really happens, once more

    def taken_once(function, args, how):
        hows.append(how)
        codes, first = ([1, 0], 0) if len(hows) == 1 else ([0, 0], None)
        return Outcome(
            asked=0,
            at_once=False,
            codes=codes,
            first=first,
            traceback=traceback if codes[0] else "",
        )

    monkeypatch.setattr("era.engine.launch.run_processes", taken_once)
    args.dist_url = "auto"
    launch_processes(print, args)
    assert [how.url for how in hows] == [
        "auto",
        "auto",
    ]  # each time another free port is looked for


def test_several_machines_need_an_address():
    args = argument_parser().parse_args(["--num-machines", "2", "--dist-url", "auto"])
    with pytest.raises(UserError, match=r"--dist-url is auto.*tcp://HOST:PORT"):
        launch_processes(print, args)


class SpoiltGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@META_ARCH_REGISTRY.register()
class SpoiltRCNN(GeneralizedRCNN):
    """From iteration 3 on its loss, or the gradient of its finite loss, is NaN."""

    spoil = "gradient"

    def forward(self, batched_inputs):
        losses = super().forward(batched_inputs)
        if self.training and get_event_storage().iter >= 3:
            loss = losses["loss_cls"]
            losses["loss_cls"] = (
                SpoiltGradient.apply(loss) if self.spoil == "gradient" else loss * float("nan")
            )
        return losses


@pytest.mark.parametrize("spoil", ["gradient", "loss"])
def test_divergence_stops_the_run_and_leaves_whole_checkpoints(
    spoil, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(SpoiltRCNN, "spoil", spoil)
    args = cli(tiny_data, tmp_path, "MODEL.META_ARCHITECTURE", "SpoiltRCNN", "DATASETS.TEST", "()",
               "SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "2", config="plain")  # fmt: skip
    with pytest.raises(SystemExit) as e:
        train_net(args)
    assert e.value.code == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "training diverged" in told[0] and "--resume" in told[0]
    log = (tmp_path / "log.txt").read_text()
    assert "NaN at iteration" in log and "Traceback" not in log
    assert [p.name for p in tmp_path.glob("*.pth")] == ["model_0000001.pth"]
    assert not (tmp_path / "student").exists()
    saved = torch.load(tmp_path / "model_0000001.pth", weights_only=True)["model"]
    assert all(torch.isfinite(v).all() for v in saved.values())


class Spoilt(torch.nn.Module):
    """One weight whose gradient is NaN in the given calls."""

    def __init__(self, calls):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.calls, self.count = calls, 0

    def forward(self, data):
        loss = (self.weight * data).sum()
        self.count += 1
        return {"loss": SpoiltGradient.apply(loss) if self.count - 1 in self.calls else loss}


def spoilt_trainer(calls, steps, amp=None, clip=None):
    model = Spoilt(calls)
    optimizer = torch.optim.SGD
    if clip:
        cfg = tiny_cfg("plain", "SOLVER.CLIP_GRADIENTS.ENABLED", "True",
                       "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip)  # fmt: skip
        optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    optimizer = optimizer(model.parameters(), lr=0.1)
    return StepTrainer(
        model, Once(*[torch.ones(4)] * steps), optimizer, amp_dtype=amp, device_type="cpu"
    )


def run_steps(trainer, steps):
    with EventStorage(0) as storage:
        for trainer.iter in range(steps):
            storage.iter = trainer.iter
            trainer.run_step()


@pytest.mark.parametrize("clip", [None, "value", "norm"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(clip, amp):
    trainer = spoilt_trainer({2}, 3, amp, clip)
    with pytest.raises(FloatingPointError, match="gradient became infinite or NaN at iteration 2"):
        run_steps(trainer, 3)
    assert trainer.model.weight.tolist() == pytest.approx([0.8] * 4)  # two steps of 0.1


def test_float16_skips_single_overflows_and_stops_at_the_smallest_scale():
    trainer = spoilt_trainer({1, 2}, 5, torch.float16)
    run_steps(trainer, 5)
    assert trainer.model.weight.tolist() == pytest.approx([0.7] * 4)  # three of five steps
    trainer = spoilt_trainer(set(range(100)), 100, torch.float16)
    with pytest.raises(FloatingPointError, match="not finite at any loss scale"):
        run_steps(trainer, 100)
    assert trainer.iter == 30 and trainer.model.weight.tolist() == [1.0] * 4


def _one_spoilt_rank(folder):
    rank = comm.get_rank()
    outcome = _two_spoilt_steps(rank)
    compat.leave_process_group()
    tasks = Path("/proc/self/task")  # on Linux
    threads = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.is_dir() else []
    torch.save((*outcome, threads), os.path.join(folder, f"{rank}.pth"))


def _two_spoilt_steps(rank):
    model = torch.nn.parallel.DistributedDataParallel(Spoilt({1} if rank == 1 else set()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = StepTrainer(model, Once(*[torch.ones(4)] * 2), optimizer, device_type="cpu")
    try:
        run_steps(trainer, 2)
    except FloatingPointError as e:
        return str(e), model.module.weight.tolist()


def test_a_spoilt_gradient_in_one_process_stops_all(tmp_path):
    """And no thread of the process group is left to abort a process at its exit."""
    launch(_one_spoilt_rank, 2, dist_url="auto", args=(str(tmp_path),))
    for rank in range(2):
        sentence, weight, threads = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert not [name for name in threads if "gloo" in name]
        assert "gradient became infinite or NaN at iteration 1" in sentence
        assert weight == pytest.approx([0.9] * 4)
