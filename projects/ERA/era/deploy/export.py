"""Exporting: write a folder, prove that it computes what eager computes, only then let it appear."""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from era.checkpoint.writing import check_new_folder, folder_whole
from era.deploy import parity
from era.deploy.formats import FORMATS, OPSET, RUNTIMES, check_format, outputs_of, write_model
from era.deploy.model import refuse_keypoints
from era.deploy.source import ALPHAS, Source, load_source
from era.environment import versions
from era.errors import UserError
from era.modeling.detectors import detector_of
from era_runtime import DeploymentError, Predictor, load, read_image
from era_runtime.inputs import image_files
from era_runtime.manifest import CLASSES, FORMAT_VERSION, MANIFEST, PARITY, sha256_file
from era_runtime.preprocess import preprocess

logger = logging.getLogger(__name__)

MAX_CALIBRATION = 200  # images; more change the ranges little and take long
OUTPUTS = {
    "boxes": "(n, 4) float32, x0, y0, x1, y1 in pixels of the input",
    "scores": "(n,) float32",
    "classes": f"(n,) int64, index into {CLASSES}",
    "masks": "(n, M, M) float32, probabilities on M x M cells of each box",
}

EPILOG = """
examples:
  the plain student:     %(prog)s --run output/run --format onnx --output deployed
  the teacher's heads:   %(prog)s --run output/run --format openvino --alpha 1 --output deployed
  any student:           %(prog)s --config-file c.yaml --weights w.pth --format torchscript --output d
  int8:                  %(prog)s --run ... --format onnx --int8 --calibrate photos/ --output deployed

--opts overrides the config, such as --opts INPUT.MIN_SIZE_TEST 640.
Then: tools/evaluate.py (AP beside eager), tools/predict.py (images, folders, videos).
"""


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a trained detector, shared by the tools."""
    parser.add_argument("--run", default="", metavar="DIR", help="OUTPUT_DIR of a run")
    parser.add_argument("--config-file", default="", metavar="FILE", help="instead of --run")
    parser.add_argument("--weights", default="", metavar="FILE", help="checkpoint of --config-file")
    parser.add_argument("--classes", default="", metavar="FILE",
                        help="class names, one a line; default: those of the config's dataset")  # fmt: skip
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="config overrides"
    )


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of ``tools/export.py``."""
    parser = argparse.ArgumentParser(
        description="Export a trained student into a deployment folder, after proving parity.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument("--output", required=True, metavar="DIR", help="must be absent or empty")
    parser.add_argument("--alpha", type=int, default=0, help="0: plain student; 1: teacher's heads")
    parser.add_argument("--int8", action="store_true", help="onnx: the backbone in int8")
    parser.add_argument("--calibrate", nargs="+", default=[], metavar="PATH",
                        help="images, folders or globs for --int8")  # fmt: skip
    parser.add_argument("--parity-images", nargs="+", default=[], metavar="PATH",
                        help="images with objects for the comparison; default: generated ones")  # fmt: skip
    parser.add_argument(
        "--box-tolerance", type=float, default=parity.Tolerance.box, metavar="PIXELS"
    )
    parser.add_argument("--score-tolerance", type=float, default=parity.Tolerance.score)
    parser.add_argument("--mask-tolerance", type=float, default=parity.Tolerance.mask)
    add_source_arguments(parser)
    return parser


def export_main(argv: Sequence[str] | None = None) -> None:
    """``tools/export.py``.

    Raises:
        UserError: one sentence for a user's mistake, or for an export that is not right.
    """
    args = argument_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    check_request(args.format, args.output, args.alpha, args.int8, args.calibrate)
    source = load_source(
        run=args.run,
        config_file=args.config_file,
        weights=args.weights,
        opts=args.opts,
        alpha=args.alpha,
        classes_file=args.classes,
    )
    report = export(
        source,
        args.format,
        args.output,
        calibration=read_images(args.calibrate, "--calibrate", MAX_CALIBRATION),
        parity_images=read_images(args.parity_images, "--parity-images", len(parity.ASPECTS)),
        tolerance=parity.INT8
        if args.int8
        else parity.Tolerance(args.box_tolerance, args.score_tolerance, args.mask_tolerance),
    )
    verdict = "int8, to be judged by AP (tools/evaluate.py); close" if args.int8 else "equal"
    print(
        f"{args.output}: {args.format}, alpha {args.alpha}; {verdict} to eager on "
        f"{report.summary()}"
    )


def check_request(name: str, output: str, alpha: int, int8: bool, calibrate: Sequence[str]) -> None:
    """All that can be judged before a model is built.

    Raises:
        UserError: unknown format or alpha, a package that is missing, a folder that is not empty.
    """
    check_format(name, int8=int8)
    if alpha not in ALPHAS:
        raise UserError(f"--alpha is {alpha}: expected 0 (plain student) or 1 (teacher's heads).")
    if int8 != bool(calibrate):
        raise UserError(
            "--int8 and --calibrate belong together: int8 learns its ranges from images of your own; "
            "give both or neither."
        )
    check_new_folder(output)


def read_images(paths: Sequence[str], flag: str, most: int) -> list[np.ndarray]:
    """The pictures that a flag names, spread evenly if there are more than ``most``.

    Raises:
        UserError: none there, or one that cannot be read.
    """
    if not paths:
        return []
    try:
        files = image_files(paths)
        files = [files[i * len(files) // most] for i in range(most)] if len(files) > most else files
        return [read_image(file) for file in files]
    except DeploymentError as e:
        raise UserError(f"{flag}: {e}") from e


def export(
    source: Source,
    name: str,
    output: str,
    *,
    calibration: Sequence[np.ndarray] = (),
    parity_images: Sequence[np.ndarray] = (),
    tolerance: parity.Tolerance | None = None,
) -> parity.Report:
    """Write a deployment folder and check it against eager; it appears under its name only if right.

    Args:
        source: what is exported.
        name: of the format.
        output: absent or empty folder.
        calibration: images for int8 (ONNX), (H, W, 3) uint8 BGR; none = float32.
        parity_images: pictures with objects; none = generated ones.

    Raises:
        UserError: the request is wrong, or the exported model differs from eager. Nothing is left.
    """
    check_request(name, output, source.alpha, bool(calibration), ["given"] if calibration else [])
    if name != "detectron2":
        refuse_keypoints(detector_of(source.model), name)
    tolerance = tolerance or (parity.INT8 if calibration else parity.Tolerance())
    with folder_whole(output) as folder:
        report = _write_and_compare(source, name, folder, calibration, parity_images, tolerance)
        if report.problems:
            raise UserError(
                f"the exported {name} model differs from eager: {report.problems[0]}"
                + (f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else "")
                + "; nothing was kept."
            )
    return report


def _write_and_compare(
    source: Source,
    name: str,
    folder: Path,
    calibration: Sequence[np.ndarray],
    parity_images: Sequence[np.ndarray],
    tolerance: parity.Tolerance,
) -> parity.Report:
    settings = detector_of(source.model).thresholds
    images = parity.sample_images(source.rules, parity_images)
    example = preprocess(images[-1], source.rules)
    ranges = [preprocess(image, source.rules) for image in calibration]

    def write(what: Source, where: Path) -> Predictor:
        write_model(what, name, where, example, ranges)
        (where / CLASSES).write_text(json.dumps(what.categories, indent=1, ensure_ascii=False))
        write_manifest(what, name, where, bool(calibration))
        return load(where)

    exported, eager = write(source, folder), source.predictor()
    blank = next((b for b in parity.blank_images(source.rules) if len(eager(b)) == 0), None)
    report = parity.compare(
        eager,
        exported,
        images if blank is None else [*images, blank],
        tolerance=tolerance,
        score_threshold=settings["score_threshold"],
        max_detections=settings["max_detections"],
    )
    report.empty_checked = "image"
    if blank is None:  # eager finds something everywhere: forbid it by the threshold
        report.empty_checked = "threshold"
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".empty.") as other:
            found = len(write(source.with_score_threshold(1.0), Path(other))(images[0]))
        if found:
            report.problems.append(f"without any detection, {found} rows are returned")
    (folder / PARITY).write_text(json.dumps(report.as_dict(), indent=1))
    write_manifest(source, name, folder, bool(calibration))
    return report


def write_manifest(source: Source, name: str, folder: Path, int8: bool) -> None:
    """Write ``manifest.json`` over all other files of the folder; docs/deployment.md explains it."""
    detector = detector_of(source.model)
    order = source.rules.channel_order
    manifest = {
        "format_version": FORMAT_VERSION,
        "format": name,
        "alpha": source.alpha,
        "precision": "int8 backbone, float32 heads" if int8 else "float32",
        "input": {
            "min_size": source.rules.min_size,
            "max_size": source.rules.max_size,
            "resize": "shorter edge to min_size, longer at most max_size; Pillow bilinear on uint8",
            "channel_order": order,
            "layout": "(3, height, width) float32, 0 to 255",
            "size_divisibility": source.model.backbone.size_divisibility,
            "inside_the_model": "normalisation with mean and std, padding to size_divisibility",
            "mean": source.model.pixel_mean.flatten().tolist(),
            "std": source.model.pixel_std.flatten().tolist(),
        },
        "outputs": {output: OUTPUTS[output] for output in outputs_of(source.model)},
        **detector.thresholds,
        "num_classes": len(source.categories),
        "max_batch": None if name == "detectron2" else 1,
        **({"opset": OPSET} if name in ("onnx", "openvino") else {}),
        "source": {
            "config_file": source.config_file,
            "opts": source.opts,
            "weights": source.weights,
            "weights_sha256": sha256_file(source.weights)
            if os.path.isfile(source.weights)
            else None,
            "teacher": dict(source.eager.teacher.source) | {"sha256": source.eager.teacher.sha256}
            if source.alpha == 1
            else None,
        },
        "versions": versions(*RUNTIMES[name]),
        "files": {
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            for path in sorted(folder.iterdir())
            if path.name != MANIFEST
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")

