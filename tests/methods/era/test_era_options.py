"""What may be switched on beyond ERA's defaults: numbers by hand, neutral values, gradients, checkpoints."""

import pytest
import torch
from builders import batch, losses_of, tiny_model
from detectron2.utils.events import EventStorage

from era.methods.era import ERA
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
