"""FGD: the teacher's feature maps where it looks, objects and background apart, and their global context.

Yang et al., "Focal and Global Knowledge Distillation for Detectors", arXiv 2111.11837; form and weights as in its
official code (``mmdet/distillation/losses/fgd.py``) and its Faster R-CNN recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from era.losses import at_least_float32, squared_error
from era.methods.base import Method, Needs
from era.methods.checks import check_level_names, check_levels, check_temperature, check_weights
from era.methods.feature_method import align
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

# The losses, the keys of their weights in MODEL.FGD with their paper symbols, and the source's two-stage weights.
WEIGHTS = {
    "foreground": ("FOREGROUND_WEIGHT", 5e-5),  # alpha
    "background": ("BACKGROUND_WEIGHT", 2.5e-5),  # beta
    "attention": ("ATTENTION_WEIGHT", 5e-5),  # gamma
    "global": ("GLOBAL_WEIGHT", 5e-7),  # lambda
}
LABEL_FREE = ("attention", "global")

# Attention over positions, (B, 1, H, W), and over channels, (B, C, 1, 1).
Looks = tuple[Tensor, Tensor]


def attention(maps: Tensor, temperature: float) -> Looks:
    """``A^S = H W softmax_x(mean_c |F| / T)`` over positions, (B, 1, H, W), and ``A^C = C softmax_c(mean_x |F| / T)``
    over channels, (B, C, 1, 1), of maps (B, C, H, W); each of mean 1 in an image, float32 or wider."""
    size = at_least_float32(maps).abs()
    images, channels, height, width = size.shape
    by_position = (size.mean(dim=1).flatten(1) / temperature).softmax(dim=1) * (height * width)
    by_channel = (size.mean(dim=(2, 3)) / temperature).softmax(dim=1) * channels
    return by_position.view(images, 1, height, width), by_channel.view(images, channels, 1, 1)


def masks(
    boxes: Sequence[Tensor], size: tuple[int, int], image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Where there are objects, and where there are none, at one level.

    In level coordinates a box covers the positions from ``floor`` of its left and top to ``ceil`` of its right and
    bottom, both included, and weighs one over their number; of overlapping boxes the smallest counts. A position that
    no box covers weighs one over the number of such positions.

    Args:
        boxes: of each image (n, 4), x_1, y_1, x_2, y_2 in pixels.
        size: height and width of the level.
        image_size: height and width in pixels of the padded batch that it was computed from. The source scales by
            the image without its padding, which moves boxes off their objects where images of a batch differ.

    Returns:
        Both (B, 1, H, W), float32 or wider; without boxes the first is 0 and the second uniform.
    """
    found = [_mask_of_objects(own, size, image_size) for own in boxes]
    foreground = torch.stack(found)[:, None]
    rest = (foreground == 0).to(foreground.dtype)
    return foreground, rest / rest.sum(dim=(2, 3), keepdim=True).clamp(min=1)


