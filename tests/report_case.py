"""Hand-made runs for the tests of the report: pictures are drawn, metrics and detections made by hand."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from era.config import load_config
from era.report import write_report
from era.runs import reading
from era_runtime.manifest import sha256_file

ROOT = Path(__file__).resolve().parent.parent
EVIL = "<script>alert(1)</script>"
CLASSES = ("disk", EVIL)  # category ids 3 and 7
IDS = (3, 7)


def make_dataset(folder: Path, name: str) -> list:
    """Six pictures of two squares each, with masks; returns the triple for DATASETS.COCO_FORMAT."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, 7):
        picture = Image.new("RGB", (160, 120), (40 * i, 90, 120))
        for k, x in enumerate((10, 90)):
            y = 20 + 5 * i
            ImageDraw.Draw(picture).rectangle((x, y, x + 40, y + 40), fill=(250, 200, 90))
            ids = {"id": len(annotations) + 1, "image_id": i, "category_id": IDS[k]}
            shape = {"bbox": [x, y, 40, 40], "area": 1600, "iscrowd": 0}
            shape["segmentation"] = [[x, y, x + 40, y, x + 40, y + 40, x, y + 40]]
            annotations.append({**ids, **shape})
        picture.save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 160, "height": 120})
    categories = [{"id": i, "name": c} for i, c in zip(IDS, CLASSES, strict=True)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(data))
    return [name, str(folder / "val.json"), str(folder / "images")]


def rle(box: list[float]) -> dict:
    """A ring that fills a box in a picture, as Detectron2 writes masks."""
    x, y, w, h = map(int, box)
    pixels = np.zeros((120, 160), np.uint8)
    pixels[y : y + h, x : x + w] = 1
    pixels[y + h // 3 : y + h // 2, x + w // 3 : x + w // 2] = 0
    found = coco_mask.encode(np.asfortranarray(pixels))
    return {"size": found["size"], "counts": found["counts"].decode()}


def found(folder: Path, count, *, masks: bool = False) -> list[dict]:
    """Detections: of image i the first ``count(i)`` objects, and one low-scored mistake each."""
    data = json.loads((folder / "val.json").read_text())
    made = []
    for i in range(1, 7):
        own = [a for a in data["annotations"] if a["image_id"] == i]
        for a in own[: count(i)]:
            made.append({k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9})
        wrong = {"image_id": i, "category_id": 7, "bbox": [60.0, 2.0, 20.0, 20.0], "score": 0.3}
        made.append(wrong)
    return [d | {"segmentation": rle(d["bbox"])} for d in made] if masks else made


def make_run(
    folder: Path,
    config: str,
    triple: list,
    detections: list[dict],
    ap: float,
    opts: tuple = (),
    scalars: tuple[str, ...] = ("loss_era_feature",),
) -> Path:
    """An OUTPUT_DIR after training.

    Args:
        config: of configs/toy.
        opts: more overrides of it.
        scalars: what a distilled run recorded beside its own losses.
    """
    opts = ["DATASETS.COCO_FORMAT", [triple], "DATASETS.TEST", (triple[0],), *opts]
    opts += ["OUTPUT_DIR", str(folder), "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    cfg = load_config(str(ROOT / "configs/toy" / f"{config}.yaml"), opts)
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / reading.RESULTS).write_text(json.dumps(detections))
    lines = []
    for i in range(19, 100, 20):
        fall = math.exp(-i / 50)
        line = {"iteration": i, "total_loss": 4 * fall, "time": 0.25}
        line |= dict.fromkeys(("loss_cls", "loss_box_reg", "loss_of_some_family"), fall)
        if "era" in config:
            line |= {name: fall * 0.7**k for k, name in enumerate(scalars)}
        lines.append(line)
    metrics = {"AP": ap, "AP50": ap + 20, "AP75": ap + 1, "APs": math.nan, "APm": ap, "APl": 3.0}
    metrics |= {"AP-disk": ap - 5, f"AP-{EVIL}": ap + 5}
    last = {"iteration": 100, **{f"bbox/{k}": v for k, v in metrics.items()}}
    if any("segmentation" in d for d in detections):
        last |= {f"segm/{k}": v - 4 for k, v in metrics.items()}
    lines.append(last)
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_runs(folder: Path, *, masks: bool = False, **options) -> dict[str, Path]:
    """Folders: plain, era (better in images 1 to 4, worse in 5 and 6), teacher."""
    data = folder / "data"
    triple = make_dataset(data, f"report_{folder.name}")

    def run(name: str, count, ap: float) -> Path:
        return make_run(folder / name, name, triple, found(data, count, masks=masks), ap, **options)

    return {
        "plain": run("plain", lambda i: int(i > 3), 29.3),
        "era": run("era", lambda i: 2 if i < 5 else 0, 45.4),
        "teacher": run("teacher", lambda i: 2, 56.3),
    }


def make_deployed(folder: Path, name: str = "onnx") -> Path:
    """A deployment folder as far as the report looks into it."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"\0" * 2_500_000)
    (folder / "classes.json").write_text("[]")
    (folder / "parity.json").write_text('{"cases": [{"box_difference": 0.004}]}')
    files = {p.name: {"sha256": sha256_file(p)} for p in folder.iterdir()}
    manifest = {"format_version": 1, "format": name, "alpha": 0, "precision": f"float32 {EVIL}"}
    manifest |= {"score_threshold": 0.05, "max_batch": 1, "files": files}
    manifest["input"] = {"min_size": 128, "max_size": 128, "channel_order": "BGR"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Page(HTMLParser):
    """The page's elements: tag and attributes, in their order; unclosed elements fail."""

    VOID = ("meta", "link", "img", "input", "path", "rect", "circle", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.found if name == tag]

    def ids(self) -> set[str]:
        return {attrs["id"] for _, attrs in self.found if "id" in attrs}


def full_report(made: dict[str, Path], path: Path) -> Path:
    folder = make_deployed(made["plain"].parent / f"exported_{path.stem}" / "onnx")
    return write_report(
        [made["plain"], made["era"]],
        path,
        teacher=made["teacher"],
        deployed=[folder],
        latency={"eager": [20.0, 21.0, 30.0], str(folder): [10.0, 10.5, 11.0]},
        notes=[f"One seed. {EVIL}"],
        title=f"A report {EVIL}",
    )
