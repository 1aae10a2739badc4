"""What is to be deployed: a run's folder or a config and a checkpoint, read and checked."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from era.addresses import check_nothing_fetched, check_nothing_run, is_hub
from era.checkpoint.hub import CLASSES, hub_file
from era.checkpoint.reading import misfits
from era.config import check_parts, load_config, student_config, validate_config
from era.data.datasets import register_from_config
from era.deploy.model import EagerBackend, PaddedEagerBackend, WholeCheckpointer
from era.engine.preflight import teacher_record
from era.errors import UserError
from era.modeling.class_map import read_names
from era.modeling.detectors import detector_of, family_of
from era.modeling.distiller import Distiller
from era.registry import set_alpha
from era_runtime import Predictor
from era_runtime.preprocess import InputRules

ALPHAS = (0, 1)


@dataclass
class Source:
    """A trained detector and what its deployment needs to know.

    Attributes:
        cfg: the run's config, on the CPU.
        config_file, weights, opts: where it came from, as the user named it.
        alpha: 0 or 1.
        eager: the reference that an export is compared with: the student, or the distiller at alpha 1.
        model: what is exported, an ordinary model of a family; at alpha 0 the same object as ``eager``.
        categories: ``[{"id", "name"}, ...]`` in the order of the class indices.
    """

    cfg: CfgNode
    config_file: str
    weights: str
    opts: list[str]
    alpha: int
    eager: nn.Module
    model: nn.Module
    categories: list[dict]

    @property
    def rules(self) -> InputRules:
        """How images are scaled for it."""
        size = self.cfg.INPUT
        return InputRules(size.MIN_SIZE_TEST, size.MAX_SIZE_TEST, size.FORMAT)

    def predictor(self, batch_size: int = 1) -> Predictor:
        """Eager inference behind the interface of all deployed models."""
        return Predictor(
            EagerBackend(self.eager), self.rules, self.categories, batch_size=batch_size
        )

    def padded_predictor(self, shape: tuple[int, int]) -> Predictor:
        """Eager inference of ``model`` on pictures padded to one shape (height, width), pixels."""
        return Predictor(
            PaddedEagerBackend(self.model, shape),
            replace(self.rules, shape=shape),
            self.categories,
        )

    @property
    def student(self) -> nn.Module:
        """The plain student within ``eager``."""
        return self.eager.student if isinstance(self.eager, Distiller) else self.eager

    def with_score_threshold(self, threshold: float) -> Source:
        """A copy that gives only detections with a higher score than ``threshold``."""
        eager, model = copy.deepcopy((self.eager, self.model))
        changed = replace(self, eager=eager, model=model)
        for part in (changed.student, changed.model):
            detector_of(part).set_score_threshold(threshold)
        return changed


def load_source(
    *,
    run: str = "",
    config_file: str = "",
    weights: str = "",
    opts: Sequence[str] = (),
    recorded_opts: Sequence[str] | None = None,
    alpha: int = 0,
    classes_file: str = "",
) -> Source:
    """Read a run's folder, or a config file and a checkpoint, and build the models on the CPU.

    Args:
        run: ``OUTPUT_DIR`` of a distilled or plain run; its ``config.yaml`` and last checkpoint are read.
            ``weights`` may name another checkpoint.
        config_file, weights: instead of ``run``: any student's; a distilled checkpoint for alpha 1.
        opts: overrides of the config, ``[KEY, VALUE, ...]``.
        recorded_opts: overrides before these, out of a manifest; then that manifest, and not the user,
            names the config and the weights. Neither it nor a run's folder causes a download.
        alpha: 0 = the plain student, no teacher is needed; 1 = the teacher's heads, as the run's method
            uses them.
        classes_file: class names, one a line; "" = those of the config's datasets.

    Raises:
        UserError: one sentence for whatever is wrong first.
    """
    if alpha not in ALPHAS:
        raise UserError(
            f"alpha is {alpha}: a deployed model has alpha 0 (plain student) or 1 (teacher's heads)."
        )
    if bool(run) == bool(config_file):
        raise UserError("give either --run OUTPUT_DIR or --config-file with --weights.")
    if run:
        config_file = os.path.join(run, "config.yaml")
        if not os.path.isfile(config_file):
            raise UserError(
                f"{run} holds no config.yaml: expected the OUTPUT_DIR of a training run."
            )
        weights = weights or last_checkpoint(run)
    if is_hub(config_file) and not classes_file:
        classes_file = hub_file(config_file, CLASSES, what="--config-file")
    if not weights:
        raise UserError("--weights is missing: name the checkpoint that belongs to --config-file.")
    typed, opts = opts, [*(recorded_opts or ()), *opts]
    cfg = load_config(config_file, opts)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = weights
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: expected BGR or RGB.")
    check_parts(cfg)
    if run or recorded_opts is not None:
        check_nothing_run(cfg, typed, source=config_file, teacher=alpha == 1)
    if alpha == 1:
        if run or recorded_opts is not None:
            check_nothing_fetched(cfg, typed, source=config_file)
        set_alpha(cfg, 1.0)
        validate_config(cfg)
        eager = build_model(cfg)
    else:
        eager = build_model(student_config(cfg))
        detector_of(eager).check_student()
    load_whole(eager, weights)
    eager.eval().requires_grad_(False)
    model = eager.deployable() if alpha == 1 else eager
    categories = class_categories(cfg, classes_file)
    return Source(
        cfg, config_file, weights, [str(o) for o in opts], alpha, eager, model, categories
    )


def last_checkpoint(run: str) -> str:
    """Path of the last checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    names = ["model_final.pth"]
    marker = os.path.join(run, "last_checkpoint")
    if os.path.isfile(marker):
        with open(marker, encoding="utf-8", errors="replace") as f:
            names.insert(0, os.path.basename(f.read(4096).strip()))
    for name in names:
        if os.path.isfile(os.path.join(run, name)):
            return os.path.join(run, name)
    raise UserError(f"{run} holds no checkpoint ({names[0]}): finish the run, or name --weights.")


