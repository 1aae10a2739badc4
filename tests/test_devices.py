"""Apple's GPU (MPS) by construction: no machine here has one, so what is asked of torch is a stand-in, and nothing is measured."""

import pytest
import torch
from builders import batch, cli, masked_batch, tiny_model
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from era import devices
from era.checkpoint import finite
from era.data.seeds import seed_all
from era.devices import FALLBACK, check_mps, gpu_name, is_there, kind_of
from era.doctor import steps as doctor_steps
from era.doctor.case import Case
from era.doctor.cli import read_options
from era.doctor.steps import take_steps
from era.engine import stepping
from era.engine.launch import argument_parser
from era.engine.preflight import check_devices, setup_config
from era.engine.schedule import amp_dtype
from era.engine.stepping import StepTrainer
from era.errors import UserError

MPS = ["MODEL.DEVICE", "mps"]


@pytest.fixture
def apple(monkeypatch):
    """A machine with such a GPU, as far as anybody asks; what was asked of it."""
    asked = []
    monkeypatch.delenv(FALLBACK, raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: asked.append(("seed", seed)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: asked.append(("wait",)))
    return asked


def config(tiny_data, tmp_path, *opts, processes=1, name="plain"):
    args = ["--num-gpus", str(processes), *cli(tiny_data, tmp_path, *MPS, *opts, config=name)]
    return setup_config(argument_parser().parse_args(args))


def test_kinds():
    assert [kind_of(d) for d in ("cpu", "cuda", "cuda:1", torch.device("mps"))] == ["cpu", "cuda", "cuda", "mps"]  # fmt: skip
    with pytest.raises(UserError, match=r"MODEL\.DEVICE is 'tpu': expected cpu, cuda or mps"):
        kind_of("tpu")
    assert is_there("cpu") and gpu_name("cpu") is None


def test_a_machine_without_one_says_so(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"MODEL\.DEVICE is mps, which this machine does not have \(.*\): set it"
    ) as e:
        config(tiny_data, tmp_path)
    assert "\n" not in str(e.value)


def test_a_run_is_accepted_and_the_operations_without_a_kernel_are_named(
    apple, tiny_data, tmp_path, monkeypatch, caplog
):
    cfg = config(tiny_data, tmp_path)
    assert cfg.MODEL.DEVICE == "mps" and amp_dtype(cfg) is None
    check_devices(cfg, 1)  # CUDA's GPUs are not counted
    assert (
        f"{FALLBACK} is not set" in caplog.text
        and f"{FALLBACK}=1 in the environment" in caplog.text
    )
    assert "torchvision::_deform_conv2d_backward" in caplog.text
    caplog.clear()
    monkeypatch.setenv(FALLBACK, "1")
    config(tiny_data, tmp_path)
    assert FALLBACK not in caplog.text


@pytest.mark.parametrize(
    ("opts", "processes", "sentence"),
    [
        (["SOLVER.AMP.ENABLED", "True"], 1, r"SOLVER\.AMP\.ENABLED is True .* no backward pass in half precision"),
        ([], 2, r"--num-gpus is 2 and MODEL\.DEVICE mps: Apple's GPU is one"),
        (["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, False, True]"], 1, rf"no kernel for torchvision::_deform_conv2d_backward.*set {FALLBACK}=1"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(apple, tiny_data, tmp_path, opts, processes, sentence):
    with pytest.raises(UserError, match=sentence):
        config(tiny_data, tmp_path, *opts, processes=processes)


def test_deformable_convs_run_where_they_may_fall_back(apple, monkeypatch):
    monkeypatch.setenv(FALLBACK, "1")
    assert check_mps(processes=1, mixed_precision=False, deformable=True) == ""


def test_the_named_operations_exist_and_the_needed_ones_are_torchvisions():
    """A new torchvision with other names has to be looked at."""
    for name in (
        *devices.WITHOUT_MPS_KERNEL,
        "torchvision::nms",
        "torchvision::roi_align",
        "torchvision::_roi_align_backward",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def test_seeds_and_waiting_reach_it(apple):
    seed_all(7)
    devices.synchronise("mps")
    devices.synchronise("cpu")
    assert apple == [("seed", 7), ("wait",)]
    assert gpu_name() in (
        "Apple GPU (MPS)",
        gpu_name("cuda") if torch.cuda.is_available() else None,
    )


class NoDouble(TorchDispatchMode):
    """Refuses float64, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        doubles = [
            t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.dtype == torch.float64
        ]
        if doubles:
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {func}")
        return made


def take(model, inputs, *, count=2):
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9
    )
    trainer = StepTrainer(model, [inputs] * count, optimizer, device_type="mps")
    with EventStorage():
        for trainer.iter in range(count):
            trainer.run_step()
    return trainer


@pytest.mark.parametrize("family", ["era", "retinanet_era", "fcos_era", "mask_era", "cascade_era"])
def test_a_step_of_every_family_asks_for_no_float64(monkeypatch, family):
    """On the CPU, with what a step, a look at the weights and a detection would do on MPS, which has no float64."""
    teacher = {"era": "teacher"}.get(family, family.replace("era", "teacher"))
    model = tiny_model(family, teacher=teacher).train()
    inputs = masked_batch((2, 1)) if family == "mask_era" else batch()
    with NoDouble(), pytest.raises(TypeError, match="float64"):
        finite.largest(list(model.parameters()))  # the stand-in refuses what a CPU may do
    for module in (finite, stepping):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    with NoDouble():
        trainer = take(model, inputs)
        assert all(size >= 0 for size in finite.largest(list(model.parameters())))
        with torch.no_grad():
            model.eval()(inputs)
    assert trainer.steps[-1].losses and devices.widest_float("mps") == torch.float32
    assert devices.widest_float("cpu") == devices.widest_float("cuda") == torch.float64


def test_the_doctor_takes_its_steps_on_it(apple, tiny_data, tmp_path, monkeypatch):
    """One process there, two on the CPU: it is one device."""
    commands = []
    monkeypatch.setattr(doctor_steps, "_run", lambda command, *_: commands.append(command) or (1, "error: enough"))  # fmt: skip
    args = read_options(cli(tiny_data, tmp_path, *MPS, config="plain"))
    case = Case(args, setup_config(args))
    assert case.on_mps and not case.on_gpu
    for processes in (1, 2):
        assert take_steps(case, processes, on_gpu=False)["problem"] == "enough"
    devices_asked = [c[len(c) - 1 - c[::-1].index("MODEL.DEVICE") + 1] for c in commands]
    assert devices_asked == ["mps", "cpu"]
