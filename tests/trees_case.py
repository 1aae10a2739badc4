"""A wheel of tiny photos at an address of this machine, for the tests of the tree data."""

import hashlib
import io
import zipfile

import numpy as np
from PIL import Image

from era.data.trees import Photo, Region, TreesSpec

PHOTOS = (Photo("wood", 50, 44), Photo("grove", 20, 20), Photo("hill", 41, 20))  # width, height
BOXES = {
    # Rows 0 to 23 of the wood are trained on, 24 to 43 tuned on. One box on both, a fifth of it on the latter.
    "wood": [(2, 3, 12, 13), (17, 2, 25, 10), (30, 16, 40, 26), (5, 30, 15, 40), (18, 28, 30, 40)],
    "grove": [(1, 1, 20, 20)],
    "hill": [(0, 0, 10, 10), (15, 5, 25, 15), (33, 10, 41, 20)],
}
REGIONS = (
    Region("train", "wood", 0, 24),
    Region("train", "grove", 0, 20),
    Region("tune", "wood", 24, 44),
    Region("test", "hill", 0, 20),
)


def pixels_of(photo):
    rng = np.random.default_rng(len(photo.name) + photo.width)
    return rng.integers(0, 256, (photo.height, photo.width, 3), np.uint8)


def png(photo):
    stream = io.BytesIO()
    Image.fromarray(pixels_of(photo)).save(stream, "PNG")
    return stream.getvalue()


def xml(boxes):
    box = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
    return f"<annotation>{''.join(box.format(*b) for b in boxes)}</annotation>"


def members():
    """What the wheel holds, by the members' names."""
    photos = {f"deepforest/data/{photo.name}.png": png(photo) for photo in PHOTOS}
    return photos | {f"deepforest/data/{name}.xml": xml(boxes) for name, boxes in BOXES.items()}


def serve(folder, content=None):
    """Put a wheel of some members, or a file of some bytes, at an address; the spec that names it."""
    data = content
    if not isinstance(content, bytes):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, member in (content or members()).items():
                wheel.writestr(name, member)
        data = stream.getvalue()
    path = folder / "photos-1.0-py3-none-any.whl"
    path.write_bytes(data)
    return TreesSpec(
        url=path.as_uri(), sha256=hashlib.sha256(data).hexdigest(), size=len(data),
        photos=PHOTOS, regions=REGIONS, tile=20, overlap=8,
    )  # fmt: skip


def nothing_at(root):
    """Whether nothing but the lock is there."""
    return {path.name for path in root.iterdir()} <= {".era_trees.lock"}
