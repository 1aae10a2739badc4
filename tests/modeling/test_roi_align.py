"""ROIAlign as one sum of rows, against torchvision's kernel: values, gradients, boxes at and over the border."""

import pytest
import torch
from builders import batch, losses_of, tiny_model
from detectron2.layers import ROIAlign

from era.modeling.roi_align import GatheredROIAlign, gather_roi_align

BOXES = torch.tensor(
    [
        [0, 4.0, 6.0, 40.0, 30.0],
        [1, -30.0, -20.0, 15.0, 200.0],  # over the border
        [1, 100.0, 80.0, 130.0, 100.0],  # outside
        [0, 63.0, 47.0, 64.0, 48.0],  # the last pixel
        [1, 10.0, 10.0, 10.0, 10.0],  # of no size
        [0, 0.0, 0.0, 64.0, 48.0],  # all of it
        [0, -40.0, -40.0, -9.0, -8.5],  # a stride outside, where the border still counts
    ]
)


def both(size, ratio, aligned, rois, *, dtype=torch.float32):
    maps = torch.randn(2, 5, 6, 8, dtype=dtype)
    found = []
    for kind in (ROIAlign, GatheredROIAlign):
        own = maps.clone().requires_grad_()
        out = kind(size, 1 / 8, ratio, aligned)(own, rois)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape)).sum().backward()
        found.append((out.detach(), own.grad))
    return found


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("size", [(7, 7), (2, 3), 1])
def test_values_and_gradients_are_torchvisions(size, ratio, aligned):
    stock, gathered = both(size, ratio, aligned, BOXES)
    assert stock[0].abs().max() > 0.1
    for expected, found in zip(stock, gathered, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [{"ratio": 0}, {"ratio": 2, "dtype": torch.float64}])
def test_what_is_left_to_torchvision(case):
    ratio = case.pop("ratio")
    stock, gathered = both((3, 3), ratio, True, BOXES, **case)
    assert torch.equal(stock[0], gathered[0])


def test_what_sends_no_gradient_is_left_to_torchvision():
    maps, align = torch.randn(2, 5, 6, 8), ((7, 7), 1 / 8, 1, True)
    assert torch.equal(ROIAlign(*align)(maps, BOXES), GatheredROIAlign(*align)(maps, BOXES))
    learns = maps.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(ROIAlign(*align)(maps, BOXES), GatheredROIAlign(*align)(learns, BOXES))


def test_no_box():
    stock, gathered = both((7, 7), 1, True, BOXES[:0])
    assert gathered[0].shape == stock[0].shape == (0, 5, 7, 7)
    assert not gathered[1].any()


def test_a_model_keeps_its_names_and_its_losses():
    model, changed = tiny_model("plain"), tiny_model("plain")
    gather_roi_align(changed)
    kinds = [type(x) for x in changed.modules() if isinstance(x, ROIAlign)]
    assert kinds and set(kinds) == {GatheredROIAlign}
    assert model.state_dict().keys() == changed.state_dict().keys()
    (expected, _), (found, _) = losses_of(model, batch()), losses_of(changed, batch())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
