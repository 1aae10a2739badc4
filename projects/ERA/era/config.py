"""Every config key that this project adds to Detectron2's, with its meaning, unit and paper symbol.

Symbols are those of ERA (arXiv 2508.16050) in the detection form that README.md describes: ``F_S``,
``F_T`` student and teacher FPN maps, ``e_i`` estimates, ``B_i`` branches, ``N`` branches, ``s_i`` scales.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from era.errors import UserError

NORMS = ("none", "BN", "SyncBN", "GN")
CHANNELS_LAST = ("auto", "always", "never")
AMP_DTYPES = ("auto", "float16", "bfloat16")


def add_era_config(cfg: CfgNode) -> None:
    """Add this project's keys, with their defaults, to a Detectron2 config, in place."""
    _C = cfg

    # ---- The distiller -------------------------------------------------------------------------
    _C.MODEL.DISTILLER = CfgNode()
    # The student's own meta-architecture; everything else of the config describes that student too.
    _C.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE = "GeneralizedRCNN"
    # Distillation methods by their registered names; their losses add up. () = none: a plain student
    # that may still start from the teacher's heads (MODEL.ERA.TWI.INIT_STUDENT).
    _C.MODEL.DISTILLER.METHODS = ("ERA",)

    # ---- The teacher: a config file, weights, overrides ----------------------------------------
    _C.MODEL.TEACHER = CfgNode()
    # Path of a config file, or a model-zoo name such as COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml.
    _C.MODEL.TEACHER.CONFIG_FILE = ""
    # Checkpoint path or URL (detectron2://, https://). "" is an error unless ALLOW_RANDOM says
    # that random weights are meant.
    _C.MODEL.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: [KEY, VALUE, KEY, VALUE, ...].
    _C.MODEL.TEACHER.OPTS = []
    # Permit a teacher with random weights (smoke tests, benchmarks); only read if WEIGHTS is "".
    _C.MODEL.TEACHER.ALLOW_RANDOM = False

    # Memory layout of the teacher's backbone alone: auto, always or never. auto is on on a CPU, where it
    # measured 0.80 to 0.87 of the time (docs/performance.md), and off on a GPU: not measured there.
    _C.MODEL.TEACHER.CHANNELS_LAST = "auto"
    # Run the teacher's backbone through torch.compile; needs a C++ compiler.
    _C.MODEL.TEACHER.COMPILE = False

    # ---- ERA -----------------------------------------------------------------------------------
    _C.MODEL.ERA = CfgNode()
    # FPN levels on which the student estimates the teacher's features. TWI needs every level that the
    # teacher's RPN and ROI heads read.
    _C.MODEL.ERA.LEVELS = ["p2", "p3", "p4", "p5", "p6"]

    # MBRNet: N residual branches B_1..B_N, shared by the levels.
    _C.MODEL.ERA.NUM_BRANCHES = 4  # N; 0 = no MBRNet (feature mimic, with TWI on e_0 if asked for)
    _C.MODEL.ERA.NUM_BLOCKS = 2  # conv-norm blocks in a branch, a ReLU between two of them
    _C.MODEL.ERA.KERNEL_SIZE = 1  # of every conv in a branch, pixels of the map; odd
    _C.MODEL.ERA.HIDDEN_CHANNELS = 64  # width inside a branch; 0 = the student's channels
    _C.MODEL.ERA.NORM = "none"  # none, BN, SyncBN or GN, after every conv of a branch
    _C.MODEL.ERA.NORM_MOMENTUM = 0.01  # of BN and SyncBN (the official code's value)
    # Branch i reads F_S + sum_{j<i} B_j(x_j) (True) or F_S (False, parallel branches).
    _C.MODEL.ERA.ACCUMULATED_INPUTS = True
    # One up-projection U for all branches (True) or one U_i each (False). Only if channels differ.
    _C.MODEL.ERA.SHARED_UP_PROJECTION = False
    _C.MODEL.ERA.SCALES = [1.0, 0.5, 0.25, 0.125]  # s_1..s_N, weights of the branches' losses

    # Run adapter and MBRNet in training through torch.compile (docs/performance.md).
    _C.MODEL.ERA.COMPILE = False

    # Loss weights; 0 switches a term off, and it is then not computed.
    _C.MODEL.ERA.FEATURE_WEIGHT = 1.0  # w_f: MSE(e_0, F_T)
    _C.MODEL.ERA.RESIDUAL_WEIGHT = 1.0  # w_r: (1/N) sum_i s_i MSE(d_i, F_T - e_{i-1})
    _C.MODEL.ERA.KD_WEIGHT = 0.0  # w_k: tau^2 KL(teacher ROI classes || student ROI classes)
    _C.MODEL.ERA.KD_TEMPERATURE = 1.0  # tau

    # Teacher Weight Integration: the teacher's RPN and ROI box heads, frozen, judge e_0 (weight 1) and
    # every e_i (weight s_i / N) against the ground truth.
    _C.MODEL.ERA.TWI = CfgNode()
    _C.MODEL.ERA.TWI.RPN_WEIGHT = 1.0  # weight of the RPN losses on the estimates
    _C.MODEL.ERA.TWI.ROI_WEIGHT = 1.0  # weight of the ROI box head losses on the estimates
    # On how many of the student's sampled proposals an image e_1..e_N are judged by the ROI head, and on
    # how many the KD loss looks; 0 = all. e_0 is judged on all of them, which costs little.
    _C.MODEL.ERA.TWI.PROPOSALS_PER_IMAGE = 128
    # Let the student's RPN and ROI heads START from the teacher's weights ("inheritance"; it moves
    # AP by itself, so report it apart). Needs heads of equal shape. Not repeated when resuming.
    _C.MODEL.ERA.TWI.INIT_STUDENT = False

    # Inference: 0 = the plain student, 1 = the teacher's heads on e_N, between = their predictions
    # blended as (1 - alpha) * student + alpha * teacher's heads.
    _C.MODEL.ERA.ALPHA = 0.0

    # ---- Training, data, evaluation --------------------------------------------------------------
    # Batches whose gradients are summed into one optimiser step. SOLVER.IMS_PER_BATCH stays the number
    # of images per optimiser step; each forward sees IMS_PER_BATCH / ACCUMULATION_STEPS of them.
    _C.SOLVER.ACCUMULATION_STEPS = 1
    # Type of mixed precision (SOLVER.AMP.ENABLED): auto = float16 on a GPU, bfloat16 on the CPU.
    _C.SOLVER.AMP.DTYPE = "auto"
    # Datasets of one's own in COCO format: [[name, annotation file, image folder], ...]; use the names
    # in DATASETS.TRAIN and DATASETS.TEST.
    _C.DATASETS.COCO_FORMAT = []
    # Evaluate the teacher beside the student, once a run.
    _C.TEST.EVAL_TEACHER = False


