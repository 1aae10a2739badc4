"""The teacher: a frozen detector from a config file, weights and overrides."""

from __future__ import annotations

import copy
import logging
import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d
from detectron2.modeling import Backbone, build_model
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from era.checkpoint.reading import load_exactly
from era.checkpoint.writing import weights_hash
from era.config import check_parts, student_config
from era.devices import gpu_name
from era.errors import UserError
from era.modeling.class_map import ClassMap, find_class_map, log_class_map
from era.modeling.detectors import (
    Detector,
    Predictions,
    check_family,
    detector_of,
    family_of,
    known_family,
)
from era.modeling.levels import fit_levels
from era.modeling.teacher_cache import TeacherCache
from era.modeling.teacher_config import settings_of, teacher_config

logger = logging.getLogger(__name__)


class Teacher(nn.Module):
    """A frozen Detectron2 detector: always in eval mode, no parameter with gradient.

    It sees the student's images but preprocesses them for itself (channel order, mean, std).

    Args:
        model: a stock detector; frozen in place.
        input_format: channel order that the model expects, ``BGR`` or ``RGB``.
        received_format: channel order of the images that it will be given.
        source: config file and weights as the user named them, for logs and checkpoints.
        settings: what the model was built from beside its weights, for the keys of a cache.
        classes: which of its classes are the student's, as its layers are read by now; None if that is not asked.
        channels_last: memory layout of the backbone and its input.
        compile_backbone: run the backbone through ``torch.compile`` in :meth:`features`.

    Attributes:
        cache: where :meth:`maps` looks first; None, as it is built, for nowhere.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        input_format: str,
        received_format: str,
        source: dict[str, str],
        settings: str = "",
        classes: ClassMap | None = None,
        channels_last: bool = False,
        compile_backbone: bool = False,
    ):
        super().__init__()
        self.model = model
        self.detector = detector_of(model)
        self.set_memory_format(channels_last=channels_last)
        # in a tuple: torch.compile's wrapper must not become a submodule and rename the weights
        self._backbone = (
            torch.compile(model.backbone, dynamic=True) if compile_backbone else model.backbone,
        )
        self.flip_channels = input_format != received_format
        self.source = source
        self.settings = settings
        self.classes = classes
        self.compiled = compile_backbone
        self.cache: TeacherCache | None = None
        self.requires_grad_(False)
        self.train(False)
        self._sha256: str | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Build the teacher that ``MODEL.TEACHER`` of a student's config describes, and load it.

        Raises:
            UserError: config or weights absent, unreadable or unfit for each other.
        """
        keys = cfg.MODEL.TEACHER
        teacher_cfg = teacher_config(cfg)
        check_parts(teacher_cfg, what="the teacher's ")
        check_family(student_config(teacher_cfg), what="the teacher's ")
        model = build_model(student_config(teacher_cfg))
        if known_family(student_config(teacher_cfg)) is None:
            raise UserError(
                f"MODEL.TEACHER.CONFIG_FILE {keys.CONFIG_FILE} builds a {type(model).__name__}: "
                "expected a detector of a known family, such as a GeneralizedRCNN; name another config."
            )
        if keys.WEIGHTS:
            load_exactly(model, keys.WEIGHTS, what="MODEL.TEACHER.WEIGHTS")
        elif keys.ALLOW_RANDOM:
            zero_init_residuals(model)
            logger.warning("The teacher has RANDOM weights (MODEL.TEACHER.ALLOW_RANDOM True).")
        else:
            raise UserError(
                'MODEL.TEACHER.WEIGHTS is "": expected a checkpoint of '
                f"{keys.CONFIG_FILE}; name one, or set MODEL.TEACHER.ALLOW_RANDOM True if random weights "
                "are meant."
            )
        detector = detector_of(model)
        counts = _num_classes(cfg), detector.num_classes
        classes = find_class_map(cfg, teacher_cfg, counts)
        log_class_map(classes, counts)
        if classes is not None and classes.index != tuple(range(counts[1])):
            detector.read_classes(classes.index)
        formats = {"student": cfg.INPUT.FORMAT, "teacher": teacher_cfg.INPUT.FORMAT}
        for who, value in formats.items():
            if value not in ("BGR", "RGB"):
                raise UserError(f"INPUT.FORMAT of the {who} is {value!r}: expected BGR or RGB.")
        return {
            "model": model,
            "input_format": formats["teacher"],
            "received_format": formats["student"],
            "source": {"config_file": keys.CONFIG_FILE, "weights": keys.WEIGHTS},
            "settings": settings_of(teacher_cfg),
            "classes": classes,
            "channels_last": keys.CHANNELS_LAST == "always"
            or (keys.CHANNELS_LAST == "auto" and torch.device(cfg.MODEL.DEVICE).type == "cpu"),
            "compile_backbone": keys.COMPILE,
        }

    def fit_levels(self, student: Detector, *, resample: bool) -> None:
        """Name the levels as the student's of the same strides, from now on; see :func:`era.modeling.levels.fit_levels`.

        Args:
            resample: ``MODEL.DISTILLER.RESAMPLE_LEVELS``.
        """
        found = fit_levels(student, self.detector, resample=resample)
        if found.changes:
            self.settings += f" {found}"  # the maps are others

    def set_memory_format(self, *, channels_last: bool) -> None:
        """Put the backbone's weights, and from now on its input, into this memory layout."""
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.backbone.to(memory_format=self.memory_format)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever is asked for."""
        return super().train(False)

    def copy(self) -> Teacher:
        """Another teacher, with copies of this one's weights, for a method that changes them; it has no cache."""
        found = copy.copy(self)
        found.cache, found._sha256 = None, None
        return copy.deepcopy(found)

    @property
    def sha256(self) -> str:
        """Hash of the teacher's weights; computed when first asked for."""
        if self._sha256 is None:
            self._sha256 = weights_hash(self.model.state_dict())
        return self._sha256

    def preprocess(self, batched_inputs: list[dict], height: int, width: int) -> ImageList:
        """Normalise the images for the teacher, padded like the student's batch.

        Args:
            batched_inputs: the student's inputs; ``image`` is (3, h, w) in the student's channel order.
            height, width: size in pixels of the student's padded batch. The result is padded to at
                least that, rounded up to what the teacher's backbone divides by, and to a square where it wants one
                (ViTDet).
        """
        model = self.model
        divisor, square = padding_of(model.backbone)
        height, width = (
            math.ceil(max(size, square) / divisor) * divisor for size in (height, width)
        )
        if square > 0:
            height = width = max(height, width)
        batch = model.pixel_mean.new_zeros(len(batched_inputs), 3, height, width)
        sizes = []
        for padded, item in zip(batch, batched_inputs, strict=True):
            image = item["image"].to(batch.device)
            image = image.flip(0) if self.flip_channels else image
            padded[:, : image.shape[1], : image.shape[2]] = (
                image - model.pixel_mean
            ) / model.pixel_std
            sizes.append(tuple(image.shape[-2:]))
        return ImageList(batch, sizes)

    @torch.no_grad()
    def features(
        self, batched_inputs: list[dict], like: dict[str, Tensor], image_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The teacher's FPN maps on the student's images, cut to the height and width of ``like``.

        Args:
            like: the student's maps; levels that the teacher lacks are left out.
            image_size: height and width in pixels of the student's padded batch.

        Returns:
            Level name to (B, C_T, H, W), contiguous. Padding is at the bottom and right, so a cut keeps alignment.

        Raises:
            ValueError: a teacher's map is smaller than the student's (strides differ).
        """
        return aligned(self.maps(batched_inputs, image_size), like)

    @torch.no_grad()
    def maps(
        self,
        batched_inputs: list[dict],
        image_size: tuple[int, int],
        images: ImageList | None = None,
    ) -> dict[str, Tensor]:
        """All of the teacher's FPN maps on the student's images, of the teacher's padded size, level name to
        (B, C_T, H, W); out of the cache, if there is one, and equal to the bit on a CPU.

        Args:
            image_size: as in :meth:`features`.
            images: what :meth:`preprocess` makes of these, where it is there already.
        """
        if self.cache is None:
            return self._maps(images or self.preprocess(batched_inputs, *image_size))
        cache, device = self.cache, self.model.pixel_mean.device
        # On a CPU the last bits of a convolution depend on the number of pictures, not on the others or the order
        # (oneDNN, float32, one and two threads, both layouts). Half precision has no use for them, and a GPU does
        # not promise them.
        exact = device.type == "cpu" and not cache.half
        number = len(batched_inputs) if exact else None
        keys = cache.keys(batched_inputs, "maps", *image_size, number, cache.half, *self._scope())

        def compute(positions: list[int]) -> list[dict[str, Tensor]]:
            inputs = [batched_inputs[i] for i in positions]
            maps = self._maps(self.preprocess(inputs, *image_size))
            return [
                {level: cache.packed(value[i]) for level, value in maps.items()}
                for i in range(len(positions))
            ]

        found = cache.get_or_compute(keys, compute, whole=exact)
        dtype = self._dtype() if cache.half else None  # None: as it was computed
        return {
            level: torch.stack([entry[level].to(device=device, dtype=dtype) for entry in found])
            for level in found[0]
        }

    @torch.no_grad()
    def detect_with_maps(
        self, batched_inputs: list[dict], image_size: tuple[int, int]
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """The teacher's own detections of boxes, and the FPN maps that it found them on, for :func:`aligned`.

        Args:
            image_size: as in :meth:`features`.

        Returns:
            One :class:`Instances` an image as :meth:`Detector.detect_on` has them, in pixels of the student's
            input; and level name to (B, C_T, H, W), not cut.
        """
        images = self.preprocess(batched_inputs, *image_size)
        maps = self.maps(batched_inputs, image_size, images)
        with self.detector.boxes_alone():
            return self.detector.detect_on(maps, images), maps

    @torch.no_grad()
    def mirrored_maps(
        self, batched_inputs: list[dict], image_size: tuple[int, int]
    ) -> tuple[dict[str, Tensor], int]:
        """The teacher's FPN maps of the pictures mirrored left to right, and the width that they are mirrored by:
        x becomes width - x. They are computed anew, whatever the cache has.

        Position j of a level shows what lies around pixel j * stride, so its mirror image is position
        width / stride - j: the width is a multiple of every stride, and there is padding on the right so that the mirror
        image of position 0 exists.

        Args:
            image_size: as in :meth:`features`.

        Returns:
            Level name to (B, C_T, H, W), mirrored, not cut, with W above width / stride; and the width in pixels.
        """
        stride = max(shape.stride for shape in self.detector.feature_shapes.values())
        height, width = image_size
        images = self.preprocess(batched_inputs, height, math.ceil(width / stride) * stride)
        mirrored = F.pad(images.tensor.flip(-1), (0, stride))
        return self._maps(ImageList(mirrored, images.image_sizes)), images.tensor.shape[-1]

    def _maps(self, images: ImageList) -> dict[str, Tensor]:
        return self._backbone[0](images.tensor.contiguous(memory_format=self.memory_format))

    def _dtype(self) -> torch.dtype:
        """Of the maps: that of mixed precision where it is on, else the weights'."""
        device = self.model.pixel_mean.device.type
        is_mixed = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if is_mixed else self.model.pixel_mean.dtype

    def _scope(self) -> tuple[str, ...]:
        """What the maps of given pixels follow from, down to their last bits where that is known."""
        device = self.model.pixel_mean.device
        where = (
            gpu_name(device)
            or f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        )
        how = (self.flip_channels, self.memory_format, self.compiled, self._dtype())
        return (self.sha256, self.settings, *map(str, how), torch.__version__, where)

    @torch.no_grad()
    def predict(self, features: dict[str, Tensor], samples: object) -> Predictions:
        """As :meth:`Detector.predict`, without gradient."""
        return self.detector.predict(features, samples)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detections of the teacher itself, as :meth:`Detector.detect` returns them."""
        if self.flip_channels:
            batched_inputs = [{**item, "image": item["image"].flip(0)} for item in batched_inputs]
        return self.detector.detect(batched_inputs)


def padding_of(backbone: Backbone) -> tuple[int, int]:
    """What a backbone's input is a multiple of, at least 1, and the least side of the square that it wants (0: of any form)."""
    constraints = backbone.padding_constraints
    # Detectron2's SimpleFeaturePyramid spells it so, and its size_divisibility says 0
    keys = ("size_divisibility", "size_divisiblity")
    divisor = max(backbone.size_divisibility, *(constraints.get(key, 0) for key in keys), 1)
    return divisor, constraints.get("square_size", 0)


def aligned(maps: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A teacher's maps at the levels of the student's, cut to their height and width, contiguous.

    Padding is at the bottom and right, so a cut keeps alignment.

    Raises:
        ValueError: a teacher's map is smaller than the student's (strides differ).
    """
    features = {}
    for level, value in maps.items():
        if level not in like:
            continue
        height, width = like[level].shape[-2:]
        if value.shape[-2] < height or value.shape[-1] < width:
            raise ValueError(
                f"level {level}: teacher {tuple(value.shape[-2:])} is smaller than the student's "
                f"{(height, width)}"
            )
        # once: pooling needs it so, and the losses are faster on the student's layout
        features[level] = value[..., :height, :width].contiguous()
    return features


def _num_classes(cfg: CfgNode) -> int:
    """Foreground classes of the student of a distiller's config."""
    stock = student_config(cfg)
    return family_of(stock).num_classes_in(stock)


@torch.no_grad()
def zero_init_residuals(model: nn.Module) -> None:
    """Zero the weight of the last frozen norm of every residual block, in place (Goyal et al. 2017,
    section 5.1), so that a network with random weights stays finite.

    Without statistics every block doubles the variance: a random R101 answers in the order of 1e5, and
    nothing can be trained against that.
    """
    for block in model.modules():
        if isinstance(block, CNNBlockBase):
            norms = [m for m in block.modules() if isinstance(m, FrozenBatchNorm2d)]
            shortcut = getattr(getattr(block, "shortcut", None), "norm", None)
            norms = [m for m in norms if m is not shortcut]
            if norms and hasattr(block, "shortcut"):
                norms[-1].weight.zero_()
