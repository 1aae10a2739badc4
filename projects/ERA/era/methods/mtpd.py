"""MTPD: MGD under one teacher after another, from a weak one to a strong one.

Cao et al., "Learning Lightweight Object Detectors via Multi-Teacher Progressive Distillation" (ICML 2023), arXiv
2308.09105; the loss, its weights and the two steps as in its official code (``mtpd_mgd/``, README.md).

A sequence is a chain of runs, one a teacher, each with a schedule of its own; ``studies/mtpd.yaml`` starts, resumes and
compares one. Which teachers, in which order: ``tools/adaptation_cost.py``.

* The first run inherits: the source copies every weight of the teacher outside its backbone that fits the student in
  name and shape. Here ``MODEL.DISTILLER.INIT_STUDENT`` does, with its default as the source's: off, and switched on by
  the configs. ``fpn_and_heads`` is the source's set where the laterals of the FPN fit; where the bottom-up networks
  differ in width ``heads`` is what remains, and the convolutions behind the laterals, which the source copies even then,
  are not inherited. The first stage of a cascade as a student's head (also in the source) has no family here.
* Every later run names the checkpoint of the one before in ``MODEL.WEIGHTS``, which gives it the student alone: adapters
  and generators begin afresh, as after the source's ``pth_transfer.py``. Inheritance is off: the next teacher's heads
  would undo what the student learnt, so both at once are refused.

The source clips gradients at a norm of 35: ``SOLVER.CLIP_GRADIENTS``.
"""

from __future__ import annotations

from typing import ClassVar

from detectron2.config import CfgNode

from era.methods.mgd import MGD
from era.registry import METHOD_REGISTRY


@METHOD_REGISTRY.register()
class MTPD(MGD):
    """``loss_mtpd_feature``: :class:`~era.methods.mgd.MGD`'s loss, of the teacher of this step of the sequence."""

    idea = "MGD under a sequence of teachers, weak to strong, each run starting from the last one's student"
    paper = "MTPD, arXiv 2308.09105"
    loss_labels: ClassVar = {"loss_mtpd_feature": "MTPD: maps generated from masked ones"}

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.MTPD``."""
        cfg.MODEL.MTPD = CfgNode()
        # FPN levels that are compared; their losses are summed. p6 is a part of p5.
        cfg.MODEL.MTPD.LEVELS = ["p2", "p3", "p4", "p5"]
        # alpha, the source's for two-stage detectors (RetinaNet, RepPoints: 2e-5); 0 switches the loss off. It stands
        # before a sum over channels and positions, as MODEL.MGD.WEIGHT.
        cfg.MODEL.MTPD.WEIGHT = 5e-7
        cfg.MODEL.MTPD.MASK_RATIO = 0.45  # lambda, 0 up to below 1; RetinaNet, RepPoints: 0.65
