"""The config: the keys of the frame, safe loading, cheap checks.

Every other key belongs to a method, or to a family of detectors or a backbone that Detectron2 has no keys of, and stands
in its file (``Method.add_config``, ``Detector.add_config``, ``register_pyramids``).
"""

from __future__ import annotations

import functools
import math
import operator
import os
import warnings
from collections.abc import Sequence

from detectron2 import modeling
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from era.addresses import check_bases, is_hub, is_remote
from era.errors import UserError
from era.registry import (
    BACKBONE_KEYS,
    DETECTOR_FAMILIES,
    LAZY,
    METHOD_REGISTRY,
    is_distiller,
    label_free_methods,
    methods_of,
)
from era_runtime.pictures import MAX_PIXELS

with warnings.catch_warnings():  # setuptools is kept below 81 for it
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from detectron2 import model_zoo

CHANNELS_LAST = ("auto", "always", "never")
AMP_DTYPES = ("auto", "float16", "bfloat16")
CACHE_DTYPES = ("float32", "float16")
ON_BAD_IMAGE = ("stop", "skip")
# MODEL.DISTILLER.INIT_STUDENT
INHERIT_NOTHING, INHERIT_HEADS, INHERIT_FPN = "none", "heads", "fpn_and_heads"
INHERITANCE = (INHERIT_NOTHING, INHERIT_HEADS, INHERIT_FPN)

# MODEL.DISTILLER.CLASS_MAP
AUTO, EXACT, FEATURE_ONLY = "auto", "exact", "feature_only"
CLASS_MAPS = (AUTO, EXACT, FEATURE_ONLY)

# Which registry of Detectron2 knows the name at a key.
PARTS = {
    "MODEL.META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "MODEL.DISTILLER.STUDENT_META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": modeling.ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": modeling.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": modeling.RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": modeling.ROI_HEADS_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": modeling.ROI_MASK_HEAD_REGISTRY,
}


