"""The keys of the frame, each with its meaning and default."""

from __future__ import annotations

from detectron2.config import CfgNode

from era.registry import BACKBONE_KEYS, DETECTOR_FAMILIES, METHOD_REGISTRY
from era_runtime.pictures import MAX_PIXELS

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
    # Seconds in which a process is to be done with the training, evaluations included; 0 = as long as it takes. Where it runs
    # behind, the rest of the schedule is gone through in fewer iterations, so that the learning rate comes to its end
    # (era/engine/time_limit.py).
    _C.SOLVER.MAX_SECONDS = 0
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
