"""What a run's result follows from, as one hash: the same in every folder and on every machine.

A run's identity is the SHA-256 of a description of

* its settings: those of Detectron2 and of the frame that differ from their default, so that a key which a later
  version adds repeats nothing; of its methods all of them, so that another default is another run, but for those
  at the value that the method calls neutral;
* its data, by what they are: a file's content, the names and sizes of a folder's pictures, or what sets that are
  made on first use are made from;
* the runs that its weights come from, by their own identities, also runs of another plan; other files that its
  config names, by content;
* its teacher's config, for a run of equal time the runs whose steps are counted, and of a run on several GPUs how
  many there are.

Left out is what names a place (``OUTPUT_DIR``, paths), how old a file is, and the code: a result notes the commit.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from era.config import get_era_cfg
from era.data import made
from era.data.datasets import register_from_config
from era.data.image_folders import folder_of, picture_files
from era.modeling.teacher_config import read_teacher_config
from era.registry import METHOD_REGISTRY, is_distiller, methods_of
from era.runs.folder import read_stamp
from era.runs.plan import FINAL, Run

# Places, what is described by its content instead, and what changes no number.
ELSEWHERE = (
    "OUTPUT_DIR",
    "DATASETS.COCO_FORMAT",
    "DATASETS.IMAGE_FOLDERS",
    "MODEL.TEACHER.CONFIG_FILE",
    "MODEL.TEACHER.OPTS",
    # What a LazyConfig says of the model is in MODEL.LAZY.SHA256.
    "MODEL.TEACHER.TRUST_PYTHON_CONFIG",
    "MODEL.LAZY.CONFIG_FILE",
    "MODEL.LAZY.OPTS",
    "MODEL.LAZY.TRUST",
    # Exact unless CACHE_DTYPE says otherwise, which counts.
    "MODEL.TEACHER.CACHE",
    "MODEL.TEACHER.CACHE_GIB",
    # Whether a run is stopped or warned of, not what it computes.
    "SOLVER.MAX_LOSS",
    "MODEL.DISTILLER.MAX_TASK_RATIO",
    # Where its scalars are sent.
    "TRACKING.WRITERS",
    "TRACKING.PROJECT",
    "TRACKING.NAME",
)


def identities(runs: Sequence[Run]) -> dict[str, str]:
    """The identity of every run, by name.

    Args:
        runs: each after those that it depends on.

    Raises:
        UserError: a teacher's config that cannot be read.
    """
    found: dict[str, str] = {}
    for run in runs:
        text = json.dumps(describe(run, found), sort_keys=True)
        found[run.name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def describe(run: Run, known: Mapping[str, str]) -> dict[str, Any]:
    """What a run's result follows from, in plain values.

    Args:
        known: identities of the runs that it depends on, by name.
    """
    cfg = run.config
    register_from_config(cfg)
    own = settings(cfg)
    weights = {key: known[source] for key, source in run.weights}
    weights |= {
        key: found
        for key, value in own.items()
        if key not in weights and (found := _made_by(value))
    }
    for key in (*weights, *(("SOLVER.MAX_ITER",) if run.time_of else ())):
        own.pop(key, None)
    teacher = cfg.MODEL.TEACHER if is_distiller(cfg) else None
    several = {"num_gpus": run.num_gpus} if run.num_gpus > 1 else {}
    return {
        **several,
        "evaluates": run.evaluates is not None,
        "settings": {key: _by_content(value) for key, value in own.items()},
        "weights": weights,
        "teacher": settings(read_teacher_config(teacher)) if teacher else None,
        "data": {name: content(name) for name in _datasets(cfg)},
        "equal_time": [[known[name] for name in names] for names in (run.time_of, run.step_of)],
    }


def settings(cfg: CfgNode) -> dict[str, Any]:
    """Values by dotted key that a run's result may follow from, see the head of this file."""
    methods = {f"MODEL.{method.upper()}" for method in methods_of(cfg)}
    unused = {f"MODEL.{name.upper()}" for name, _ in METHOD_REGISTRY} - methods
    if not is_distiller(cfg):
        unused |= {"MODEL.DISTILLER", "MODEL.TEACHER"}
    neutral = {k: v for method in methods_of(cfg).values() for k, v in method.neutral.items()}
    defaults = _defaults()
    found = {}
    for key, value in _leaves(cfg):
        part = ".".join(key.split(".")[:2])
        if key in ELSEWHERE or part in unused or (key in neutral and value == neutral[key]):
            continue
        if part in methods or key not in defaults or value != defaults[key]:
            found[key] = value
    return found


def content(dataset: str) -> Any:
    """What a registered dataset holds, in plain values; None where nothing is known of it."""
    if (found := made.origin(dataset)) is not None:
        return found
    if dataset not in DatasetCatalog:
        return None
    folder = folder_of(dataset)
    if folder is not None:
        return {entry.name: entry.stat().st_size for entry in picture_files(dataset, folder)}
    return file_sha256(MetadataCatalog.get(dataset).get("json_file") or "")


def file_sha256(path: str) -> str | None:
    """SHA-256 of a file's content, None if there is no such file; an unchanged file is read once."""
    if not os.path.isfile(path):
        return None
    stat = os.stat(path)
    return _sha256_of(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256_of(path: str, _size: int, _mtime: int) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _made_by(value: Any) -> str | None:
    """The identity of the complete run whose last checkpoint a path names, such as another study's teacher."""
    path = Path(value) if isinstance(value, str) else None
    if path is None or path.name != FINAL or not path.is_file():
        return None
    found = read_stamp(path.parent).get("identity")
    return found if isinstance(found, str) else None


def _by_content(value: Any) -> Any:
    """A text that is the path of a file is what that file holds."""
    found = file_sha256(value) if isinstance(value, str) and value else None
    return value if found is None else {"sha256": found}


def _datasets(cfg: CfgNode) -> list[str]:
    """Registered names below DATASETS."""
    lists = [value for value in cfg.DATASETS.values() if isinstance(value, (tuple, list))]
    names = {name for values in lists for name in values if isinstance(name, str)}
    return sorted(name for name in names if name in DatasetCatalog)


def _leaves(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    return dict(_leaves(get_era_cfg()))
