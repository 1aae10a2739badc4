"""ERA's config keys, with meaning, unit and paper symbol, and their checks.

Symbols are those of ERA (arXiv 2508.16050) in the detection form that docs/era.md describes: ``F_S``,
``F_T`` student and teacher FPN maps, ``e_i`` estimates, ``B_i`` branches, ``N`` branches, ``s_i`` scales.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode

from era.errors import UserError
from era.methods.checks import check_level_names, check_temperature, check_weights
from era.modeling.detectors.recording import ALL_POSITIONS, SAMPLED_POSITIONS

NORMS = ("none", "BN", "SyncBN", "GN")
RAW, BY_TEACHER = "none", "teacher"  # MODEL.ERA.STANDARDIZE
EVEN, BY_JUDGE = "none", "teacher"  # MODEL.ERA.POSITION_WEIGHT
IF_UNEQUAL, ALWAYS = "unequal", "always"  # MODEL.ERA.PROJECTION
ALL_ESTIMATES, ENDS = "all", "ends"  # MODEL.ERA.TWI.ESTIMATES
ALL_STAGES, FIRST_STAGE = "all", "first"  # MODEL.ERA.TWI.STAGES

# Parts of heads that judge, and the keys in MODEL.ERA.TWI of their weights against the ground truth and softly. A part that the
# teacher lacks does not count: a two-stage detector has rpn and roi, RetinaNet and FCOS have dense.
TWI_WEIGHTS = {
    "rpn": ("RPN_WEIGHT", "SOFT_RPN_WEIGHT"),
    "roi": ("ROI_WEIGHT", "SOFT_ROI_WEIGHT"),
    "dense": ("DENSE_WEIGHT", "SOFT_DENSE_WEIGHT"),
}

# The losses at the ROI feature, and the keys of their weights in MODEL.ERA.ROI.
ROI_WEIGHTS = {
    "feature": "FEATURE_WEIGHT",
    "residual": "RESIDUAL_WEIGHT",
    "twi": "TWI_WEIGHT",
    "soft": "SOFT_WEIGHT",
}

# Keys that came after results were kept, with the values at which all is as it was before them.
NEUTRAL = {
    "MODEL.ERA.PROJECTION": IF_UNEQUAL,
    "MODEL.ERA.CONTEXT_KERNEL": 0,
    "MODEL.ERA.ZERO_START": False,
    "MODEL.ERA.POSITION_WEIGHT": EVEN,
    "MODEL.ERA.TWI.ESTIMATES": ALL_ESTIMATES,
    "MODEL.ERA.TWI.DENSE_WEIGHT": 0.0,
    "MODEL.ERA.TWI.SOFT_DENSE_WEIGHT": 1.0,
    **{f"MODEL.ERA.ROI.{key}": 0.0 for key in ROI_WEIGHTS.values()},
    "MODEL.ERA.ROI.NUM_BRANCHES": 4,
    "MODEL.ERA.ROI.SCALES": [1.0, 0.5, 0.25, 0.125],
    "MODEL.ERA.ROI.HIDDEN_CHANNELS": 0,
    "MODEL.ERA.ROI.NORM": "BN",
    "MODEL.ERA.ROI.BETA": 0.0,
    "MODEL.ERA.TWI.STAGES": FIRST_STAGE,
}


def asks_heads(era: CfgNode, parts: Sequence[str]) -> bool:
    """Whether settings of ``MODEL.ERA`` ask the teacher's heads for anything.

    Args:
        parts: of the heads of the student's family.
    """
    weights = [era.KD_WEIGHT, era.ALPHA, *(era.ROI[key] for key in ROI_WEIGHTS.values())]
    weights += [era.TWI[key] for part in parts for key in TWI_WEIGHTS.get(part, ())]
    return any(w > 0 for w in weights) or era.POSITION_WEIGHT == BY_JUDGE


def add_config(cfg: CfgNode) -> None:
    """Add ``MODEL.ERA``."""
    _C = cfg
    _C.MODEL.ERA = CfgNode()
    # FPN levels on which the student estimates the teacher's features. TWI needs every level that the
    # teacher's heads read.
    _C.MODEL.ERA.LEVELS = ["p2", "p3", "p4", "p5", "p6"]

    # P in e_0 = P(F_S), a 1x1 conv: where student's and teacher's channels differ alone (unequal), else e_0 = F_S; or
    # always, as the official code has it, then starting as the identity where they agree (there torch's own start).
    _C.MODEL.ERA.PROJECTION = IF_UNEQUAL

    # MBRNet: N residual branches B_1..B_N, shared by the levels.
    _C.MODEL.ERA.NUM_BRANCHES = 4  # N; 0 = no MBRNet (feature mimic, with TWI on e_0 if asked for)
    _C.MODEL.ERA.NUM_BLOCKS = 2  # conv-norm blocks in a branch, a ReLU between two of them
    _C.MODEL.ERA.KERNEL_SIZE = 1  # of every conv in a branch, pixels of the map; odd
    # Of the first conv of a branch, pixels of the map, odd: dense context, while the others stay KERNEL_SIZE; 0 =
    # KERNEL_SIZE. Not in the official code, whose branches read pooled vectors.
    _C.MODEL.ERA.CONTEXT_KERNEL = 0
    # Start with B_i = 0, so e_i = e_0 (zero-gain start), here and at the ROI feature. The official code does not: its
    # last norm starts at gain 1.
    _C.MODEL.ERA.ZERO_START = False
    _C.MODEL.ERA.HIDDEN_CHANNELS = 64  # width inside a branch; 0 = the student's channels
    _C.MODEL.ERA.NORM = "none"  # none, BN, SyncBN or GN, after every conv of a branch
    _C.MODEL.ERA.NORM_MOMENTUM = 0.01  # of BN and SyncBN (the official code's value)
    # Branch i reads F_S + sum_{j<i} B_j(x_j) (True) or F_S (False, parallel branches).
    _C.MODEL.ERA.ACCUMULATED_INPUTS = True
    # One up-projection U for all branches (True) or one U_i each (False). Only if channels differ.
    _C.MODEL.ERA.SHARED_UP_PROJECTION = False
    _C.MODEL.ERA.SCALES = [1.0, 1.0, 1.0, 1.0]  # s_1..s_N, weights of the branches' losses

    # Loss weights; 0 switches a term off, and it is then not computed.
    _C.MODEL.ERA.FEATURE_WEIGHT = 20.0  # w_f: MSE(e_0, F_T)
    _C.MODEL.ERA.RESIDUAL_WEIGHT = 5.0  # w_r: (1/N) sum_i s_i MSE(d_i, F_T - e_{i-1})
    _C.MODEL.ERA.KD_WEIGHT = 0.0  # w_k: tau^2 KL(teacher ROI classes || student ROI classes)
    _C.MODEL.ERA.KD_TEMPERATURE = 1.0  # tau, of the soft judges' classes too
    # Divide e_i, d_i and F_T in the feature and residual losses by 1 (none) or by sigma_T, the teacher's own
    # standard deviation by channel and level, running over training (teacher).
    _C.MODEL.ERA.STANDARDIZE = BY_TEACHER
    # w(x) in the feature and residual losses, sum_x w |e_i - F_T|^2 / (C sum_x w): 1 (none), or the teacher's highest
    # objectness probability over a position's anchors (teacher). Not in the official code (Ultralytics 2026).
    _C.MODEL.ERA.POSITION_WEIGHT = EVEN

    # Teacher Weight Integration: the teacher's heads, frozen, judge e_0 (weight 1) and every e_i (weight
    # s_i / N) against the ground truth. Weights of heads that the teacher lacks do not count.
    _C.MODEL.ERA.TWI = CfgNode()
    _C.MODEL.ERA.TWI.RPN_WEIGHT = 0.0  # weight of the RPN losses on the estimates
    _C.MODEL.ERA.TWI.ROI_WEIGHT = 0.0  # weight of the ROI box head losses on the estimates
    _C.MODEL.ERA.TWI.DENSE_WEIGHT = 0.0  # weight of the losses of the head of RetinaNet or FCOS
    # Soft judges, beside or in the place of the ground truth: the same heads on the same estimates match their own
    # outputs on the teacher's maps F_T. They need no label.
    _C.MODEL.ERA.TWI.SOFT_RPN_WEIGHT = 1.0  # weight of objectness and anchor deltas
    _C.MODEL.ERA.TWI.SOFT_ROI_WEIGHT = 1.0  # weight of ROI classes and boxes
    _C.MODEL.ERA.TWI.SOFT_DENSE_WEIGHT = (
        1.0  # weight of classes and boxes of RetinaNet's or FCOS's head
    )
    # Which estimates the heads judge, hard and soft: all, e_0..e_N with the weights above; or the ends, e_0 and e_N,
    # the latter with all of sum_i s_i / N, at the cost of two estimates whatever N.
    _C.MODEL.ERA.TWI.ESTIMATES = ALL_ESTIMATES
    # Anchors at which the RPN judges softly: all, or those that the student sampled, which is cheap. The head of RetinaNet or
    # FCOS: all, or 64 positions of an image, up to three quarters of them where the student's anchors are objects.
    _C.MODEL.ERA.TWI.SOFT_POSITIONS = SAMPLED_POSITIONS
    # On how many of the student's sampled proposals an image e_1..e_N are judged by the ROI head, and on
    # how many the KD loss looks; 0 = all. e_0 is judged on all of them, which costs little.
    _C.MODEL.ERA.TWI.PROPOSALS_PER_IMAGE = 128
    # Of a teacher with a cascade of box heads, which judge: all, each on the boxes that it would see, the mean of what they
    # say, at as many passes of a box head as there are stages; or the first, on the sampled proposals. One and the same where
    # there is one head. The cheaper is the default until studies/cascade.yaml has said which teaches better.
    _C.MODEL.ERA.TWI.STAGES = FIRST_STAGE
    # Moved in 0.2: with this in the place of the key, an old config is told so.
    cfg.register_renamed_key(
        "MODEL.ERA.TWI.INIT_STUDENT",
        "MODEL.DISTILLER.INIT_STUDENT",
        message="write 'heads' for True and 'none' for False.",
    )

    # ERA at the ROI feature, beside the FPN: f_S, f_T are the vectors that the box heads make of the student's sampled
    # proposals, in the place of the official code's pooled feature. All weights 0 = not at all. Training alone.
    _C.MODEL.ERA.ROI = CfgNode()
    _C.MODEL.ERA.ROI.FEATURE_WEIGHT = 0.0  # w_f: MSE(P f_S, f_T); official: 5
    # w_g: (1/N) sum_i s_i MSE(d_i, f_T - e_{i-1}); official: 1
    _C.MODEL.ERA.ROI.RESIDUAL_WEIGHT = 0.0
    # w_o: the teacher's box predictor on e_0 (weight 1) and e_i (s_i / N) against the ground truth; official: 1
    _C.MODEL.ERA.ROI.TWI_WEIGHT = 0.0
    # The same against its own outputs on f_T (official: the classes alone, featKL, off by default)
    _C.MODEL.ERA.ROI.SOFT_WEIGHT = 0.0
    _C.MODEL.ERA.ROI.NUM_BRANCHES = 4  # N (official)
    _C.MODEL.ERA.ROI.SCALES = [1.0, 0.5, 0.25, 0.125]  # s_1..s_N (official)
    # Width inside a branch; 0 = that of the student's vector (official)
    _C.MODEL.ERA.ROI.HIDDEN_CHANNELS = 0
    _C.MODEL.ERA.ROI.NORM = "BN"  # as MODEL.ERA.NORM, over proposals (official: BN)
    # Branch i > 1 reads alpha_i f_S + sum_{j<i} beta_ij B_j, learned by channel, alpha_i = 1 at the start and beta_ij =
    # this (official: alphabeta 0, alphabeta2 1; its training script reads f_S alone).
    _C.MODEL.ERA.ROI.BETA = 0.0

    # The same numbers, computed cheaply (True) or as they are defined (False): docs/performance.md.
    _C.MODEL.ERA.FAST = True
    # Run adapter and MBRNet in training through torch.compile (docs/performance.md).
    _C.MODEL.ERA.COMPILE = False

    # Inference: 0 = the plain student, 1 = the teacher's heads on e_N, between = their predictions
    # blended as (1 - alpha) * student + alpha * teacher's heads.
    _C.MODEL.ERA.ALPHA = 0.0


def check_config(cfg: CfgNode) -> None:
    """Check the values that can be judged without building a model.

    Raises:
        UserError: names the key, what was found, what was expected and what to do.
    """
    era = cfg.MODEL.ERA
    if not 0.0 <= era.ALPHA <= 1.0:
        raise UserError(
            f"MODEL.ERA.ALPHA is {era.ALPHA}: expected a number from 0 (plain student) to 1 (teacher's "
            "heads on the estimate); set it within that range."
        )
    check_weights(
        {
            "MODEL.ERA.FEATURE_WEIGHT": era.FEATURE_WEIGHT,
            "MODEL.ERA.RESIDUAL_WEIGHT": era.RESIDUAL_WEIGHT,
            "MODEL.ERA.KD_WEIGHT": era.KD_WEIGHT,
            **{f"MODEL.ERA.TWI.{k}": era.TWI[k] for keys in TWI_WEIGHTS.values() for k in keys},
            **{f"MODEL.ERA.ROI.{key}": era.ROI[key] for key in ROI_WEIGHTS.values()},
            **{f"MODEL.ERA.SCALES[{i}]": s for i, s in enumerate(era.SCALES)},
            **{f"MODEL.ERA.ROI.SCALES[{i}]": s for i, s in enumerate(era.ROI.SCALES)},
        }
    )
    if era.TWI.PROPOSALS_PER_IMAGE < 0:
        raise UserError(
            f"MODEL.ERA.TWI.PROPOSALS_PER_IMAGE is {era.TWI.PROPOSALS_PER_IMAGE}: expected a number of "
            "proposals, or 0 for all."
        )
    for key, value, known in (
        ("PROJECTION", era.PROJECTION, (IF_UNEQUAL, ALWAYS)),
        ("STANDARDIZE", era.STANDARDIZE, (RAW, BY_TEACHER)),
        ("POSITION_WEIGHT", era.POSITION_WEIGHT, (EVEN, BY_JUDGE)),
        ("TWI.ESTIMATES", era.TWI.ESTIMATES, (ALL_ESTIMATES, ENDS)),
        ("TWI.STAGES", era.TWI.STAGES, (ALL_STAGES, FIRST_STAGE)),
        ("TWI.SOFT_POSITIONS", era.TWI.SOFT_POSITIONS, (ALL_POSITIONS, SAMPLED_POSITIONS)),
        ("NORM", era.NORM, NORMS),
        ("ROI.NORM", era.ROI.NORM, NORMS),
    ):
        if value not in known:
            raise UserError(f"MODEL.ERA.{key} is {value!r}: expected one of {', '.join(known)}.")
    for prefix, keys in (("MODEL.ERA", era), ("MODEL.ERA.ROI", era.ROI)):
        if keys.NUM_BRANCHES < 0:
            raise UserError(f"{prefix}.NUM_BRANCHES is {keys.NUM_BRANCHES}: expected 0 or more.")
        if len(keys.SCALES) != keys.NUM_BRANCHES:
            raise UserError(
                f"{prefix}.SCALES has {len(keys.SCALES)} numbers and {prefix}.NUM_BRANCHES is "
                f"{keys.NUM_BRANCHES}: expected one scale a branch; change one of the two."
            )
    if era.ROI.HIDDEN_CHANNELS < 0:
        raise UserError(
            f"MODEL.ERA.ROI.HIDDEN_CHANNELS is {era.ROI.HIDDEN_CHANNELS}: expected at least 0 channels."
        )
    if era.KERNEL_SIZE < 1 or era.KERNEL_SIZE % 2 == 0:
        raise UserError(
            f"MODEL.ERA.KERNEL_SIZE is {era.KERNEL_SIZE}: expected an odd number from 1 on."
        )
    if era.CONTEXT_KERNEL < 0 or (era.CONTEXT_KERNEL > 0 and era.CONTEXT_KERNEL % 2 == 0):
        raise UserError(
            f"MODEL.ERA.CONTEXT_KERNEL is {era.CONTEXT_KERNEL}: expected an odd number from 1 on, or 0 for "
            "MODEL.ERA.KERNEL_SIZE."
        )
    if era.NUM_BLOCKS < 1 or era.HIDDEN_CHANNELS < 0:
        raise UserError(
            f"MODEL.ERA.NUM_BLOCKS is {era.NUM_BLOCKS} and MODEL.ERA.HIDDEN_CHANNELS is "
            f"{era.HIDDEN_CHANNELS}: expected at least 1 block and at least 0 channels."
        )
    check_temperature("MODEL.ERA.KD_TEMPERATURE", era.KD_TEMPERATURE)
    check_level_names(era.LEVELS, "MODEL.ERA.LEVELS")