def get_era_cfg() -> CfgNode:
    """Detectron2's default config plus this project's keys."""
    cfg = get_cfg()
    add_era_config(cfg)
    return cfg


def load_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """A config from a YAML file and overrides, loaded safely (YAML never runs code).

    Args:
        config_file: path of a config file, a model-zoo name, or "" for the defaults.
        opts: overrides, ``[KEY, VALUE, ...]``.

    Raises:
        UserError: no such file, a file that is no config, an unknown key or an unfit value.
    """
    cfg = get_era_cfg()
    merge_config(cfg, config_file, opts, what="--config-file", opts_what="the command line")
    return cfg


def merge_config(
    cfg: CfgNode, config_file: str, opts: Sequence[str], *, what: str, opts_what: str
) -> None:
    """Merge a config file (path or zoo name) and overrides into ``cfg``, in place.

    Args:
        what, opts_what: how a message names the source of the file and of the overrides.

    Raises:
        UserError: as :func:`load_config`.
    """
    if config_file:
        path = find_config_file(config_file, what=what)
        try:
            cfg.merge_from_file(path, allow_unsafe=False)
        except (yaml.YAMLError, KeyError, ValueError, AssertionError, AttributeError, OSError) as e:
            raise UserError(
                f"{what} {config_file} is not a config that can be read ({_first_line(e)}): expected "
                "YAML with the keys of Detectron2 and of this project; correct the file."
            ) from e
    try:
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError, SyntaxError) as e:
        raise UserError(
            f"{opts_what} has overrides that do not fit ({_first_line(e)}): expected pairs of an "
            "existing KEY and a VALUE of its type; correct them."
        ) from e


def find_config_file(config_file: str, *, what: str) -> str:
    """Path of a config file given as a path or as a model-zoo name.

    Raises:
        UserError: it is neither.
    """
    if os.path.isfile(config_file):
        return config_file
    try:
        return model_zoo.get_config_file(config_file)
    except RuntimeError as e:
        raise UserError(
            f"{what} is {config_file!r}, which is neither a file (looked for from {os.getcwd()}) nor a "
            "name in Detectron2's model zoo: correct the path or the name."
        ) from e


def student_config(cfg: CfgNode) -> CfgNode:
    """The student alone as a stock Detectron2 config: no key of this project is left in it.

    ``MODEL.META_ARCHITECTURE`` becomes the student's own; keys that stock Detectron2 does not know are
    dropped, so ``detectron2.config.get_cfg().merge_from_file`` reads a dump of it.
    """
    stock = get_cfg()
    _copy_known_keys(cfg, stock)
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        stock.MODEL.META_ARCHITECTURE = cfg.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE
    return stock


