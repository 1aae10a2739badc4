"""The converted backbone and its library's network on one picture."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from era.convert.libraries import Library
from era.convert.source import Preprocessing
from era.deploy.parity import sample_images
from era.errors import UserError
from era_runtime.preprocess import InputRules

HEIGHT, WIDTH = 64, 96  # pixels, divisible by the strides
TOLERANCE = 1e-6  # of the largest value of a map, in double precision


def compare_maps(
    model: nn.Module,
    library: Library,
    weights: Mapping[str, Tensor],
    preprocessing: Preprocessing,
) -> dict[str, float]:
    """The largest difference of each of res2..res5, as a part of the map's largest value, both in double precision.

    The picture goes through Detectron2's own normalisation on one side and through the library's on the other: its pixels
    in the library's order, scaled as it scales them.

    Args:
        model: the detector with the converted weights.
        library: its network is filled and used.
        weights: of the backbone, by the library's names.
        preprocessing: of the library's weights.

    Raises:
        UserError: a map differs by more than :data:`TOLERANCE`.
    """
    picture = sample_images(InputRules(WIDTH, WIDTH, "BGR"))[0][:HEIGHT, :WIDTH]
    ordered = picture if preprocessing.channel_order == "BGR" else picture[..., ::-1]
    pixels = torch.from_numpy(np.ascontiguousarray(ordered.transpose(2, 0, 1))).double()
    _fill(library, weights)
    bottom_up = copy.deepcopy(model.backbone.bottom_up).double().eval()
    library.network.double().eval()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
                 for values in (preprocessing.mean, preprocessing.std))  # fmt: skip
    # torchvision and timm scale to 0..1 first; Detectron2 does not
    scaled = ((pixels / 255) - mean / 255) / (std / 255)
    given = (pixels - model.pixel_mean.double()) / model.pixel_std.double()
    with torch.no_grad():
        found = bottom_up(given[None])
        shapes = {name: tuple(m.shape) for name, m in found.items()}
        expected = library.stage_maps(scaled[None], shapes)
    differences = {
        name: float((found[name] - m).abs().max() / m.abs().max()) for name, m in expected.items()
    }
    library.network.float()
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # NaN neither
            raise UserError(
                f"the converted backbone does not compute what {library.name} computes: {name} differs by {difference:.2g} of "
                f"its largest value (at most {TOLERANCE:g}); is the stride in the right conv (--preprocessing), and are the "
                "weights of this network?"
            )
    return differences


def _fill(library: Library, weights: Mapping[str, Tensor]) -> None:
    own = library.network.state_dict()
    library.network.load_state_dict({**own, **{k: v for k, v in weights.items() if k in own}})
