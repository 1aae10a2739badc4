"""OKDHP: without a teacher, several heads of the student's form learn from the ensemble that a gate makes of them.

Li et al., "Online Knowledge Distillation for Efficient Pose Estimation", ICCV 2021, arXiv 2108.02092, and its code, which trains
hourglass networks with several branches for the joints of one person. Box heads instead, and the two-stage detector, are this
project's mapping, in no source; heatmaps of keypoints are taken too where the student has them. What follows the code: the
losses and their sums over heads, the ramp, the gate's layout. What does not:

- the code does not detach the ensemble in the KL, so that it also moves towards the heads; here it is the heads' constant target
  unless ``DETACH_ENSEMBLE`` is False;
- its gate has full 3x3, 5x5 and 7x7 convs with BatchNorm on one stem map a picture. On a thousand proposals these cost more
  than the heads, and BatchNorm would mix proposals and processes: here they are depthwise, without a norm;
- its two model files take the wrong stacks into the ensemble, so that a branch never enters; here every head does;
- its KL of heatmaps is also divided by their positions; here it is the mean over joints, as Detectron2's own keypoint loss,
  and ``KD_WEIGHT`` means as much for boxes;
- its ramp counts epochs (L = 60, in its template 90); here L is a part of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from era.errors import UserError
from era.losses import at_least_float32, class_loss, divergence
from era.methods.base import Method, Needs
from era.methods.checks import check_temperature, check_weights
from era.modeling.detectors import Detector
from era.modeling.detectors.further_heads import NewBoxHead
from era.modeling.step import Step
from era.modeling.teacher import Teacher
from era.registry import METHOD_REGISTRY

KERNELS = (3, 5, 7)  # the gate's receptive fields, positions of the pooled map (the code's)
RAMP_STEEPNESS = 5.0  # the code's


def ramp(iteration: int, length: float) -> float:
    """``r(t) = exp(-5 (1 - t / L)^2)``, from exp(-5) to 1 at ``t = L``, then 1; 1 throughout where L is 0."""
    progress = min(iteration / length, 1.0) if length > 0 else 1.0
    return math.exp(-RAMP_STEEPNESS * (1 - progress) ** 2)


def ensemble(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_b g_b z_b``: the outputs of K heads, weighted row by row.

    Args:
        outputs: K logits, (R, C) each of boxes, or (N, J, S, S) of keypoints.
        weights: g, (R, K), or (N, K, J) for weights of their own of every joint.

    Returns:
        Of the shape of one output, at least float32.
    """
    stacked = torch.stack([at_least_float32(x) for x in outputs], dim=1)
    missing = (1,) * (stacked.dim() - weights.dim())
    return (weights.reshape(*weights.shape, *missing) * stacked).sum(1)


def consensus_loss(
    outputs: Sequence[Tensor], target: Tensor, temperature: float, *, detach: bool
) -> Tensor:
    """``sum_b tau^2 KL(ensemble || head b)``, of class distributions or, joint by joint, of positions.

    Args:
        outputs: K logits, (R, C) each, or (N, J, S, S): a softmax over the S x S positions of every joint.
        target: the ensemble's, of the same shape.
        temperature: tau > 0.
        detach: whether the ensemble is a constant; if not, it moves towards the heads too, as in the code.

    Returns:
        Scalar >= 0, at least float32: the mean over rows or joints, summed over heads; 0, connected to the graph, for none.
    """
    target = target.detach() if detach else target
    if target.dim() == 4:
        target, outputs = (
            target.flatten(2).flatten(0, 1),
            [x.flatten(2).flatten(0, 1) for x in outputs],
        )
    return sum(divergence(own, target, temperature) for own in outputs)