def load_whole(model: nn.Module, path: str) -> None:
    """Load weights that fill the whole model and hold nothing besides it.

    A distiller needs a distilled checkpoint with the weights of its methods, and its own teacher; a plain
    model takes the student out of one.

    Raises:
        UserError: unreadable, or of another architecture.
    """
    checkpointer = WholeCheckpointer(model, save_to_disk=False, **teacher_record(model))
    checkpointer.load(path)
    problems = misfits(checkpointer.incompatible)
    if isinstance(model, Distiller) and not any(
        key.startswith("methods.") for key in checkpointer.keys
    ):
        names = " and ".join(type(method).__name__ for method in model.methods.values())
        problems.insert(0, f"lacks the modules of {names}, which the run was distilled with")
    if problems:
        more = f" (and {len(problems) - 1} more keys differ)" if len(problems) > 1 else ""
        raise UserError(
            f"weights {path!r} do not fit the model of the config: the file {problems[0]}{more}; name "
            "weights of exactly this architecture or the config that they belong to."
        )


def class_categories(cfg: CfgNode, classes_file: str) -> list[dict]:
    """Names and COCO category ids of the classes, in the model's order.

    From ``classes_file`` (ids 1, 2, ...), else from the datasets that the config names.

    Raises:
        UserError: not as many names as the model has classes, or no names are known.
    """
    stock = student_config(cfg)
    family = family_of(stock)
    count = family.num_classes_in(stock)
    if classes_file:
        names = read_names(classes_file, "--classes")
        found = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    else:
        register_from_config(cfg)
        found = next(
            filter(
                None, (_dataset_categories(n) for n in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN))
            ),
            [],
        )
        if not found:
            raise UserError(
                "the class names are not known, because no dataset of the config can be asked: give them "
                "with --classes FILE, one name a line."
            )
    if len(found) != count:
        raise UserError(
            f"{len(found)} class names were found and {family.num_classes_key()} is {count}: give the "
            "names that belong to the model with --classes FILE, one name a line."
        )
    return found


def _dataset_categories(name: str) -> list[dict]:
    """Categories of a registered dataset; empty if it does not tell them."""
    if name not in DatasetCatalog:
        return []
    meta = MetadataCatalog.get(name)
    names = meta.get("thing_classes")
    if names is None and os.path.isfile(meta.get("json_file", "")):
        try:
            with open(meta.json_file, encoding="utf-8") as f:
                categories = sorted(json.load(f).get("categories", []), key=lambda c: c["id"])
            return [{"id": c["id"], "name": c["name"]} for c in categories]
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as e:
            raise UserError(
                f"{meta.json_file} of the dataset {name!r} gives no class names ({type(e).__name__}: {e}): repair it, "
                "or give them with --classes FILE, one name a line."
            ) from e
    # Without a map Detectron2 took the ids as they are; the toy data's are 1, 2, ...
    ids = {v: k for k, v in (meta.get("thing_dataset_id_to_contiguous_id") or {}).items()}
    return [{"id": ids.get(i, i + 1), "name": n} for i, n in enumerate(names or [])]
