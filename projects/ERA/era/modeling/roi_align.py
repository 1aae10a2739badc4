"""ROIAlign on a CPU as one sum of rows of the map, for training: torchvision's kernel computes every sample's place
and weights again for each channel, forward and backward, which at toy size is a sixth of a step."""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn
from torch.nn import functional as F


class GatheredROIAlign(ROIAlign):
    """Detectron2's ROIAlign with the same samples and weights, in another order of sums.

    A bin is the mean of ``sampling_ratio^2`` samples, each the bilinear mean of four positions of the map: a weighted
    sum of ``4 sampling_ratio^2`` rows of a table (B * H * W, C). The gradient reaches the map and, as in torchvision,
    not the boxes. What sends no gradient is left to torchvision, so that evaluation while training is that of
    ``--eval-only`` to the bit; and so is what is not float32 on a CPU, and adaptive sampling.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """The arguments and the result of :class:`ROIAlign`: (B, C, H, W) and (R, 5) to (R, C, height, width)."""
        is_served = input.device.type == "cpu" and input.dtype == torch.float32
        sends_gradient = input.requires_grad and torch.is_grad_enabled()
        if not (is_served and sends_gradient) or self.sampling_ratio < 1:
            return super().forward(input, rois)
        batch, channels, height, width = input.shape
        bins_y, bins_x = _pair(self.output_size)
        with torch.no_grad():
            of_image, x0, y0, x1, y1 = rois.to(input.dtype).unbind(1)
            y, weight_y = self._samples(y0, y1, bins_y, height)
            x, weight_x = self._samples(x0, x1, bins_x, width)
            # (R, bins_y, bins_x, corners of y, corners of x)
            first = of_image.long()[:, None, None, None, None] * (height * width)
            rows = first + y[:, :, None, :, None] * width + x[:, None, :, None, :]
            weights = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
        table = input.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
        found = F.embedding_bag(
            rows.flatten(3).flatten(0, 2), table, mode="sum",
            per_sample_weights=weights.flatten(3).flatten(0, 2),
        )  # fmt: skip
        return found.reshape(len(rois), bins_y, bins_x, channels).permute(0, 3, 1, 2)

    def _samples(self, start: Tensor, end: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
        """Along one axis of a map of ``size`` positions, the positions that each bin reads and their weights, both
        (R, bins, 2 * sampling_ratio); ``start`` and ``end`` (R,) in pixels of the image."""
        offset = 0.5 if self.aligned else 0.0
        start = start * self.spatial_scale - offset
        extent = end * self.spatial_scale - offset - start
        if not self.aligned:
            extent = extent.clamp(min=1.0)
        ratio = self.sampling_ratio
        steps = (torch.arange(bins * ratio, dtype=start.dtype) + 0.5) / (bins * ratio)
        at = start[:, None] + extent[:, None] * steps
        is_inside = (at >= -1) & (at <= size)
        at = at.clamp(0, size - 1)
        low = at.floor().long()
        share = at - low
        places = torch.stack([low, (low + 1).clamp(max=size - 1)], 2)
        weights = torch.stack([1 - share, share], 2) * is_inside[:, :, None] / ratio
        return places.reshape(-1, bins, 2 * ratio), weights.reshape(-1, bins, 2 * ratio)


def gather_roi_align(model: nn.Module) -> None:
    """Put :class:`GatheredROIAlign` in the place of every ROIAlign of a model that trains on a CPU; no weight, buffer or name
    changes."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is ROIAlign:
                settings = (child.spatial_scale, child.sampling_ratio, child.aligned)
                setattr(parent, name, GatheredROIAlign(child.output_size, *settings))


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