class Gate(nn.Module):
    """How much each head counts for each sample: the code's feature aggregation unit (FAU), on pooled features.

    Depthwise convs of :data:`KERNELS` in parallel with a ReLU each, their sum, the mean over positions, a fully connected layer
    to a quarter of the channels with a ReLU, one more a head, softmax over the heads.

    Args:
        channels: C.
        heads: K.
        joints: J, for weights of their own of every joint; 0 for one weight a head.
    """

    def __init__(self, channels: int, heads: int, joints: int = 0):
        super().__init__()
        self.views = nn.ModuleList(
            nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
            for size in KERNELS
        )
        hidden = max(channels // 4, 1)
        self.squeeze = nn.Linear(channels, hidden)
        self.scores = nn.Linear(hidden, heads * max(joints, 1))
        self.form = (heads, joints) if joints else (heads,)

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, K), or (R, K, J), float32, of pooled features (R, C, P, P); the sum over K is 1."""
        seen = sum(view(pooled).relu() for view in self.views).mean((2, 3))
        scores = self.scores(self.squeeze(seen).relu())
        return at_least_float32(scores).unflatten(1, self.form).softmax(1)


@METHOD_REGISTRY.register()
class OKDHP(Method):
    """Over K box heads on the same pooled features of the student's sampled proposals, head 1 the student's own::

        w_h sum_{b > 1} L_task(b) + w_e CE(z_ens, y) + w_k r(t) sum_b tau^2 KL(z_ens || z_b),  z_ens = sum_b g_b z_b

    ``L_task`` are the student's own losses of classes and boxes. With a keypoint head the same over K of these, with Detectron2's
    keypoint loss in the place of both task losses, and a gate of its own with weights by joint. At inference the student's
    own heads alone are left.

    Args:
        box_heads, keypoint_heads: heads 2 to K; no keypoint head where the student has none.
        box_gate, keypoint_gate: give g.
        weights: ``heads`` w_h, ``ensemble`` w_e and ``kd`` w_k.
        temperature: tau.
        ramp_length: L, iterations.
        detach: whether the ensemble is a constant in the KL.
    """

    idea = "no teacher: several heads on the same proposals learn from the ensemble that a gate makes of them"
    paper = "OKDHP, arXiv 2108.02092 (box heads: this project's)"
    loss_labels: ClassVar = {
        "loss_okdhp_heads": "OKDHP: task losses of the further heads",
        "loss_okdhp_ensemble": "OKDHP: classes of the ensemble",
        "loss_okdhp_kd": "OKDHP: heads against the ensemble",
        "loss_okdhp_keypoint_heads": "OKDHP: keypoints of the further heads",
        "loss_okdhp_keypoint_ensemble": "OKDHP: keypoints of the ensemble",
        "loss_okdhp_keypoint_kd": "OKDHP: keypoint heads against the ensemble",
    }

    @classmethod
    def add_config(cls, cfg: CfgNode) -> None:
        """Add ``MODEL.OKDHP``."""
        cfg.MODEL.OKDHP = CfgNode()
        keys = cfg.MODEL.OKDHP
        keys.NUM_HEADS = 3  # K, the student's own included; the code's number of branches
        keys.HEAD_WEIGHT = 1.0  # w_h: task losses of the further heads (the code's 1)
        keys.ENSEMBLE_WEIGHT = 1.0  # w_e: the ensemble against the ground truth (its script's)
        keys.KD_WEIGHT = 2.0  # w_k: KL of every head to the ensemble (its script's)
        keys.TEMPERATURE = 1.0  # tau of that KL
        # L of the ramp r(t) of w_k, as a part of SOLVER.MAX_ITER, 0 (no ramp) to 1; the code counts epochs.
        keys.RAMP = 0.6
        keys.DETACH_ENSEMBLE = True  # the ensemble is a constant in the KL; False as in the code

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """At least two heads; weights, temperature and ramp."""
        keys, prefix = cfg.MODEL.OKDHP, "MODEL.OKDHP"
        if keys.NUM_HEADS < 2:
            raise UserError(
                f"{prefix}.NUM_HEADS is {keys.NUM_HEADS}: an ensemble needs at least 2 heads, the student's own and "
                "another; set it so."
            )
        names = ("HEAD_WEIGHT", "ENSEMBLE_WEIGHT", "KD_WEIGHT")
        check_weights({f"{prefix}.{key}": keys[key] for key in names})
        check_temperature(f"{prefix}.TEMPERATURE", keys.TEMPERATURE)
        if not 0.0 <= keys.RAMP <= 1.0:
            raise UserError(
                f"{prefix}.RAMP is {keys.RAMP}: expected a part of SOLVER.MAX_ITER, 0 to 1; set it so."
            )

    @classmethod
    def needs(cls, cfg: CfgNode) -> Needs:
        """No teacher; no labels for the KL."""
        return Needs(teacher=False, labels=cfg.MODEL.OKDHP.KD_WEIGHT == 0, more=("further heads",))

    @configurable
    def __init__(
        self,
        *,
        box_heads: Sequence[NewBoxHead],
        box_gate: Gate,
        keypoint_heads: Sequence[nn.Module] = (),
        keypoint_gate: Gate | None = None,
        weights: dict[str, float],
        temperature: float = 1.0,
        ramp_length: float = 0.0,
        detach: bool = True,
    ):
        super().__init__()
        self.box_heads, self.box_gate = nn.ModuleList(box_heads), box_gate
        self.keypoint_heads, self.keypoint_gate = nn.ModuleList(keypoint_heads), keypoint_gate
        self.weights = dict(weights)
        self.temperature = temperature
        self.ramp_length = ramp_length
        self.detach = detach
        trains = any(w > 0 for w in weights.values())
        for head in self.box_heads:
            head.learns(classes=trains, boxes=weights["heads"] > 0)
        self.keypoint_heads.requires_grad_(trains)
        chooses = weights["ensemble"] > 0 or (weights["kd"] > 0 and not detach)
        for gate in (box_gate, keypoint_gate):
            if gate is not None:
                gate.requires_grad_(chooses)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Detector, teacher: Teacher | None) -> dict:
        """Read ``MODEL.OKDHP`` and build the heads and gates.

        Raises:
            UserError: the student pools nothing at proposals, or has no softmax over its classes.
        """
        keys, shape = cfg.MODEL.OKDHP, student.pooled_shape
        if shape is None:
            raise UserError(
                f"the student is a {type(student).__name__} and pools nothing at proposals: OKDHP needs a two-stage "
                "detector, whose box head it repeats; choose one, or take OKDHP out of MODEL.DISTILLER.METHODS."
            )
        student.check_class_distributions(student, "OKDHP")
        others = range(keys.NUM_HEADS - 1)
        parts = {
            "box_heads": [student.new_box_head(cfg) for _ in others],
            "box_gate": Gate(shape[0], keys.NUM_HEADS),
        }
        if student.keypoint_form is not None:
            channels, joints = student.keypoint_form
            parts["keypoint_heads"] = [student.new_keypoint_head(cfg) for _ in others]
            parts["keypoint_gate"] = Gate(channels, keys.NUM_HEADS, joints)
        return {
            **parts,
            "weights": {
                "heads": keys.HEAD_WEIGHT, "ensemble": keys.ENSEMBLE_WEIGHT, "kd": keys.KD_WEIGHT,
            },
            "temperature": keys.TEMPERATURE,
            "ramp_length": keys.RAMP * cfg.SOLVER.MAX_ITER,
            "detach": keys.DETACH_ENSEMBLE,
        }  # fmt: skip

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The losses whose weight is above 0, those of keypoints where there are any; without labels ``loss_okdhp_kd``
        alone.

        ``okdhp/ramp``, r(t), goes into the event storage.
        """
        on = {n: w for n, w in self.weights.items() if w > 0 and (step.labeled or n == "kd")}
        if not on:
            return {}
        storage = get_event_storage()
        r = ramp(storage.iter, self.ramp_length)
        storage.put_scalar("okdhp/ramp", r)
        terms = self._box_terms(step, on)
        if step.student.keypoints is not None:
            found = self._keypoint_terms(step, on)
            terms |= {f"keypoint_{name}": term for name, term in found.items()}
        scales = {name: w * (r if name == "kd" else 1.0) for name, w in on.items()}
        return {
            f"loss_okdhp_{name}": scales[name.removeprefix("keypoint_")] * term
            for name, term in terms.items()
        }

    def _box_terms(self, step: Step, on: dict[str, float]) -> dict[str, Tensor]:
        recording, terms = step.student, {}
        pooled = recording.roi_features
        others = [head(pooled) for head in self.box_heads]
        logits = [recording.predictions.class_logits, *(own.class_logits for own in others)]
        if "heads" in on:
            terms["heads"] = sum(step.detector.prediction_loss(own, recording) for own in others)
        if "ensemble" in on or "kd" in on:
            together = ensemble(logits, self.box_gate(pooled))
        if "ensemble" in on:
            terms["ensemble"] = class_loss(together, recording.classes)
        if "kd" in on:
            terms["kd"] = consensus_loss(logits, together, self.temperature, detach=self.detach)
        return terms

    def _keypoint_terms(self, step: Step, on: dict[str, float]) -> dict[str, Tensor]:
        recording, terms = step.student, {}
        features = recording.keypoints.features
        others = [head.layers(features) for head in self.keypoint_heads]
        heatmaps = [recording.keypoints.heatmaps, *others]
        if "heads" in on:
            terms["heads"] = sum(step.detector.keypoint_loss(own, recording) for own in others)
        if "ensemble" in on or "kd" in on:
            together = ensemble(heatmaps, self.keypoint_gate(features))
        if "ensemble" in on:
            terms["ensemble"] = step.detector.keypoint_loss(together, recording)
        if "kd" in on:
            terms["kd"] = consensus_loss(heatmaps, together, self.temperature, detach=self.detach)
        return terms