def add_era_config(cfg: CfgNode) -> None:
    """Add this project's keys, with their defaults, to a Detectron2 config, in place."""
    _C = cfg

    # ---- The distiller -------------------------------------------------------------------------
    _C.MODEL.DISTILLER = CfgNode()
    # The student's own meta-architecture; everything else of the config describes that student too.
    _C.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE = "GeneralizedRCNN"
    # Distillation methods by their registered names; their losses add up. () = none: a plain student
    # that starts from the teacher's weights (INIT_STUDENT).
    _C.MODEL.DISTILLER.METHODS = ()
    # What of the student STARTS from the teacher's weights ("inheritance"; it moves AP by itself, so
    # report it apart): none, heads (all that follows the FPN), or fpn_and_heads. Needs parts of equal
    # shape. Not repeated when resuming.
    _C.MODEL.DISTILLER.INIT_STUDENT = "none"
    # How the teacher's classes are matched to the student's (docs/classes_and_levels.md). auto: by name, where the names of
    # both are known; the teacher's class layers are read through the map, and a class that it lacks is taught by ground truth
    # and features. exact: equal names in equal order. feature_only: not at all; no method may then read the heads.
    # Without names, both take equal numbers of classes for the same ones.
    _C.MODEL.DISTILLER.CLASS_MAP = "auto"
    # The levels of both are paired by their strides, whatever their names. True: a level of the student's without a pair is
    # compared with the teacher's of the nearest stride, enlarged or averaged by an exact power of two.
    _C.MODEL.DISTILLER.RESAMPLE_LEVELS = False
    # On pictures without labels the teacher's detections of at least this score, 0 to 1, choose which anchors
    # and proposals the methods look at, as ground truth does elsewhere. No loss is taken against them.
    _C.MODEL.DISTILLER.PSEUDO_SCORE = 0.5
    # A loss of a method that is, on average over 100 steps, more than so many times the student's own losses
    # together is warned of by name: it drowns the task.
    _C.MODEL.DISTILLER.MAX_TASK_RATIO = 200.0

    # ---- The teacher: a config file, weights, overrides ----------------------------------------
    _C.MODEL.TEACHER = CfgNode()
    # Path of a config file, or a model-zoo name such as COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml. A LazyConfig (.py)
    # too, with TRUST_PYTHON_CONFIG.
    _C.MODEL.TEACHER.CONFIG_FILE = ""
    # Run a CONFIG_FILE that is Python, and whatever it imports. It can do all that you can.
    _C.MODEL.TEACHER.TRUST_PYTHON_CONFIG = False
    # Checkpoint path or URL (detectron2://, https://). "" is an error unless ALLOW_RANDOM says
    # that random weights are meant.
    _C.MODEL.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: [KEY, VALUE, KEY, VALUE, ...]; of a LazyConfig ["model.key=value", ...].
    _C.MODEL.TEACHER.OPTS = []
    # File of its class names in the order of their numbers: one a line, or a .json with a list of them or COCO's
    # categories; the student's name for a class matches it. "" = those of the datasets of its config.
    _C.MODEL.TEACHER.CLASSES = ""
    # Permit a teacher with random weights (smoke tests, benchmarks); only read if WEIGHTS is "".
    _C.MODEL.TEACHER.ALLOW_RANDOM = False
    # Memory layout of the teacher's backbone alone: auto, always or never. auto is on on a CPU, where it
    # measured 0.80 to 0.87 of the time (docs/performance.md), and off on a GPU: not measured there.
    _C.MODEL.TEACHER.CHANNELS_LAST = "auto"
    # Run the teacher's backbone through torch.compile; needs a C++ compiler.
    _C.MODEL.TEACHER.COMPILE = False
    # Where the teacher's maps are kept, by picture, size and flip: "off" (in YAML in quotes, or it means False),
    # "memory" (each process its own) or a folder's path, with a /, which any processes and runs share.
    _C.MODEL.TEACHER.CACHE = "off"
    # Room for them in GiB, of each process in memory, of all together in a folder. Least recently used goes first.
    _C.MODEL.TEACHER.CACHE_GIB = 4.0
    # float32 keeps what the teacher computes as it is; float16 takes half the room and rounds: another run.
    _C.MODEL.TEACHER.CACHE_DTYPE = "float32"

    add_lazy_config(_C)

    # ---- The average of the weights (era/engine/ema.py) ------------------------------------------
    _C.MODEL.EMA = CfgNode()
    # Evaluate, keep as the best, leave as the plain student and deploy the exponential moving average of the weights
    # over the steps of the run; training goes on with the weights themselves.
    _C.MODEL.EMA.ENABLED = False
    # d: average = d * average + (1 - d) * weights after a step; min(d, (1 + n) / (10 + n)) after n steps. 0.9998 is
    # EfficientDet's (arXiv 1911.09070, section 5.1). With SOLVER.REFERENCE_WORLD_SIZE a batch of another size makes
    # it d^(batch / reference batch), so that it spans as many pictures (arXiv 2307.13813).
    _C.MODEL.EMA.DECAY = 0.9998

    # ---- Training, data, evaluation --------------------------------------------------------------
    # Batches whose gradients are summed into one optimiser step. SOLVER.IMS_PER_BATCH stays the number
    # of images per optimiser step; each forward sees IMS_PER_BATCH / ACCUMULATION_STEPS of them.
    _C.SOLVER.ACCUMULATION_STEPS = 1
    # A run stops before the weights are touched if one of its loss terms, by its absolute value, is above this (or
    # not finite). Far above anything healthy: a guard against weights that have left every bound, not a tuning knob.
    _C.SOLVER.MAX_LOSS = 1e6
    # Type of mixed precision (SOLVER.AMP.ENABLED): auto = float16 on a GPU, bfloat16 on the CPU.
    _C.SOLVER.AMP.DTYPE = "auto"
    # Datasets of one's own in COCO format: [[name, annotation file, image folder], ...]; use the names
    # in DATASETS.TRAIN and DATASETS.TEST.
    _C.DATASETS.COCO_FORMAT = []
    # Folders of pictures as sets without annotations: [[name, folder], ...]; the .jpg, .jpeg and .png files of
    # each (not of folders inside), by name. Use the names in DATASETS.UNLABELED.
    _C.DATASETS.IMAGE_FOLDERS = []
    # Sets whose pictures a distiller also sees, without labels: annotations that they have are ignored.
    # Losses that need no ground truth are taken on them; the student's own are not. () = none.
    _C.DATASETS.UNLABELED = ()
    # How many of the SOLVER.IMS_PER_BATCH pictures of an optimiser step come from DATASETS.UNLABELED; at least 1
    # and fewer than all, in equal parts for every process and accumulated batch. Only read if UNLABELED names sets.
    _C.SOLVER.UNLABELED_PER_BATCH = 0
    # How many of the periodic checkpoints of a run stay, the last ones, beside model_final.pth and model_best.pth;
    # at least 2, so that one can be damaged. 0 = all.
    _C.SOLVER.CHECKPOINTS_KEPT = 3
    # The weights of the evaluation with the highest value of this stay in model_best.pth: bbox/AP, segm/AP or another
    # name in metrics.json, without the set's; of the first of DATASETS.TEST. "" = none; only with TEST.EVAL_PERIOD.
    _C.TEST.BEST_METRIC = "bbox/AP"
    # At every evaluation also the student's own losses on DATASETS.TEST, as validation/loss_* and validation/total_loss:
    # a pass over the test sets more.
    _C.TEST.LOSS = False
    # Training ends, as after its last iteration, when so many evaluations in a row were not better than the best by
    # BEST_METRIC. 0 = it does not.
    _C.TEST.PATIENCE = 0
    # The plain student that a run leaves is that of the best evaluation, not of the last iteration; best.json beside
    # it says which one that was.
    _C.TEST.LEAVE_BEST = False
    # A picture that cannot be used (absent, damaged, of another size than its annotation says): "stop" ends the
    # run, "skip" puts another one in its place in training and counts it as without detections in evaluation.
    _C.INPUT.ON_BAD_IMAGE = "stop"
    # Most pixels (width x height) of a picture that is decoded; this is Pillow's own limit, 16,384 by 10,922.
    _C.INPUT.MAX_IMAGE_PIXELS = MAX_PIXELS
    # Evaluate the teacher beside the student, once a run.
    _C.TEST.EVAL_TEACHER = False

    # ---- Scalars beside TensorBoard and metrics.json (era/engine/tracking.py) --------------------
    _C.TRACKING = CfgNode()
    # Where they also go: some of "wandb" and "mlflow", each an extra of this package.
    _C.TRACKING.WRITERS = ()
    # W&B's project, MLflow's experiment.
    _C.TRACKING.PROJECT = "era"
    # Of the run there; "" = the last part of OUTPUT_DIR.
    _C.TRACKING.NAME = ""

    for _, owner in (*METHOD_REGISTRY, *DETECTOR_FAMILIES):
        owner.add_config(cfg)
    for add_keys in dict.fromkeys(BACKBONE_KEYS.values()):  # several builders may share theirs
        add_keys(cfg)


