"""What ``tools/convert_weights.py`` does: read, match, compare on a picture, only then write."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from tabulate import tabulate

from era.checkpoint.finite import check_finite
from era.checkpoint.writing import check_new_folder, folder_whole, save_whole
from era.config import check_parts, load_config, student_config
from era.convert.forward import compare_maps
from era.convert.libraries import (
    is_of_timm,
    is_of_torchvision,
    library_of,
    timm_preprocessing,
    torchvision_preprocessing,
)
from era.convert.matching import BOTTOM_UP, Matches, match
from era.convert.source import (
    CAFFE,
    TORCHVISION,
    Preprocessing,
    SourceFile,
    preprocessing_of,
    read_source,
)
from era.engine.preflight import build_model_of
from era.environment import versions
from era.errors import UserError

AUTO = "auto"
KNOWN = {"torchvision": TORCHVISION, "caffe": CAFFE}
MAX_LEFT = 0.1
WEIGHTS, CONFIG, REPORT = "model.pth", "config.yaml", "conversion.json"
SHOWN = 3  # names of a row that are printed; all are in the report

EPILOG = """
examples:
  ImageNet weights of torchvision for Detectron2's ResNet-18:
    %(prog)s --weights https://download.pytorch.org/models/resnet18-f37072fd.pth \\
        --config-file configs/plain_r18.yaml --output output/weights/r18
  weights of timm, a downloaded file:
    %(prog)s --weights model.safetensors --config-file my.yaml --output d \\
        MODEL.BACKBONE.NAME build_timm_fpn_backbone MODEL.TIMM.NAME convnext_atto
  a detector of mmdetection, heads included:
    %(prog)s --weights cascade_mask_rcnn_x101.pth --config-file configs/cascade_teacher_x101.yaml --output d

