"""GDKD and GDKD3: the teacher's class distributions in parts, by which classes it holds likeliest.

Zheng & Cheng, "Rethinking Decoupled Knowledge Distillation: A Predictive Distribution Perspective", arXiv 2512.04625;
forms and defaults as in ``distillers/gdkd.py`` and ``config.py`` of detectron2-gdkd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from era.errors import UserError
from era.losses import at_least_float32, group_divergences, mean_of_rows
from era.methods.base import Method, Needs
from era.methods.checks import check_class_logits, check_temperature, check_weights
from era.modeling.detectors import Detector
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

ALL, FOREGROUND = "all", "fg"  # which proposals


def gdkd_terms(
    student_logits: Tensor, teacher_logits: Tensor, sizes: Sequence[int], temperature: float
) -> tuple[Tensor, ...]:
    """GDKD's terms, without their weights: between groups of classes, and within each group.

    In each row the teacher's ``sizes[0]`` likeliest classes are the first group, the next ``sizes[1]`` the second, and
    so on; the rest is the last. With ``b`` the groups' masses and ``p^g`` the distribution within group g::

        tau^2 KL(b_T || b_S), tau^2 KL(p_T^1 || p_S^1), .., tau^2 KL(p_T^rest || p_S^rest)

    Weights of 1 and, in each row, ``b_T^g`` make KD of them. Differs from the source in the arithmetic, see
    :func:`~era.losses.group_divergences`.

    Args:
        student_logits, teacher_logits: z, (R, C), rows aligned. The teacher's are treated as constants.
        sizes: of the groups but the rest. They add up to at most C; at C there is no rest, and its term is 0.
        temperature: tau > 0.

    Returns:
        ``len(sizes) + 2`` scalars >= 0, float32 or wider, means over rows; 0, connected to the graph, of no row.
    """
    order = at_least_float32(teacher_logits).topk(sum(sizes), dim=1).indices
    groups = torch.full_like(teacher_logits, len(sizes), dtype=torch.long)
    for group, members in enumerate(order.split(list(sizes), dim=1)):
        groups.scatter_(1, members, group)
    has_rest = teacher_logits.shape[1] > sum(sizes)
    count = len(sizes) + has_rest
    between, within = group_divergences(student_logits, teacher_logits, groups, count, temperature)
    rows = [between, *within.unbind(1)] + ([] if has_rest else [between * 0])
    return tuple(map(mean_of_rows, rows))


@METHOD_REGISTRY.register()
class GDKD(Method):
    """``loss_gdkd_groups``, ``loss_gdkd_top`` and ``loss_gdkd_rest``: w times w0, w1, w2 times :func:`gdkd_terms` of the
    teacher's k likeliest classes and the rest.

    CIFAR's recipe raises the weights over 20 epochs; the one for detection does not, and neither does this.

    Args:
        weights: by the name of a term, w included.
        sizes: of the groups but the rest.
        temperature: tau.
        proposals: ``all`` of the student's sampled proposals, or those on objects, ``fg``.

    Attributes:
        terms: names of what :func:`gdkd_terms` returns.
        coefficients: the key that weights a term, by its name; within a group of one class there is nothing to weight.
    """

    idea = "match the teacher's likeliest classes, the rest, and how it divides between them, each with its weight"
    paper = "GDKD, arXiv 2512.04625"
    loss_labels: ClassVar = {
        "loss_gdkd_groups": "GDKD: likeliest classes against the rest",
        "loss_gdkd_top": "GDKD: among the likeliest classes",
        "loss_gdkd_rest": "GDKD: among the rest",
    }
    terms: ClassVar = ("groups", "top", "rest")
    coefficients: ClassVar = {"groups": "W0", "top": "W1", "rest": "W2"}

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.GDKD``."""
        cfg.MODEL.GDKD = common_keys()
        # k: so many of the teacher's likeliest classes are the first group, background counted as a class.
        cfg.MODEL.GDKD.TOPK = 5
        cfg.MODEL.GDKD.W0 = 1.0  # w0, between the two groups
        cfg.MODEL.GDKD.W1 = 0.125  # w1, among the first k
        cfg.MODEL.GDKD.W2 = 0.25  # w2, among the rest

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Weights of at least 0, a temperature above 0, known proposals."""
        name, keys = f"MODEL.{cls.__name__}", cfg.MODEL[cls.__name__]
        weights = ("WEIGHT", *cls.coefficients.values())
        check_weights({f"{name}.{key}": keys[key] for key in weights})
        check_temperature(f"{name}.TEMPERATURE", keys.TEMPERATURE)
        if keys.PROPOSALS not in (ALL, FOREGROUND):
            raise UserError(
                f"{name}.PROPOSALS is {keys.PROPOSALS!r}: expected {ALL!r}, or {FOREGROUND!r} for those on objects."
            )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """The teacher; labels, to tell objects from background, if ``PROPOSALS`` is ``fg``."""
        keys = cfg.MODEL[cls.__name__]
        return Needs(labels=keys.WEIGHT == 0 or keys.PROPOSALS == FOREGROUND)

    @configurable
    def __init__(
        self, *, weights: dict[str, float], sizes: Sequence[int], temperature: float, proposals: str
    ):
        super().__init__()
        self.weights = dict(weights)
        self.sizes = tuple(sizes)
        self.temperature = temperature
        self.proposals = proposals

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher) -> dict:
        """Read the method's keys.

        Raises:
            UserError: the models' class distributions cannot be compared, or k leaves no class for the rest.
        """
        check_class_logits(student, teacher.detector, cls.__name__)
        keys = cfg.MODEL[cls.__name__]
        return {
            "weights": {term: keys.WEIGHT * keys[key] for term, key in cls.coefficients.items()},
            "sizes": cls.group_sizes(keys, teacher.detector.num_known_classes),
            "temperature": keys.TEMPERATURE,
            "proposals": keys.PROPOSALS,
        }

    @classmethod
    def group_sizes(cls, keys: CfgNode, num_classes: int) -> tuple[int, ...]:
        """Of the groups but the rest.

        Args:
            keys: the method's.
            num_classes: K that both models know, without background.

        Raises:
            UserError: k is not from 1 to K, so that a group would have no class.
        """
        if not 1 <= keys.TOPK <= num_classes:
            raise UserError(
                f"MODEL.GDKD.TOPK is {keys.TOPK}, and the models tell {num_classes + 1} classes apart, background "
                f"included: expected at least 1 and fewer than these, so that there is a rest; set it from 1 to {num_classes}."
            )
        return (keys.TOPK,)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The method's losses, each unless its weight is 0."""
        if not any(self.weights.values()):
            return {}
        own, other = step.class_logits
        if self.proposals == FOREGROUND:
            on_objects = step.shared_classes < step.teacher.detector.num_known_classes
            own, other = own[on_objects], other[on_objects]
        found = dict(
            zip(self.terms, gdkd_terms(own, other, self.sizes, self.temperature), strict=True)
        )
        name = type(self).__name__.lower()
        return {
            f"loss_{name}_{term}": weight * found[term]
            for term, weight in self.weights.items()
            if weight > 0
        }