def add_lazy_config(cfg: CfgNode) -> None:
    """Add ``MODEL.LAZY``, in place: of a detector that a LazyConfig describes (``MODEL.META_ARCHITECTURE`` LazyModel), which
    ``tools/lazyconfig_train_net.py`` sets."""
    cfg.MODEL.LAZY = CfgNode()
    # The Python file, and overrides of it: ["model.key=value", ...].
    cfg.MODEL.LAZY.CONFIG_FILE = ""
    cfg.MODEL.LAZY.OPTS = []
    # Whether the file, and whatever it imports, may be run.
    cfg.MODEL.LAZY.TRUST = False
    # The meta-architecture that it builds, and a hash of what it says of the model.
    cfg.MODEL.LAZY.META_ARCHITECTURE = ""
    cfg.MODEL.LAZY.SHA256 = ""


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
            check_bases(path, what=what)
            cfg.merge_from_file(path, allow_unsafe=False)
        except UserError:
            raise
        except Exception as e:  # a file of anything can fail in any way
            raise UserError(
                f"{what} {config_file} is not a config that can be read ({_first_line(e)}): expected "
                f"YAML with the keys of Detectron2 and of this project; {_remedy(e)}."
            ) from e
    try:  # .inf is YAML's; a text that is no Python literal stays a text
        cfg.merge_from_list([math.inf if opt == ".inf" else opt for opt in opts])
    except Exception as e:  # so can a text that is read as Python's literals
        raise UserError(
            f"{opts_what} has overrides that do not fit ({_first_line(e)}): expected pairs of an "
            "existing KEY and a VALUE of its type; correct them."
        ) from e
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            f"{what} {config_file} or {opts_what} sets MODEL.LOAD_PROPOSALS True: Detectron2 reads such "
            "proposals as pickles, which can run any code; set it False and let an RPN propose."
        )
    if is_remote(cfg.OUTPUT_DIR):
        raise UserError(
            f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}, an address: expected a folder of this machine; name one."
        )


