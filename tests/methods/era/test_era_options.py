"""What may be switched on beyond ERA's defaults: numbers by hand, neutral values, gradients, checkpoints."""

import pytest
import torch
from builders import batch, losses_of, tiny_model
from detectron2.utils.events import EventStorage

from era.errors import UserError
from era.methods.era import ERA
from era.methods.era.fast.factored import ends_linear
from era.methods.era.mbrnet import MBRNet
from era.runs.series import chart_series

# ---- what the branches remove -----------------------------------------------------------------------


def test_the_fraction_removed_by_hand():
    """Distances 8, 6 and 2 at p3: three quarters are gone; at p4 the branches do harm; at p5 nothing was left."""
    era = tiny_model("era").methods["era"]
    era.estimator.levels = ["p3", "p4", "p5"]
    with EventStorage(0) as storage:
        era._log(torch.tensor([[8.0, 6.0, 2.0], [4.0, 3.0, 5.0], [0.0, 0.0, 0.0]]))
    found = {k: v[0] for k, v in storage.latest().items() if k.endswith("/removed")}
    assert found == {"era/p3/removed": 0.75, "era/p4/removed": -0.25}
    assert storage.latest()["era/p5/residual_e2"][0] == 0


@pytest.mark.parametrize("count", [0, 2])
def test_the_fraction_removed_follows_from_the_distances(count):
    model = tiny_model("era", "MODEL.ERA.NUM_BRANCHES", count, "MODEL.ERA.SCALES", [1.0] * count)
    _, storage = losses_of(model, batch())
    logged = {name: value[0] for name, value in storage.latest().items()}
    (chart,) = (c for c in ERA.charts if "remove" in c.title)
    curves = chart_series([{"iteration": 0, **logged}], chart)
    assert [name for name, _, _ in curves] == (["p3", "p4", "p5", "p6"] if count else [])
    for level, _, values in curves:
        first, last = (logged[f"era/{level}/residual_e{i}"] for i in (0, count))
        assert values.tolist() == [pytest.approx(1 - last / first)]


# ---- branches with context --------------------------------------------------------------------------


def test_the_first_conv_sees_its_surroundings_and_the_last_does_not():
    """1 everywhere, kernels of 1: nine neighbours inside, four at a corner, then x 2 and x 3."""
    net = MBRNet(
        in_channels=1, out_channels=1, num_branches=1, num_blocks=3, norm="none", context_kernel=3
    )
    convs = list(net.branches[0])[::2]
    assert [conv.kernel_size for conv in convs] == [(3, 3), (1, 1), (1, 1)]
    for conv, gain in zip(convs, (1.0, 2.0, 3.0), strict=True):
        torch.nn.init.constant_(conv.weight, gain)
    (found,) = net(torch.ones(1, 1, 3, 3))
    assert found[0, 0].tolist() == [[24, 36, 24], [36, 54, 36], [24, 36, 24]]
    assert ends_linear(net)


@pytest.mark.parametrize("norm", ["none", "GN", "BN"])
@pytest.mark.parametrize("channels", [16, 24], ids=["equal width", "up-projected"])
def test_a_zero_start_adds_nothing_and_learns(norm, channels):
    """All e_i are e_0 at first, and after one step of plain SGD a gradient reaches every weight of every branch."""
    model = tiny_model(
        "era", "MODEL.ERA.ZERO_START", "True", "MODEL.ERA.CONTEXT_KERNEL", "3", "MODEL.ERA.NORM", norm,
        teacher_opts=["MODEL.FPN.OUT_CHANNELS", channels],
    )  # fmt: skip
    net = model.methods["era"].estimator.mbrnet
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for is_first in (True, False):
        losses, storage = losses_of(model, batch())
        distances = [storage.latest()[f"era/p3/residual_e{i}"][0] for i in range(5)]
        assert (distances[1:] == pytest.approx([distances[0]] * 4, rel=1e-6)) == is_first
        optimizer.zero_grad()
        sum(v for k, v in losses.items() if k.startswith("loss_era")).backward()
        assert all(p.grad is not None for p in net.parameters())  # DDP waits for none
        last = [branch[-1].weight for branch in net.branches]
        assert all(w.grad.abs().sum() > 0 for w in (last if is_first else net.parameters()))
        optimizer.step()


def test_context_and_zero_start_rename_no_weight():
    plain = tiny_model("era").state_dict()
    found = tiny_model("era", "MODEL.ERA.CONTEXT_KERNEL", "3", "MODEL.ERA.ZERO_START", "True")
    assert found.state_dict().keys() == plain.keys()


@pytest.mark.parametrize("value", ["2", "-1"])
def test_a_context_kernel_is_odd(value):
    with pytest.raises(UserError, match=rf"CONTEXT_KERNEL is {value}: expected an odd number"):
        tiny_model("era", "MODEL.ERA.CONTEXT_KERNEL", value)