def validate_config(cfg: CfgNode) -> None:
    """Check the values that can be judged without building a model.

    Raises:
        UserError: names the key, what was found, what was expected and what to do.
    """
    era = cfg.MODEL.ERA
    if (
        cfg.SOLVER.ACCUMULATION_STEPS < 1
        or cfg.SOLVER.IMS_PER_BATCH % cfg.SOLVER.ACCUMULATION_STEPS
    ):
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS is {cfg.SOLVER.ACCUMULATION_STEPS}: expected a divisor of "
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}); change one of the two."
        )
    if cfg.SOLVER.AMP.DTYPE not in AMP_DTYPES:
        raise UserError(
            f"SOLVER.AMP.DTYPE is {cfg.SOLVER.AMP.DTYPE!r}: expected one of {', '.join(AMP_DTYPES)}."
        )
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        return

    if cfg.MODEL.TEACHER.CHANNELS_LAST not in CHANNELS_LAST:
        raise UserError(
            f"MODEL.TEACHER.CHANNELS_LAST is {cfg.MODEL.TEACHER.CHANNELS_LAST!r}: expected one of "
            f"{', '.join(CHANNELS_LAST)}."
        )
    if not 0.0 <= era.ALPHA <= 1.0:
        raise UserError(
            f"MODEL.ERA.ALPHA is {era.ALPHA}: expected a number from 0 (plain student) to 1 (teacher's "
            "heads on the estimate); set it within that range."
        )
    weights = {
        "MODEL.ERA.FEATURE_WEIGHT": era.FEATURE_WEIGHT,
        "MODEL.ERA.RESIDUAL_WEIGHT": era.RESIDUAL_WEIGHT,
        "MODEL.ERA.KD_WEIGHT": era.KD_WEIGHT,
        "MODEL.ERA.TWI.RPN_WEIGHT": era.TWI.RPN_WEIGHT,
        "MODEL.ERA.TWI.ROI_WEIGHT": era.TWI.ROI_WEIGHT,
        **{f"MODEL.ERA.SCALES[{i}]": s for i, s in enumerate(era.SCALES)},
    }
    for key, value in weights.items():
        if not 0.0 <= value < float("inf"):
            raise UserError(f"{key} is {value}: expected a finite number of at least 0; set it so.")
    if era.TWI.PROPOSALS_PER_IMAGE < 0:
        raise UserError(
            f"MODEL.ERA.TWI.PROPOSALS_PER_IMAGE is {era.TWI.PROPOSALS_PER_IMAGE}: expected a number of "
            "proposals, or 0 for all."
        )
    if era.NUM_BRANCHES < 0:
        raise UserError(f"MODEL.ERA.NUM_BRANCHES is {era.NUM_BRANCHES}: expected 0 or more.")
    if len(era.SCALES) != era.NUM_BRANCHES:
        raise UserError(
            f"MODEL.ERA.SCALES has {len(era.SCALES)} numbers and MODEL.ERA.NUM_BRANCHES is "
            f"{era.NUM_BRANCHES}: expected one scale a branch; change one of the two."
        )
    if era.NORM not in NORMS:
        raise UserError(f"MODEL.ERA.NORM is {era.NORM!r}: expected one of {', '.join(NORMS)}.")
    if era.KERNEL_SIZE < 1 or era.KERNEL_SIZE % 2 == 0:
        raise UserError(
            f"MODEL.ERA.KERNEL_SIZE is {era.KERNEL_SIZE}: expected an odd number from 1 on."
        )
    if era.NUM_BLOCKS < 1 or era.HIDDEN_CHANNELS < 0:
        raise UserError(
            f"MODEL.ERA.NUM_BLOCKS is {era.NUM_BLOCKS} and MODEL.ERA.HIDDEN_CHANNELS is "
            f"{era.HIDDEN_CHANNELS}: expected at least 1 block and at least 0 channels."
        )
    if era.KD_TEMPERATURE <= 0:
        raise UserError(f"MODEL.ERA.KD_TEMPERATURE is {era.KD_TEMPERATURE}: expected more than 0.")
    if not era.LEVELS:
        raise UserError("MODEL.ERA.LEVELS is empty: expected FPN levels such as ['p2', 'p3'].")


def _copy_known_keys(source: CfgNode, target: CfgNode) -> None:
    for key in target:
        if key not in source:
            continue
        if isinstance(target[key], CfgNode) and isinstance(source[key], CfgNode):
            _copy_known_keys(source[key], target[key])
        else:
            target[key] = source[key]


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