The config says which model the weights are for. Written: the checkpoint, the config with its path and the preprocessing that
its weights want, and what became of every tensor. A run then names the checkpoint in MODEL.WEIGHTS.
"""


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that fits.

    Attributes:
        matches: what became of its tensors.
        cfg: of the model, with the preprocessing that they want.
        report: of ``conversion.json``.
    """

    matches: Matches
    cfg: CfgNode
    report: dict

    def summary(self) -> str:
        """What became of the file, as a table and a sentence."""
        return summary(self.matches, self.report)

    def write(self, output: str) -> None:
        """The folder, absent or empty: whole or not at all. Raises UserError where it cannot be written."""
        _write(output, self.matches, self.cfg, self.report)


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of ``tools/convert_weights.py``."""
    parser = argparse.ArgumentParser(
        description="Checkpoints of torchvision, timm and mmdetection as checkpoints of Detectron2's models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", required=True, metavar="FILE",
                        help=".pth, .pt or .safetensors, or an address of one")  # fmt: skip
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the model")
    parser.add_argument("--output", required=True, metavar="DIR", help="must be absent or empty")
    parser.add_argument("--preprocessing", default=AUTO, choices=[AUTO, *KNOWN],
                        help="how the weights were trained: torchvision is RGB, ImageNet's mean and deviation, stride in the "
                        "3x3 conv; caffe is BGR, mean alone, stride in the 1x1 conv; auto (default) is what the library or "
                        "the file says, else torchvision")  # fmt: skip
    parser.add_argument("--max-left", type=float, default=MAX_LEFT, metavar="SHARE",
                        help="of the file's tensors, how many may find no place, 0 to 1 (default %(default)s)")  # fmt: skip
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """``tools/convert_weights.py``.

    Raises:
        UserError: one sentence for a user's mistake, or for a file that does not fit.
    """
    args = argument_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    convert(
        args.weights,
        args.config_file,
        args.output,
        args.opts,
        preprocessing=args.preprocessing,
        max_left=args.max_left,
    )


def convert(
    weights: str,
    config_file: str,
    output: str,
    opts: Sequence[str] = (),
    *,
    preprocessing: str = AUTO,
    max_left: float = MAX_LEFT,
) -> Matches:
    """Write a folder with the checkpoint, its config and the report; print the summary.

    Args:
        weights: file or address.
        output: absent or empty folder.
        opts: overrides of the config.
        preprocessing: one of :data:`KNOWN`, or :data:`AUTO`.
        max_left: of the file's tensors, how many may find no place, 0 to 1.

    Raises:
        UserError: the file does not fit, or its backbone does not compute what the library's network computes. Nothing is
            left.
    """
    if not 0 <= max_left <= 1:
        raise UserError(f"--max-left is {max_left:g}: expected a share from 0 to 1; set it so.")
    check_new_folder(output)
    source = read_source(weights)
    cfg = load_config(config_file, opts)
    check_parts(cfg)
    found = converted(source, cfg, name=weights, preprocessing=preprocessing, max_left=max_left)
    found.write(output)
    print(found.summary())
    print(f"{output}: {WEIGHTS}, {CONFIG} and {REPORT} written")
    return found.matches


def converted(
    source: SourceFile,
    cfg: CfgNode,
    *,
    name: str,
    preprocessing: str = AUTO,
    max_left: float = MAX_LEFT,
) -> Conversion:
    """What becomes of a checkpoint in a config's model, compared on a picture; nothing is written.

    Args:
        cfg: of the model; gets the preprocessing that the weights want, in place.
        name: how a message names the file.
        preprocessing, max_left: as :func:`convert`.

    Raises:
        UserError: as :func:`convert`.
    """
    known = _preprocessing(preprocessing, source.notes, cfg)
    changed = apply_preprocessing(cfg, known)
    stock = student_config(cfg)
    stock.MODEL.DEVICE = "cpu"
    model = build_model_of(stock).eval()
    library = library_of(cfg, model.backbone.bottom_up, stride_in_1x1=known.stride_in_1x1)
    what = f"--weights {name!r}"
    matches = match(source.weights, library, model, cfg, what=what)
    if matches.left_share > max_left:
        raise UserError(
            f"{what} is of another model than its config: {len(matches.left)} of "
            f"{len(matches.left) + len(matches.places)} tensors ({matches.left_share:.0%}, at most {max_left:.0%}) have no "
            f"place in it, such as {matches.left[0]}; give the config that it belongs to, or allow more with --max-left."
        )
    try:
        check_finite(matches.weights, source.path)
    except FloatingPointError as e:
        raise UserError(
            f"{what} cannot be used ({e}): nothing was written; get the file again."
        ) from e
    model.load_state_dict(matches.weights, strict=False)
    differences = compare_maps(model, library, matches.backbone, known)
    report = {
        "source": source.path,
        "network": library.name,
        "backbone_matched": matches.how,
        "preprocessing": vars(known),
        "changed_keys": changed,
        "largest_difference": differences,
        "placed": matches.places,
        "left": matches.left,
        "new": matches.new,
        "versions": versions("torch", "torchvision"),
    }
    return Conversion(matches, cfg, report)


def apply_preprocessing(cfg: CfgNode, known: Preprocessing) -> dict[str, str]:
    """Put it into a config, in place; keys whose value was another, as ``old -> new``."""
    values = {
        "INPUT.FORMAT": known.channel_order,
        "MODEL.PIXEL_MEAN": list(known.mean),
        "MODEL.PIXEL_STD": list(known.std),
    }
    if "resnet" in cfg.MODEL.BACKBONE.NAME:
        values["MODEL.RESNETS.STRIDE_IN_1X1"] = known.stride_in_1x1
    changed = {}
    for key, value in values.items():
        node, name = cfg, key
        while "." in name:
            head, name = name.split(".", 1)
            node = node[head]
        if (list(node[name]) if isinstance(value, list) else node[name]) != value:
            changed[key] = f"{node[name]} -> {value}"
            node[name] = value
    return changed


def summary(matches: Matches, report: dict) -> str:
    """What became of the file, as a table and a sentence."""
    bottom_up = sum(place.startswith(BOTTOM_UP) for _, place in matches.places)
    renamed = [f"{old} -> {new.removeprefix(BOTTOM_UP)}" for old, new in matches.renamed]
    rows = [
        ("placed", len(matches.places), f"{bottom_up} of the backbone, {matches.how}"),
        ("  renamed", len(renamed), _first(renamed)),
        ("left", len(matches.left), _first(matches.left)),
        ("not in the file", len(matches.new), _first(matches.new)),
    ]
    lines = [tabulate(rows, headers=["tensors", "", ""], tablefmt="plain")]
    lines += [f"{key} {change}" for key, change in report["changed_keys"].items()]
    largest = max(report["largest_difference"].values())
    lines.append(
        f"{', '.join(report['largest_difference'])} equal those of {report['network']} on a picture "
        f"(largest difference {largest:.1g} of a map's largest value)"
    )
    return "\n".join(lines)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _preprocessing(asked: str, notes: str, cfg: CfgNode) -> Preprocessing:
    """What was asked for, else what the file says, else what the library says of this network."""
    if asked != AUTO:
        return KNOWN[asked]
    if not notes and is_of_timm(cfg):
        return timm_preprocessing(cfg.MODEL.TIMM.NAME)
    if not notes and is_of_torchvision(cfg):
        return torchvision_preprocessing(cfg.MODEL.TORCHVISION.NAME)
    return preprocessing_of(notes)


def _write(output: str, matches: Matches, cfg: CfgNode, report: dict) -> None:
    cfg.MODEL.WEIGHTS = os.path.join(output, WEIGHTS)
    with folder_whole(output) as folder:
        save_whole({"model": matches.weights}, str(folder / WEIGHTS), with_hash=True)
        (folder / CONFIG).write_text(cfg.dump(), encoding="utf-8")
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
