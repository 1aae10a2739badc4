"""Hostile and damaged files, made anew for every run of the tests, and what a message about each must say.

Every corpus is a dict: what is wrong -> (what is written, words of the sentence). A trap is a path that nothing may
create.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ---- weights -----------------------------------------------------------------------------------------


def pickles(trap: Path) -> dict[str, tuple[bytes, str]]:
    """Contents of .pkl files, which hold weights by name."""
    array = pickle.dumps({"a": np.zeros(4, np.float32)}, 2)
    objects = array.replace(b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00O8")
    assert objects != array
    return {
        "a call of os.mkdir": (pickle.dumps({"model": Call(os.mkdir, str(trap))}), "mkdir"),
        "a call of eval": (pickle.dumps(Call(eval, f"open({str(trap)!r}, 'w')")), "eval"),
        "a call by protocol 0": (b"cos\nmkdir\n(S'" + str(trap).encode() + b"'\ntR.", "mkdir"),
        "a call through copyreg": (b"ccopyreg\n_reconstructor\n.", "copyreg"),
        "a call through numpy": (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
        "a call through torch": (b"ctorch\nload\n(S'x'\ntR.", "torch.load"),
        "an instance of a class of ours": (b"cera.config\nload_config\n(tR.", "load_config"),
        "an extension": (b"\x80\x02\x82\x01.", "extension"),
        "a reference to outside": (b"\x80\x02X\x01\x00\x00\x00xQ.", "persistent"),
        "an array of objects": (objects, "expected numbers"),
        "a number for 34 GB of memory": (b"\x80\x02Nr\xff\xff\xff\x7f.", "numbers object"),
        "a text of 2 GB that is not there": (b"\x80\x02X\xff\xff\xff\x7fabc.", "cannot be read"),
        "a length below 0": (b"T\xff\xff\xff\xffabc.", "cannot be read"),
        "an empty stack": (b"\x80\x02.", "cannot be read"),
        "no end": (pickle.dumps({"model": {}, "__author__": "x"})[:-1], "cannot be read"),
        "a protocol of the future": (b"\x80\x63N.", "cannot be read"),
        "a list": (pickle.dumps([1, 2]), "cannot be read"),
        "a number": (pickle.dumps(7), "cannot be read"),
        "an empty file": (b"", "cannot be read"),
        "noise": (bytes(range(256)) * 4, "cannot be read"),
    }


def _archive(content: bytes) -> bytes:
    """A file as torch.save makes it, around another pickle."""
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return stored.getvalue()


def checkpoints(trap: Path) -> dict[str, tuple[bytes, str]]:
    """Contents of .pth files."""
    stored = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(64, 64)}}, stored)
    whole = stored.getvalue()
    call = pickle.dumps({"model": Call(os.mkdir, str(trap))}, 2)
    return {
        "a call in an archive": (_archive(call), "cannot be (read|opened)"),
        "a call in a bare pickle": (call, "cannot be (read|opened)"),
        "a call in a TorchScript archive": (
            _archive(pickle.dumps(Call(eval, f"open({str(trap)!r}, 'w')"), 2)),
            "cannot be (read|opened)",
        ),
        "half a file": (whole[: len(whole) // 2], "cannot be (read|opened)"),
        "a list in an archive": (_archive(pickle.dumps([1], 2)), "cannot be (read|opened)"),
        "an empty archive": (_archive(b""), "cannot be (read|opened)"),
        "a page of the web": (b"<html><body>404</body></html>", "cannot be (read|opened)"),
        "zeros": (bytes(4096), "cannot be (read|opened)"),
    }


def place(**changes) -> dict:
    """What a checkpoint says of its place in the run, right but for the changes in it."""
    right = {
        "seed": 1, "metrics_written": 3, "checkpoints": ["model_0000003"],
        "scalars": {"total_loss": {"smooth": True, "values": [[1.5, 3]]}},
    }  # fmt: skip
    return {"iteration": 3, "place": right | changes}


def places() -> dict[str, dict]:
    """Places in a run, of checkpoints whose weights are right."""
    without = place()
    del without["place"]["scalars"]
    scalar = {"smooth": True, "values": [[1.5, 3]]}
    return {
        "a checkpoint outside the folder": place(checkpoints=["../model_0000003"]),
        "a checkpoint with a whole path": place(checkpoints=["/tmp/model_0000003"]),
        "a checkpoint that is no periodic one": place(checkpoints=["model_best"]),
        "a checkpoint that is a number": place(checkpoints=[3]),
        "checkpoints that are a text": place(checkpoints="model_0000003"),
        "a seed that is a text": place(seed="1"),
        "a line that is a text": place(metrics_written="3"),
        "scalars that are a list": place(scalars=[]),
        "no scalars": without,
        "a scalar without values": place(scalars={"a": {"smooth": True}}),
        "a scalar of texts": place(scalars={"a": scalar | {"values": [["x", 3]]}}),
        "a scalar of three numbers": place(scalars={"a": scalar | {"values": [[1.5, 3, 3]]}}),
        "a scalar that is a number": place(scalars={"a": 1.5}),
        "an iteration that is a text": place() | {"iteration": "3"},
        "no iteration": {"place": place()["place"]},
        "a list": place() | {"place": []},
    }


# ---- configs -----------------------------------------------------------------------------------------


def configs(trap: Path) -> dict[str, tuple[bytes, str]]:
    """Contents of config files, each called config.yaml."""
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    texts = {
        "nothing": ("", "is empty"),
        "only a comment": ("# nothing\n", "is empty"),
        "a list": ("- MODEL\n- SOLVER\n", "holds a list"),
        "a text": ("MODEL", "holds a str"),
        "a call": (f"SEED: !!python/object/apply:os.mkdir ['{trap}']", "python/object"),
        "a call of eval": ("SEED: !!python/object/apply:eval ['1']", "python/object"),
        "a module": ("SEED: !!python/module:os", "python/module"),
        "itself as its base": ("_BASE_: config.yaml", "is its own _BASE_"),
        "itself as one of its bases": ("_BASE_: [config.yaml, config.yaml]", "is its own _BASE_"),
        "a base that is a number": ("_BASE_: 7", "_BASE_"),
        "a base that is absent": ("_BASE_: none.yaml", "none.yaml"),
        "a base on the web": ("_BASE_: http://127.0.0.1:9/../../x.yaml", "local file"),
        "a base in a mapping": ("_BASE_: {a: b}", "_BASE_"),
        "proposals that are pickles": ("MODEL: {LOAD_PROPOSALS: True}", "MODEL.LOAD_PROPOSALS"),
        "an output folder on the web": ("OUTPUT_DIR: http://127.0.0.1:9/x", "OUTPUT_DIR"),
        "a section that is a number": ("MODEL: 7", "can be read"),
        "a number that is a section": ("SEED: {a: 1}", "can be read"),
        "an unknown key": ("MODEL: {ERA: {NO_SUCH: 1}}", "NO_SUCH"),
        "a version of the future": ("VERSION: 99", "can be read"),
        "a version that is a text": ("VERSION: x", "can be read"),
        "a billion values by anchors": ("\n".join(laughs), "anchors"),
        "a value that contains itself": ("SEED: &a [*a]", "anchors"),
        "brackets a thousand deep": ("SEED: " + "[" * 2000, "can be read"),
        "two megabytes": ("SEED: 1\n" + "#" * (2 << 20), "too many for a config"),
        "a tab": ("MODEL:\n\tMASK_ON: True", "can be read"),
    }
    return {name: (text.encode(), words) for name, (text, words) in texts.items()} | {
        "Latin-1": ("OUTPUT_DIR: caf\u00e9".encode("latin-1"), "can be read"),
        "zero bytes": (b"SEED: 1\0", "can be read"),
        "a binary": (bytes(range(256)), "can be read"),
    }


# ---- annotations -------------------------------------------------------------------------------------


def coco(**changes) -> dict:
    """A right COCO-format file of one picture of 40 x 30 and one object, with other entries in its annotation."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 9, 8], "area": 72,
                  "iscrowd": 0, "segmentation": [[1, 2, 10, 2, 10, 10]]}  # fmt: skip
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [annotation | changes],
        "categories": [{"id": 1, "name": "thing"}],
    }