def _mask_of_objects(boxes: Tensor, size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """The mask of objects (H, W) of one image, see :func:`masks`."""
    boxes = at_least_float32(boxes)
    if len(boxes) == 0:
        return boxes.new_zeros(size)
    inside, area = [], 1.0
    for axis in (0, 1):  # rows of y, columns of x
        places = torch.arange(size[axis], device=boxes.device)
        scale = size[axis] / image_size[axis]
        first, last = (boxes[:, 1 - axis] * scale).floor(), (boxes[:, 3 - axis] * scale).ceil()
        inside.append((places >= first[:, None]) & (places <= last[:, None]))
        area = area * (last - first + 1)
    covered = inside[0][:, :, None] & inside[1][:, None, :]
    return (covered / area[:, None, None]).amax(dim=0)


def focal_loss(student: Tensor, teacher: Tensor, mask: Tensor, looks: Looks) -> Tensor:
    """``1/B sum mask A^S_T A^C_T (S - T)^2``, a sum over channels and positions: of foreground or background.

    Args:
        student: (B, C, H, W), with gradient.
        teacher: same shape, a constant.
        mask: (B, 1, H, W), see :func:`masks`.
        looks: the teacher's :func:`attention`, constants.

    Returns:
        Scalar >= 0, float32 or wider; 0, connected to ``student``, where the mask is 0.
    """
    by_position, by_channel = (look.detach() for look in looks)
    return squared_error(student, teacher.detach(), mask * by_position * by_channel)


def attention_loss(student: Looks, teacher: Looks) -> Tensor:
    """``1/B (sum |A^S_S - A^S_T| + sum |A^C_S - A^C_T|)`` of both :func:`attention`; the teacher's is a constant."""
    pairs = zip(student, teacher, strict=True)
    return sum((own - other.detach()).abs().sum() for own, other in pairs) / len(student[0])


class GlobalContext(nn.Module):
    """GCNet's context block, ``R(F) = F + W_2 ReLU(LN(W_1 sum_x softmax_x(w F) F))``, in float32.

    ``W_2`` starts at 0, so that ``R(F) = F`` at first, ``w`` as Kaiming has it: as in the source.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 2, 1)
        self.where = nn.Conv2d(channels, 1, 1)
        self.enter, self.norm = nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1])
        self.leave = nn.Conv2d(hidden, channels, 1)
        nn.init.kaiming_normal_(self.where.weight, nonlinearity="relu")
        for zero in (self.where.bias, self.leave.weight, self.leave.bias):
            nn.init.zeros_(zero)

    def forward(self, maps: Tensor) -> Tensor:
        """From maps (B, C, H, W) to the same shape, float32 or wider."""
        maps = at_least_float32(maps)
        with torch.autocast(maps.device.type, enabled=False):
            share = self.where(maps).flatten(2).softmax(dim=2)  # (B, 1, H W)
            context = (maps.flatten(2) * share).sum(dim=2)[:, :, None, None]
            return maps + self.leave(self.norm(self.enter(context)).relu())


@METHOD_REGISTRY.register()
class FGD(Method):
    """Four losses, each summed over levels, on the student's maps ``S = A_l(F_S^l)`` and the teacher's ``T``:

    - ``loss_fgd_foreground`` (alpha) and ``loss_fgd_background`` (beta): :func:`focal_loss` under the two
      :func:`masks` of the ground truth;
    - ``loss_fgd_attention`` (gamma): :func:`attention_loss`;
    - ``loss_fgd_global`` (lambda): ``1/B sum (R_S(S) - R_T(T))^2``, both :class:`GlobalContext` trained.

    The last two need no ground truth, and are all that pictures without labels give.

    Args:
        levels: FPN levels.
        weights: by the losses' names, see :data:`WEIGHTS`.
        temperature: T of the attention.
        channels: of the student's and of the teacher's maps; where they differ, ``A_l`` is a 1x1 conv at each level,
            else the identity.
    """

    idea = "match the teacher's FPN maps where it looks, objects and background apart, and their context"
    paper = "FGD, arXiv 2111.11837"
    loss_labels: ClassVar = {
        "loss_fgd_foreground": "FGD: feature maps in the boxes",
        "loss_fgd_background": "FGD: feature maps between the boxes",
        "loss_fgd_attention": "FGD: attention",
        "loss_fgd_global": "FGD: global context",
    }

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.FGD``."""
        cfg.MODEL.FGD = CfgNode()
        # FPN levels that are compared; their losses are summed. p6 is a part of p5.
        cfg.MODEL.FGD.LEVELS = ["p2", "p3", "p4", "p5"]
        # Weights of the four losses, the source's for two-stage detectors (RetinaNet: 1e-3, 5e-4, 5e-4, 5e-6); 0 switches
        # one off. They stand before SUMS over channels and positions: smaller maps ask for more.
        for key, default in WEIGHTS.values():
            cfg.MODEL.FGD[key] = default
        cfg.MODEL.FGD.TEMPERATURE = 0.5  # T of the attention, above 0

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Weights of at least 0, levels that are named once, a temperature above 0."""
        keys = cfg.MODEL.FGD
        check_weights({f"MODEL.FGD.{key}": keys[key] for key, _ in WEIGHTS.values()})
        check_level_names(keys.LEVELS, "MODEL.FGD.LEVELS")
        check_temperature("MODEL.FGD.TEMPERATURE", keys.TEMPERATURE)

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher; labels if neither attention nor context is compared."""
        keys = cfg.MODEL.FGD
        return Needs(labels=all(keys[WEIGHTS[name][0]] == 0 for name in LABEL_FREE), heads=False)

    @configurable
    def __init__(
        self,
        *,
        levels: list[str],
        weights: dict[str, float],
        temperature: float,
        channels: tuple[int, int],
    ):
        super().__init__()
        self.levels = list(levels)
        self.weights = dict(weights)
        self.temperature = temperature
        own, other = channels
        self.adapters = nn.ModuleDict({level: align(own, other) for level in levels})
        self.contexts = nn.ModuleDict(
            {
                level: nn.ModuleDict({who: GlobalContext(other) for who in ("student", "teacher")})
                for level in levels
            }
        )
        self.adapters.requires_grad_(any(weight > 0 for weight in weights.values()))
        self.contexts.requires_grad_(weights["global"] > 0)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``MODEL.FGD``.

        Raises:
            UserError: a level is missing, or its stride differs.
        """
        keys = cfg.MODEL.FGD
        levels = list(keys.LEVELS)
        return {
            "levels": levels,
            "weights": {name: keys[key] for name, (key, _) in WEIGHTS.items()},
            "temperature": keys.TEMPERATURE,
            "channels": check_levels(student, teacher.detector, levels, "MODEL.FGD.LEVELS"),
        }

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Those of the four with a weight above 0; without labels the last two alone."""
        wanted = [
            name
            for name, weight in self.weights.items()
            if weight > 0 and (step.labeled or name in LABEL_FREE)
        ]
        by_level = [self._of_level(level, step, wanted) for level in self.levels if wanted]
        return {
            f"loss_fgd_{name}": self.weights[name] * sum(found[name] for found in by_level)
            for name in wanted
        }

    def _of_level(self, level: str, step: Step, wanted: Sequence[str]) -> dict[str, Tensor]:
        """The wanted losses of one level, without their weights."""
        student, teacher = step.student.features[level], step.teacher_features[level]
        student = self.adapters[level](student)
        looks = attention(teacher, self.temperature)
        found = {}
        if not {"foreground", "background"}.isdisjoint(wanted):
            boxes = [own.gt_boxes.tensor for own in step.student.targets]
            image_size = tuple(step.student.images.tensor.shape[-2:])
            parts = masks(boxes, tuple(student.shape[-2:]), image_size)
            for name, mask in zip(("foreground", "background"), parts, strict=True):
                found[name] = focal_loss(student, teacher, mask, looks)
        if "attention" in wanted:
            found["attention"] = attention_loss(attention(student, self.temperature), looks)
        if "global" in wanted:
            contexts = self.contexts[level]
            pair = (contexts["student"](student), contexts["teacher"](teacher))
            found["global"] = squared_error(*pair)
        return found