@METHOD_REGISTRY.register()
class GDKD3(GDKD):
    """``loss_gdkd3_groups`` and ``loss_gdkd3_rest``: w times w0, w1 times :func:`gdkd_terms` of the teacher's likeliest
    class, its second and the rest.

    The form for detection. For classification the second group is the second to k-th likeliest, with a weight of its
    own. Where one class and background are all, there is no rest and what is left is KD times w w0.
    """

    idea = "match how the teacher divides between its likeliest class, its second and the rest, and the rest apart"
    paper = "GDKD3, arXiv 2512.04625"
    loss_labels: ClassVar = {
        "loss_gdkd3_groups": "GDKD3: first, second and the rest",
        "loss_gdkd3_rest": "GDKD3: among the rest",
    }
    terms: ClassVar = ("groups", "first", "second", "rest")
    coefficients: ClassVar = {"groups": "W0", "rest": "W1"}

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.GDKD3``."""
        cfg.MODEL.GDKD3 = common_keys()
        cfg.MODEL.GDKD3.W0 = 1.0  # w0, between the three groups
        cfg.MODEL.GDKD3.W1 = 0.25  # w1 of the detection code, among the rest

    @classmethod
    def group_sizes(cls, keys: CfgNode, num_classes: int) -> tuple[int, ...]:
        """Two groups of one class."""
        return (1, 1)


def common_keys() -> CfgNode:
    """The keys that both methods have."""
    return CfgNode(
        {
            "WEIGHT": 1.0,  # w, of all terms; the source has none; 0 switches the method off
            "TEMPERATURE": 1.0,  # tau
            "PROPOSALS": ALL,  # of the student's sampled ones: "all", or "fg" for those on objects
        }
    )