def annotations() -> dict[str, tuple[bytes, str]]:
    """Contents of annotation files; the picture exists."""
    rle = {"size": [30, 40], "counts": [0, 1200]}
    cases = {
        "a box of NaN": ({"bbox": [float("nan"), 0, 1, 1]}, "bbox"),
        "a box without end": ({"bbox": [0, 0, float("inf"), 1]}, "bbox"),
        "a box of texts": ({"bbox": ["0", "0", "1", "1"]}, "bbox"),
        "a box beyond every float": ({"bbox": [10**400, 0, 1, 1]}, "bbox"),
        "a box of three": ({"bbox": [0, 0, 1]}, "bbox"),
        "a box without area": ({"bbox": [1, 1, 0, 5]}, "no object to train on"),
        "a box below 0": ({"bbox": [9, 9, -5, -5]}, "no object to train on"),
        "a box outside": ({"bbox": [41, 2, 5, 5]}, "no object to train on"),
        "a polygon of texts": ({"segmentation": [["a"] * 6]}, "segmentation"),
        "a polygon of numbers alone": ({"segmentation": [1, 2, 3, 4, 5, 6]}, "segmentation"),
        "a polygon of NaN": ({"segmentation": [[1, 2, float("nan"), 2, 3, 3]]}, "segmentation"),
        "a polygon of a billion pixels": ({"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}, "segmentation"),
        "a polygon of an odd number": ({"segmentation": [[0, 0, 5, 0, 5, 5, 1]]}, "segmentation"),
        "a mask of another size": ({"segmentation": rle | {"size": [3, 4]}}, "segmentation"),
        "a mask of a huge size": ({"segmentation": rle | {"size": [1 << 20, 1 << 20]}}, "segmentation"),
        "a mask without a size": ({"segmentation": {"counts": [1]}}, "segmentation"),
        "a mask that does not fill": ({"segmentation": rle | {"counts": [1, 2]}}, "segmentation"),
        "a mask of runs below 0": ({"segmentation": rle | {"counts": [-5, 1205]}}, "segmentation"),
        "a mask of runs that are texts": ({"segmentation": rle | {"counts": ["x"]}}, "segmentation"),
        "a mask that ends within a number": ({"segmentation": rle | {"counts": "o"}}, "segmentation"),
        "a mask of other letters": ({"segmentation": rle | {"counts": "\x01\x02"}}, "segmentation"),
        "a mask of nothing": ({"segmentation": rle | {"counts": None}}, "segmentation"),
        "keypoints of texts": ({"keypoints": ["a", "b", "c"]}, "keypoints"),
        "keypoints of NaN": ({"keypoints": [float("nan"), 1, 2]}, "keypoints"),
        "keypoints of two numbers": ({"keypoints": [1, 2]}, "keypoints"),
        "keypoints of visibility 9": ({"keypoints": [1, 2, 9]}, "keypoints"),
        "a class of a text": ({"category_id": "1"}, "category_id"),
        "a class that is not there": ({"category_id": 7}, "category_id"),
    }  # fmt: skip
    found = {name: (coco(**changes), words) for name, (changes, words) in cases.items()}
    for name, key, value, words in (
        ("a picture outside its folder", "file_name", "../../etc/passwd", "leads out"),
        ("a picture with a whole path", "file_name", "/etc/passwd", "leads out"),
        ("a height below 0", "height", -3, "height"),
        ("a height beyond all pictures", "height", 10**20, "height"),
        ("half a pixel", "width", 40.5, "width"),
        ("another width than the file's", "width", 41, "41 x 30"),
        ("height and width exchanged", "width", 30, "cannot be used"),
    ):
        found[name] = (coco(), words)
        found[name][0]["images"][0][key] = value
    found["height and width exchanged"][0]["images"][0]["height"] = 40
    return {name: (json.dumps(data).encode(), words) for name, (data, words) in found.items()} | {
        "brackets 100,000 deep": (b"[" * 100_000, "not JSON"),
        "no JSON": (b"images: []", "not JSON"),
        "UTF-16": (json.dumps(coco()).encode("utf-16"), "COCO|JSON"),
        "a list": (b"[]", "not in COCO format"),
    }


# ---- pictures ----------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes = b"", *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG with any head."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(format: str, pixels: np.ndarray | None = None, **options) -> bytes:
    """A right picture of 40 x 30, noise unless pixels are given."""
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, format, **options)
    return stored.getvalue()


def pictures() -> dict[str, tuple[bytes, str]]:
    """Contents of picture files."""
    jpeg, whole = encoded("JPEG"), encoded("PNG")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    return {
        "a JPEG that breaks off": (jpeg[: len(jpeg) // 2], "cannot be read"),
        "a JPEG without pixels": (jpeg[:200], "cannot be read"),
        "a PNG that breaks off": (whole[: len(whole) // 2], "cannot be read"),
        "a PNG with one wrong bit": (bytes(flipped), "cannot be read"),
        "a PNG of 20,000 x 20,000": (png(20_000, 20_000), "more than the limit of"),
        "a PNG of 4 billion x 1": (png(0x7FFFFFFF, 1), "cannot be read"),
        "a PNG without width": (png(0, 5), "cannot be read"),
        "a PNG without pixels": (png(40, 30), "cannot be read"),
        "a BMP that breaks off": (encoded("BMP")[:500], "cannot be read"),
        "a GIF that breaks off": (encoded("GIF")[:300], "cannot be read"),
        "a WebP that breaks off": (encoded("WEBP")[:60], "cannot be read"),
        "a TIFF that breaks off": (encoded("TIFF")[:200], "cannot be read"),
        "a TIFF of floating-point numbers": (
            encoded("TIFF", np.full((30, 40), np.nan, np.float32)), "floating-point"),
        "a TIFF of 32 bits": (encoded("TIFF", np.full((30, 40), 1 << 20, np.int32)), "store 8 or 16"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "cannot be read"),
        "a program": (b"\x7fELF" + bytes(200), "cannot be read"),
        "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        "an empty file": (b"", "cannot be read"),
    }  # fmt: skip


# ---- deployment folders ------------------------------------------------------------------------------


def onnx_folder(folder: Path, *, external: str = "") -> None:
    """A deployment folder of a model that always finds one box; its boxes may lie in a file beside it."""
    from onnx import TensorProto, helper, save

    boxes = helper.make_tensor("boxes", TensorProto.FLOAT, (1, 4), [1.0, 1.0, 9.0, 9.0])
    if external:
        boxes = helper.make_tensor("boxes", TensorProto.FLOAT, (1, 4), bytes(16), raw=True)
        boxes.ClearField("raw_data")
        boxes.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("length", "16")):
            entry = boxes.external_data.add()
            entry.key, entry.value = key, value
    scores = helper.make_tensor("scores", TensorProto.FLOAT, (1,), [0.9])
    classes = helper.make_tensor("classes", TensorProto.INT64, (1,), [0])
    names = {"boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT, "classes": TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["same"])],
        "always",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, (3, "h", "w"))],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in names.items()],
        initializer=[boxes, scores, classes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, str(folder / "model.onnx"))
    seal(folder, "onnx")


def seal(folder: Path, kind: str, **entries) -> None:
    """Write a folder's manifest, with the hashes that its files have now."""
    classes = folder / "classes.json"
    if not classes.exists():
        classes.write_text(json.dumps([{"id": 1, "name": "thing"}]))
    files = (path for path in sorted(folder.iterdir()) if path.name != "manifest.json")
    manifest = {
        "format_version": 1, "format": kind, "alpha": 0, "precision": "float32",
        "input": {"min_size": 32, "max_size": 64, "channel_order": "BGR"},
        "score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 100, "num_classes": 1,
        "max_batch": 1,
        "files": {p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in files},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest | entries))


def manifests() -> dict[str, tuple[dict, str]]:
    """Entries that a manifest must not have."""
    rules = {"min_size": 32, "max_size": 64, "channel_order": "BGR"}
    return {
        "a shorter edge of a million": ({"input": rules | {"min_size": 10**6}}, "min_size 1000000"),
        "a longer edge of a million": ({"input": rules | {"max_size": 10**6}}, "max_size"),
        "a shorter edge below 0": ({"input": rules | {"min_size": -1}}, "min_size -1"),
        "a longer edge of 0": ({"input": rules | {"max_size": 0}}, "max_size 0"),
        "an edge that is true": ({"input": rules | {"max_size": True}}, "max_size"),
        "another order of channels": ({"input": rules | {"channel_order": "XYZ"}}, "channel_order"),
        "a threshold of NaN": ({"score_threshold": float("nan")}, "score_threshold nan"),
        "a threshold above 1": ({"score_threshold": 1.5}, "score_threshold 1.5"),
        "an endless threshold": ({"nms_threshold": float("inf")}, "nms_threshold inf"),
        "detections without end": ({"max_detections": 10**12}, "max_detections"),
        "a batch of 0": ({"max_batch": 0}, "max_batch 0"),
        "alpha of NaN": ({"alpha": float("nan")}, "alpha nan"),
        "another number of classes": ({"num_classes": 80}, "num_classes 80"),
        "a file outside": ({"files": {"../x": {}, "model.onnx": {}, "classes.json": {}}}, "plain file"),
        "a list of files that is a text": ({"files": "model.onnx"}, "files"),
        "an unknown format": ({"format": "pickle"}, "format 'pickle'"),
        "a format that is a list": ({"format": []}, "format"),
        "a version of the future": ({"format_version": 3}, "format_version 3"),
    }  # fmt: skip


def model_files() -> dict[str, tuple[str, bytes, str]]:
    """Damaged contents of a folder's files whose hashes are right: file name, content, words."""
    return {
        "a model of noise": ("model.onnx", bytes(range(256)) * 9, "no ONNX file|cannot be loaded"),
        "an empty model": ("model.onnx", b"", "no ONNX file"),
        "a model of text": ("model.onnx", b"<html>404</html>" * 20, "no ONNX file|cannot be loaded"),
        "classes of noise": ("classes.json", bytes(range(256)), "is not JSON"),
        "classes that break off": ("classes.json", b'[{"id": 1, "na', "is not JSON"),
        "classes nested deep": ("classes.json", b"[" * 100_000, "is not JSON"),
        "classes of another kind": ("classes.json", b'{"id": 1}', "is no list"),
        "one class too many": (
            "classes.json", b'[{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]', "names 2 classes"),
    }  # fmt: skip