def find_config_file(config_file: str, *, what: str) -> str:
    """Path of a config file given as a path, as a model-zoo name or as ``hf://...`` (era/checkpoint/hub.py).

    Raises:
        UserError: it is none of them.
    """
    if os.path.isfile(config_file) and not is_remote(config_file):
        return config_file
    if is_hub(config_file):
        return PathManager.get_local_path(config_file)
    try:
        return model_zoo.get_config_file(config_file)
    except RuntimeError as e:
        raise UserError(
            f"{what} is {config_file!r}, which is neither a file (looked for from {os.getcwd()}) nor a "
            "name in Detectron2's model zoo: correct the path or the name."
        ) from e


def student_config(cfg: CfgNode) -> CfgNode:
    """The student alone as a stock Detectron2 config: no key of this project is left in it but those of its family of
    detectors (``Detector.add_config``) and of its backbone, where Detectron2 has none.

    ``MODEL.META_ARCHITECTURE`` becomes the student's own; keys that stock Detectron2 does not know are
    dropped, so ``detectron2.config.get_cfg().merge_from_file`` reads a dump of it unless its family or backbone has such keys.
    """
    stock = get_cfg()
    name = cfg.MODEL.META_ARCHITECTURE
    if is_distiller(cfg):
        name = cfg.MODEL.DISTILLER.STUDENT_META_ARCHITECTURE
    stock.MODEL.META_ARCHITECTURE = name
    if name == LAZY:
        add_lazy_config(stock)
        stock.MODEL.LAZY = cfg.MODEL.LAZY.clone()
    for _, family in DETECTOR_FAMILIES:
        if family.describes(stock):
            family.add_config(stock)
    if cfg.MODEL.BACKBONE.NAME in BACKBONE_KEYS:
        BACKBONE_KEYS[cfg.MODEL.BACKBONE.NAME](stock)
    _copy_known_keys(cfg, stock)
    stock.MODEL.META_ARCHITECTURE = name
    return stock


