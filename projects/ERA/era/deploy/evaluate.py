"""Judging deployment folders: COCO AP and latency, each through its own runtime, beside eager."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from era.addresses import is_remote
from era.config import find_config_file, load_config
from era.data import made
from era.data.coco_ap import METRICS, coco_metrics
from era.data.datasets import register_from_config
from era.deploy.export import add_source_arguments
from era.deploy.parity import sample_images
from era.deploy.source import load_source
from era.errors import UserError
from era_runtime import DeploymentError, Predictor, load, read_image
from era_runtime.manifest import sha256_file
from era_runtime.results import coco_results

EAGER = "eager"
KINDS = {"bbox": "boxes", "segm": "masks"}  # COCO's name and the reader's

EPILOG = """
examples:
  %(prog)s deployed                                  AP on the test set of the config, beside eager
  %(prog)s onnx openvino --latency 50                several folders, and their latency
  %(prog)s deployed --annotations a.json --images d  AP on a dataset of your own
  %(prog)s deployed --run output/run             eager from this run, wherever the folder came from

Without --run or --config-file, eager is the checkpoint that the first folder's manifest names, if it is
still there and still the same.
"""


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of ``tools/evaluate.py``."""
    parser = argparse.ArgumentParser(
        description="COCO AP and latency of deployment folders, beside eager.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="made by tools/export.py")
    parser.add_argument("--dataset", default="", help="a registered dataset, such as coco_2017_val")
    parser.add_argument("--annotations", default="", metavar="FILE", help="COCO-format annotations")
    parser.add_argument("--images", default="", metavar="DIR", help="image folder of --annotations")
    parser.add_argument("--limit", type=int, default=0, help="only the first images; 0 = all")
    parser.add_argument("--latency", type=int, default=0, metavar="N",
                        help="measure N runs of each, batch 1, one thread")  # fmt: skip
    parser.add_argument("--no-ap", action="store_true", help="latency alone")
    parser.add_argument("--max-drop", type=float, default=None, metavar="AP",
                        help="exit status 1 if a folder's AP is lower than eager's by more")  # fmt: skip
    add_source_arguments(parser)
    return parser


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """``tools/evaluate.py``; returns the exit status.

    Raises:
        UserError: one sentence for a user's mistake.
    """
    args = argument_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if args.no_ap and not args.latency:
        raise UserError("--no-ap leaves nothing to do without --latency N: give that as well.")
    threads = 1 if args.latency else None
    try:
        predictors = {folder: load(folder, num_threads=threads) for folder in args.folders}
        manifest = predictors[args.folders[0]].manifest
        eager = eager_predictor(args, manifest)
        if eager is not None:
            predictors = {EAGER: eager, **predictors}
        status = 0
        if not args.no_ap:
            annotations, images = find_dataset(args, manifest)
            scores = {
                name: coco_ap(predictor, annotations, images, limit=args.limit)
                for name, predictor in predictors.items()
            }
            print_ap(scores)
            if args.max_drop is not None:
                status = int(has_dropped(scores, args.max_drop))
        if args.latency:
            print_latency(latency(predictors, repeats=args.latency))
    except DeploymentError as e:
        raise UserError(str(e)) from e
    return status


def eager_predictor(args: argparse.Namespace, manifest: dict) -> Predictor | None:
    """Eager from the arguments, else from the manifest's source; None if that is no longer there.

    Raises:
        UserError: the arguments name something that cannot be loaded.
    """
    given = {"run": args.run, "config_file": args.config_file, "weights": args.weights}
    opts, recorded_opts = list(args.opts), None
    if not any(given.values()):
        source = manifest.get("source", {})
        given = {key: str(source.get(key)) for key in ("config_file", "weights")}
        recorded_opts = source.get("opts", [])
        if not _is_unchanged(given["config_file"], given["weights"], source.get("weights_sha256")):
            print(
                f"no eager beside it: {given['weights']} or its config is gone or has changed since the "
                "export (name them with --run or --config-file and --weights)",
                file=sys.stderr,
            )
            return None
    # What the export was made with counts, whatever the run's config says now.
    opts += ["INPUT.MIN_SIZE_TEST", manifest["input"]["min_size"]]
    opts += ["INPUT.MAX_SIZE_TEST", manifest["input"]["max_size"]]
    source = load_source(
        **given,
        opts=opts,
        recorded_opts=recorded_opts,
        alpha=manifest["alpha"],
        classes_file=args.classes,
    )
    return source.with_score_threshold(manifest["score_threshold"]).predictor()


def _is_unchanged(config_file: str, weights: str, sha256: str | None) -> bool:
    try:
        find_config_file(config_file, what="the manifest's source")
    except UserError:
        return False
    return not is_remote(weights) and os.path.isfile(weights) and sha256_file(weights) == sha256


def find_dataset(args: argparse.Namespace, manifest: dict) -> tuple[str, str]:
    """Annotation file and image folder of what is evaluated on.

    Raises:
        UserError: none is named or known, or its files are not there.
    """
    if bool(args.annotations) != bool(args.images):
        raise UserError("--annotations and --images belong together: give both or neither.")
    if args.annotations:
        found = args.annotations, args.images
    else:
        name = args.dataset
        config = args.config_file or (os.path.join(args.run, "config.yaml") if args.run else "")
        opts = list(args.opts)
        if not config:
            config = str(manifest.get("source", {}).get("config_file"))
            opts = [*manifest.get("source", {}).get("opts", []), *opts]
        with contextlib.suppress(UserError):  # no config: --dataset may name one that is built in
            cfg = load_config(find_config_file(config, what="--config-file"), opts)
            register_from_config(cfg)
            name = name or next(iter(cfg.DATASETS.TEST), "")
        if name not in DatasetCatalog:
            raise UserError(
                f"the dataset {name!r} is not known: name one with --dataset, or give --annotations and "
                "--images."
            )
        made.prepare(name)
        meta = MetadataCatalog.get(name)
        found = meta.get("json_file", ""), meta.get("image_root", "")
    for path, there in zip(found, (os.path.isfile, os.path.isdir), strict=True):
        if not there(path):
            raise UserError(f"the dataset's {path!r} is not there: correct the path.")
    return found


def coco_ap(
    predictor: Predictor, annotations: str, image_root: str, *, limit: int = 0
) -> dict[str, dict[str, float]]:
    """COCO metrics, in points of 100, of a predictor on a dataset.

    Args:
        limit: only the first images by id; 0 = all.

    Returns:
        As :func:`era.data.coco_ap.coco_metrics`, under "bbox" and, if predictor and annotations have masks,
        "segm"; nan for the sizes that the images have no object of.

    Raises:
        UserError: the annotations have none of the predictor's classes.
        DeploymentError: an image cannot be read.
    """
    with open(annotations, encoding="utf-8") as f:
        truth = json.load(f)
    images = sorted(truth["images"], key=lambda image: image["id"])[: limit or None]
    wanted = {c["id"]: c["name"] for c in predictor.categories}
    known = {c["id"]: c["name"] for c in truth.get("categories", [])}
    if wanted != known:
        different = sorted(set(wanted.items()) ^ set(known.items()))[0]
        raise UserError(
            f"the classes of {annotations} are not the model's (category {different[0]}, {different[1]!r}, "
            "is in one of both only): evaluate on data with the same classes and category ids."
        )
    has_masks = all("segmentation" in a for a in truth["annotations"])
    results, kinds = [], {"bbox"}
    for image in images:
        found = predictor(read_image(os.path.join(image_root, image["file_name"])))
        results += coco_results(found, image["id"], predictor.categories)
        if found.masks is not None and has_masks:
            kinds.add("segm")
    ids = [image["id"] for image in images]
    none = dict.fromkeys(METRICS, math.nan)
    return {
        kind: none | coco_metrics(annotations, results, iou_type=kind, image_ids=ids)
        for kind in sorted(kinds)
    }


def print_ap(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """A table of metrics for boxes and one for masks, and the difference to eager in AP.

    Args:
        scores: :func:`coco_ap` of each predictor by its name.
    """
    width = max(map(len, (*scores, *KINDS.values())))
    for kind, title in KINDS.items():
        rows = {name: row[kind] for name, row in scores.items() if kind in row}
        if not rows:
            continue
        print(" ".join([f"{title:{width}}", *(f"{m:>6}" for m in METRICS), "AP - eager"]))
        for name, row in rows.items():
            cells = [f"{name:{width}}", *(f"{row[m]:6.2f}" for m in METRICS)]
            if EAGER in rows and name != EAGER:
                cells.append(f"{row['AP'] - rows[EAGER]['AP']:+10.2f}")
            print(" ".join(cells))


def has_dropped(scores: Mapping[str, Mapping[str, Mapping[str, float]]], most: float) -> bool:
    """Whether a folder's AP of boxes or of masks is below eager's by more than ``most``.

    Raises:
        UserError: there is no eager to compare with.
    """
    if EAGER not in scores:
        raise UserError(
            "--max-drop needs eager: name it with --run or --config-file and --weights."
        )
    return any(
        of_eager["AP"] - row[kind]["AP"] > most
        for row in scores.values()
        for kind, of_eager in scores[EAGER].items()
        if kind in row
    )


def latency(predictors: Mapping[str, Predictor], *, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` calls of each predictor, one image, scaling included.

    The predictors take turns, so that a change of the machine's load meets all of them. Torch is set to
    one thread for the process; the folders must have been loaded with one.
    """
    torch.set_num_threads(1)
    rules = next(iter(predictors.values())).rules
    image = sample_images(rules)[1]  # 3:4, with objects
    for predictor in predictors.values():
        for _ in range(3):  # runtimes allocate and compile in their first calls
            predictor(image)
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(repeats):
        for name, predictor in predictors.items():
            start = time.perf_counter()
            predictor(image)
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def print_latency(times: Mapping[str, Sequence[float]]) -> None:
    """Median and quartiles in milliseconds, and the ratio of the medians to the first row's."""
    width = max(map(len, times))
    first = statistics.median(next(iter(times.values())))
    print(f"{'':{width}} median ms (quartiles)  ratio; batch 1, one thread")
    for name, values in times.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        print(f"{name:{width}} {middle:9.2f} ({low:.2f} to {high:.2f})  {middle / first:.2f}")
