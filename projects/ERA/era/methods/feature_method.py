"""What the methods with one loss on FPN maps have alike."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from torch import Tensor, nn

from era.methods.base import Method, Needs
from era.methods.checks import check_level_names, check_levels, check_weights
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher


class FeatureMethod(Method):
    """Base of the methods with one loss, on FPN maps, that needs no ground truth:
    ``loss_<name>_feature = w L(F_S, F_T)``.

    A subclass adds ``LEVELS`` and ``WEIGHT`` to its ``MODEL.<NAME>``, and says in :meth:`feature_loss` what L is.
    Whatever it builds it freezes where ``weight`` is 0.

    Args:
        levels: FPN levels that are compared.
        weight: w.
    """

    def __init__(self, *, levels: Sequence[str], weight: float):
        super().__init__()
        self.levels = list(levels)
        self.weight = weight

    @classmethod
    def keys(cls, cfg: CfgNode) -> tuple[str, CfgNode]:
        """The name of the method's config node, ``MODEL.<NAME>``, and the node."""
        name = cls.__name__.upper()
        return f"MODEL.{name}", cfg.MODEL[name]

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """A weight of at least 0, and levels that are named once."""
        name, keys = cls.keys(cfg)
        check_weights({f"{name}.WEIGHT": keys.WEIGHT})
        check_level_names(keys.LEVELS, f"{name}.LEVELS")

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher, and no labels."""
        return Needs(labels=cls.keys(cfg)[1].WEIGHT == 0, heads=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read ``LEVELS`` and ``WEIGHT``; beside them ``channels``, of the student's and of the teacher's maps.

        Raises:
            UserError: a level is missing, or its stride differs.
        """
        name, keys = cls.keys(cfg)
        levels = list(keys.LEVELS)
        channels = check_levels(student, teacher.detector, levels, f"{name}.LEVELS")
        return {"levels": levels, "weight": keys.WEIGHT, "channels": channels}

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``loss_<name>_feature``, unless its weight is 0."""
        if self.weight == 0:
            return {}
        loss = self.feature_loss(step.student.features, step.teacher_features)
        return {f"loss_{type(self).__name__.lower()}_feature": self.weight * loss}

    def feature_loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """L, a scalar of at least float32.

        Args:
            student: all of the student's maps, level name to (B, C_S, H, W), with gradient.
            teacher: the teacher's, (B, C_T, H, W), without.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its loss is")


def align(own: int, other: int) -> nn.Module:
    """What brings a map of ``own`` channels to ``other``: a 1x1 conv, or nothing where they are equal."""
    return nn.Identity() if own == other else nn.Conv2d(own, other, 1)