def validate_config(cfg: CfgNode) -> None:
    """Check the values that can be judged without building a model.

    Raises:
        UserError: names the key, what was found, what was expected and what to do.
    """
    if (
        cfg.SOLVER.ACCUMULATION_STEPS < 1
        or cfg.SOLVER.IMS_PER_BATCH % cfg.SOLVER.ACCUMULATION_STEPS
    ):
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS is {cfg.SOLVER.ACCUMULATION_STEPS}: expected a divisor of "
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}); change one of the two."
        )
    if cfg.SOLVER.CHECKPOINTS_KEPT < 0 or cfg.SOLVER.CHECKPOINTS_KEPT == 1:
        raise UserError(
            f"SOLVER.CHECKPOINTS_KEPT is {cfg.SOLVER.CHECKPOINTS_KEPT}: expected at least 2, or 0 for all; set it so."
        )
    if not cfg.SOLVER.MAX_LOSS > 0:  # NaN neither
        raise UserError(
            f"SOLVER.MAX_LOSS is {cfg.SOLVER.MAX_LOSS}: expected a number above 0 that no healthy loss reaches, .inf for "
            "no bound; set it so."
        )
    check_parts(cfg)
    if cfg.SOLVER.AMP.DTYPE not in AMP_DTYPES:
        raise UserError(
            f"SOLVER.AMP.DTYPE is {cfg.SOLVER.AMP.DTYPE!r}: expected one of {', '.join(AMP_DTYPES)}."
        )
    if cfg.INPUT.ON_BAD_IMAGE not in ON_BAD_IMAGE:
        raise UserError(
            f"INPUT.ON_BAD_IMAGE is {cfg.INPUT.ON_BAD_IMAGE!r}: expected one of {', '.join(ON_BAD_IMAGE)}."
        )
    if cfg.INPUT.MAX_IMAGE_PIXELS < 1:
        raise UserError(
            f"INPUT.MAX_IMAGE_PIXELS is {cfg.INPUT.MAX_IMAGE_PIXELS}: expected a number of pixels above 0."
        )
    if len(cfg.DATASETS.UNLABELED) > 0:
        _check_unlabeled(cfg)
    if not is_distiller(cfg):
        return
    keys = cfg.MODEL.DISTILLER
    if keys.INIT_STUDENT not in INHERITANCE:
        raise UserError(
            f"MODEL.DISTILLER.INIT_STUDENT is {keys.INIT_STUDENT!r}: expected one of "
            f"{', '.join(INHERITANCE)}."
        )
    if keys.CLASS_MAP not in CLASS_MAPS:
        raise UserError(
            f"MODEL.DISTILLER.CLASS_MAP is {keys.CLASS_MAP!r}: expected one of {', '.join(CLASS_MAPS)}; set it so."
        )
    if keys.CLASS_MAP == FEATURE_ONLY:
        _check_features_alone(cfg)
    if not 0.0 <= keys.PSEUDO_SCORE <= 1.0:
        raise UserError(
            f"MODEL.DISTILLER.PSEUDO_SCORE is {keys.PSEUDO_SCORE}: expected a score from 0 to 1; set it so."
        )
    if not keys.MAX_TASK_RATIO > 0:
        raise UserError(
            f"MODEL.DISTILLER.MAX_TASK_RATIO is {keys.MAX_TASK_RATIO}: expected how many times the student's own losses a "
            "method's may be, above 0, .inf for any; set it so."
        )
    if len(keys.METHODS) == 0 and keys.INIT_STUDENT == INHERIT_NOTHING:
        raise UserError(
            "MODEL.DISTILLER.METHODS is empty and MODEL.DISTILLER.INIT_STUDENT is none, so nothing would be "
            f"distilled: name methods out of {', '.join(sorted(name for name, _ in METHOD_REGISTRY))}, or "
            "train the plain student by its own MODEL.META_ARCHITECTURE."
        )
    if cfg.MODEL.TEACHER.CHANNELS_LAST not in CHANNELS_LAST:
        raise UserError(
            f"MODEL.TEACHER.CHANNELS_LAST is {cfg.MODEL.TEACHER.CHANNELS_LAST!r}: expected one of "
            f"{', '.join(CHANNELS_LAST)}."
        )
    _check_cache(cfg.MODEL.TEACHER)
    for method in methods_of(cfg).values():
        method.check_config(cfg)


def check_parts(cfg: CfgNode, *, what: str = "") -> None:
    """Every part of a model that a config names is one that Detectron2 knows.

    Args:
        what: of whom the config is, for the message.

    Raises:
        UserError: the key, the unknown name and those that are known.
    """
    for key, registry in PARTS.items():
        name = functools.reduce(operator.getitem, key.split("."), cfg)
        known = sorted(known for known, _ in registry)
        if name not in known and name != "PrecomputedProposals":
            raise UserError(
                f"{what}{key} is {name!r}: expected one of {', '.join(known)}; correct the name, or import the file "
                "that registers it."
            )


