"""Exporting: write a folder, prove that it computes what eager computes, only then let it appear."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from era.checkpoint.writing import check_new_folder, folder_whole
from era.deploy import parity
from era.deploy.batched import BatchForm, parse_form
from era.deploy.describe import README, readme, write_manifest
from era.deploy.formats import FORMATS, check_format, write_model
from era.deploy.model import refuse_keypoints
from era.deploy.source import ALPHAS, Source, load_source
from era.deploy.tensorrt import BUILD_COMMAND
from era.errors import UserError
from era.modeling.detectors import detector_of
from era_runtime import DeploymentError, Predictor, load, read_image
from era_runtime.inputs import image_files
from era_runtime.manifest import CLASSES, PARITY
from era_runtime.preprocess import preprocess

logger = logging.getLogger(__name__)

MAX_CALIBRATION = 200  # images; more change the ranges little and take long
EPILOG = """
examples:
  the plain student:     %(prog)s --run output/run --format onnx --output deployed
  the teacher's heads:   %(prog)s --run output/run --format openvino --alpha 1 --output deployed
  any student:           %(prog)s --config-file c.yaml --weights w.pth --format torchscript --output d
  batches of any size:   %(prog)s --run ... --format onnx --batch any --output deployed
  for TensorRT:          %(prog)s --run ... --format onnx --shape 800x1344 --batch 4 --output deployed
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
    parser.add_argument("--batch", default="", metavar="N",
                        help="onnx, openvino: 'any' number of pictures a call, of any size; with --shape exactly N (default 1)")  # fmt: skip
    parser.add_argument("--shape", default="", metavar="HxW",
                        help="onnx: this input shape alone and no shape that depends on the data, for TensorRT")  # fmt: skip
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
    form = parse_form(args.batch, args.shape)
    check_request(args.format, args.output, args.alpha, args.int8, args.calibrate, form)
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
        form=form,
    )
    verdict = "int8, to be judged by AP (tools/evaluate.py); close" if args.int8 else "equal"
    print(
        f"{args.output}: {args.format}, alpha {args.alpha}; {verdict} to eager on "
        f"{report.summary()}"
    )
    if form is not None and form.shape is not None:
        print(f"the engine is built by (unmeasured, see {README}): {BUILD_COMMAND}")


def check_request(
    name: str,
    output: str,
    alpha: int,
    int8: bool,
    calibrate: Sequence[str],
    form: BatchForm | None = None,
) -> None:
    """All that can be judged before a model is built.

    Raises:
        UserError: unknown format or alpha, a package that is missing, a folder that is not empty.
    """
    check_format(name, int8=int8, form=form)
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
    form: BatchForm | None = None,
) -> parity.Report:
    """Write a deployment folder and check it against eager; it appears under its name only if right.

    Args:
        source: what is exported.
        name: of the format.
        output: absent or empty folder.
        calibration: images for int8 (ONNX), (H, W, 3) uint8 BGR; none = float32.
        parity_images: pictures with objects; none = generated ones.
        form: of a graph over batches; None = one picture a call.

    Raises:
        UserError: the request is wrong, or the exported model differs from eager. Nothing is left.
    """
    given = ["given"] if calibration else []
    check_request(name, output, source.alpha, bool(calibration), given, form)
    if name != "detectron2":
        refuse_keypoints(detector_of(source.model), name)
    tolerance = tolerance or (parity.INT8 if calibration else parity.Tolerance())
    with folder_whole(output) as folder:
        report = _write_and_compare(
            source, name, folder, calibration, parity_images, tolerance, form
        )
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
    form: BatchForm | None,
) -> parity.Report:
    settings = detector_of(source.model).thresholds
    is_fixed = form is not None and form.shape is not None
    images = parity.sample_images(source.rules, parity_images)
    example = preprocess(images[-1], source.rules)
    ranges = [preprocess(image, source.rules) for image in calibration]

    def write(what: Source, where: Path) -> Predictor:
        write_model(what, name, where, example, ranges, form)
        (where / CLASSES).write_text(json.dumps(what.categories, indent=1, ensure_ascii=False))
        if is_fixed:
            (where / README).write_text(readme(form), encoding="utf-8")
        write_manifest(what, name, where, bool(calibration), form)
        return load(where)

    exported = write(source, folder)
    eager = source.padded_predictor(form.shape) if is_fixed else source.predictor()
    blank = next((b for b in parity.blank_images(source.rules) if len(eager(b)) == 0), None)
    report = parity.compare(
        eager,
        exported,
        parity.calls_of(images, blank, form.batch if form else 1),
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
    write_manifest(source, name, folder, bool(calibration), form)
    return report