def _check_unlabeled(cfg: CfgNode) -> None:
    """``DATASETS.UNLABELED`` and its part of a batch fit the run."""
    names = f"DATASETS.UNLABELED names {list(cfg.DATASETS.UNLABELED)}"
    if not is_distiller(cfg):
        raise UserError(
            f"{names}, and MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: only a Distiller learns "
            "from pictures without labels; leave the list empty, or distil."
        )
    if not label_free_methods(cfg):
        raise UserError(
            f"{names}, and no method of MODEL.DISTILLER.METHODS {list(cfg.MODEL.DISTILLER.METHODS)} has, with "
            "these weights, a loss that needs no labels: leave the list empty, or switch such a loss on."
        )
    count, total, steps = (
        cfg.SOLVER[key] for key in ("UNLABELED_PER_BATCH", "IMS_PER_BATCH", "ACCUMULATION_STEPS")
    )
    if not 1 <= count < total or count % steps:
        raise UserError(
            f"SOLVER.UNLABELED_PER_BATCH is {count}, and {names}: expected at least 1 and fewer than "
            f"SOLVER.IMS_PER_BATCH ({total}), in equal parts for SOLVER.ACCUMULATION_STEPS {steps}; set it so, or "
            "leave the list empty."
        )


def _check_features_alone(cfg: CfgNode) -> None:
    """Nothing of a run asks what the teacher's heads say."""
    keys, found = cfg.MODEL.DISTILLER, ""
    for name, method in methods_of(cfg).items():
        if method.needs(cfg).heads:
            found = f"the method {name} with these settings reads the teacher's heads"
    if keys.INIT_STUDENT != INHERIT_NOTHING:
        found = f"MODEL.DISTILLER.INIT_STUDENT {keys.INIT_STUDENT} takes the teacher's heads"
    elif len(cfg.DATASETS.UNLABELED) > 0:
        found = "DATASETS.UNLABELED has the teacher detect"
    elif cfg.TEST.EVAL_TEACHER:
        found = "TEST.EVAL_TEACHER has the teacher detect"
    if found:
        raise UserError(
            f"MODEL.DISTILLER.CLASS_MAP is {FEATURE_ONLY}, and {found}: expected what compares feature maps alone; switch that "
            "off, or match the classes by name (auto)."
        )


def _check_cache(keys: CfgNode) -> None:
    where = keys.CACHE
    if where not in ("off", "memory") and (os.sep not in where or is_remote(where)):
        raise UserError(
            f"MODEL.TEACHER.CACHE is {where!r}: expected off, memory, or a folder of this machine written with "
            f"a {os.sep}, such as ./{os.path.basename(where) or 'cache'}."
        )
    if not 0 < keys.CACHE_GIB < float("inf"):
        raise UserError(f"MODEL.TEACHER.CACHE_GIB is {keys.CACHE_GIB}: expected GiB above 0.")
    if keys.CACHE_DTYPE not in CACHE_DTYPES:
        raise UserError(
            f"MODEL.TEACHER.CACHE_DTYPE is {keys.CACHE_DTYPE!r}: expected one of {', '.join(CACHE_DTYPES)}."
        )


def _copy_known_keys(source: CfgNode, target: CfgNode) -> None:
    for key in target:
        if key not in source:
            continue
        if isinstance(target[key], CfgNode) and isinstance(source[key], CfgNode):
            _copy_known_keys(source[key], target[key])
        else:
            target[key] = source[key]


def _remedy(error: BaseException) -> str:
    if "python/object" in str(error):
        return (
            "code in it is never run, so write the values out, as configs/retinanet_teacher_r101.yaml does for the model "
            "zoo's RetinaNets"
        )
    return "correct the file"


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
