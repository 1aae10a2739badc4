"""What the toy dataset holds, and the drawing of one of its images."""

import dataclasses

import cv2
import numpy as np

CLASSES = ("disk", "ring", "crescent", "square", "cross", "pentagon", "hexagon", "star")
SPLITS = {"train": 0, "val": 1, "tune": 2}  # the number is part of every image's seed
_SUPERSAMPLE = 4  # shapes are drawn this many times larger per side, then averaged down


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToySpec:
    """What the toy dataset holds and how hard it is; two equal specs give the same files.

    Lengths are pixels; colours and noise are grey levels of 0 to 255; extents are diameters.
    """

    train_images: int = 1600  # training images
    val_images: int = 200  # validation images, and as many to tune settings on
    image_size: int = 128  # height and width of every image, pixels
    seed: int = 0  # the first number of every image's seed
    max_objects: int = 3  # wanted objects per image: 1 to this many, equally likely
    empty_fraction: float = 0.02  # share of images without any object
    min_size: float = 20.0  # smallest object extent, pixels; extents are log-uniform
    max_size: float = 80.0  # largest object extent, pixels
    stretch: float = 1.15  # largest ratio of an object's two axes
    wobble: float = 0.02  # standard deviation of a corner's place, share of the radius
    min_visible: float = 0.3  # no object is drawn if one would show less than this share of itself
    min_side: int = 6  # smallest side of a box, pixels
    min_contrast: float = 90.0  # least colour distance (RGB, L2) to what is below, grey levels
    texture: float = 16.0  # largest colour difference within a texture, per channel, grey levels
    distractors: int = 1  # most lines and blobs per image that are no object; some occlude objects
    lighting: float = 0.12  # strength of light gradients and shadows, 0 (even light) to 1
    colour_cast: float = 0.15  # largest relative change of a channel's gain
    blur: float = 0.5  # largest standard deviation of the image blur, pixels
    noise: float = 4.0  # largest standard deviation of the pixel noise, grey levels
    jpeg_quality: int = 92  # 1 to 100


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _regular(corners: int, radius=1.0) -> np.ndarray:
    angle = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(radius, (-1, 1))


def _outline(name: str, rng) -> list[np.ndarray]:
    """Contours of a shape within the unit circle; a second contour is a hole."""
    if name == "disk":
        return [_regular(48)]
    if name == "ring":
        return [_regular(48), _regular(48, rng.uniform(0.4, 0.65))]
    if name == "crescent":
        half, depth = rng.uniform(1.9, 2.3), rng.uniform(0.56, 0.88)
        arc, across = np.linspace(-half, half, 32), np.linspace(1, -1, 24)
        rim = np.stack([np.cos(arc), np.sin(arc)], 1)
        bay = np.stack([np.cos(half) + depth * (1 - across**2), np.sin(half) * across], 1)
        return [np.concatenate([rim, bay])]
    if name == "cross":
        w = rng.uniform(0.26, 0.4)
        arm = np.array([(w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1)])
        return [np.concatenate([arm, -arm]) * 0.95]
    if name == "star":
        return [_regular(10, np.where(np.arange(10) % 2, rng.uniform(0.42, 0.6), 1.0))]
    return [_regular({"square": 4, "pentagon": 5, "hexagon": 6}[name])]


def _cover(contours: list[np.ndarray], size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """A window (rows, columns) around the contours, and their coverage of its pixels, 0 to 1.

    Contours are in pixels, under the even-odd rule. The window has room for a cast shadow.
    """
    low = np.clip(np.floor(contours[0].min(0)) - 10, 0, size - 1).astype(int)
    high = np.clip(np.ceil(contours[0].max(0)) + 10, low + 1, size).astype(int)
    width, height = (high - low).tolist()
    big = np.zeros((height * _SUPERSAMPLE, width * _SUPERSAMPLE), np.uint8)
    points = [np.round((c - low) * _SUPERSAMPLE - 0.5).astype(np.int32) for c in contours]
    cv2.fillPoly(big, points, 255)
    cover = cv2.resize(big, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return (slice(low[1], high[1]), slice(low[0], high[0])), cover


def _smooth(rng, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise, 0 to 1, whose features are about ``cell`` pixels wide."""
    grid = rng.random([max(2, round(side / cell)) + 1 for side in shape], dtype=np.float32)
    return np.clip(cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC), 0, 1)


def _texture(rng, xy: np.ndarray, extent: float) -> np.ndarray:
    """A pattern, 0 to 1, at the pixels ``xy`` (2, H, W) of something ``extent`` pixels wide."""
    phase = np.float32(rng.uniform(0, 2 * np.pi))
    turn = _turn(rng.uniform(0, np.pi)).astype(np.float32)
    u, v = turn[0, 0] * xy[0] + turn[0, 1] * xy[1], turn[1, 0] * xy[0] + turn[1, 1] * xy[1]
    wave = np.float32(2 * np.pi / max(3.5, extent * rng.uniform(0.12, 0.45)))
    kind = rng.integers(6)
    if kind == 0:  # stripes
        return np.clip(0.5 + 1.5 * np.sin(u * wave + phase), 0, 1)
    if kind == 1:  # checks
        return np.clip(0.5 + 3 * np.sin(u * wave + phase) * np.sin(v * wave), 0, 1)
    if kind == 2:  # noise
        return _smooth(rng, u.shape, max(2.0, extent * rng.uniform(0.08, 0.3)))
    if kind == 3:  # gradient
        return np.clip(0.5 + (u - u.mean()) / np.float32(extent), 0, 1)
    if kind == 4:  # dots
        return np.clip(2 * np.cos(u * wave + phase) + 2 * np.cos(v * wave) - 1.5, 0, 1)
    return np.full_like(u, 0.5)  # plain


def _paint(rng, spec: ToySpec, xy, extent: float, under: np.ndarray | None) -> np.ndarray:
    """Textured colours at the pixels ``xy``, (H, W, 3), that stand out from the colour ``under``.

    The colours are drawn alike for objects of every class, clutter and background.
    """
    for _ in range(12):  # mid-grey leaves little room: then the last colour is taken
        colour = rng.uniform(20, 235, 3)
        if under is None or np.linalg.norm(colour - under) >= spec.min_contrast:
            break
    other = np.float32(rng.uniform(-1, 1, 3) * spec.texture)
    return np.float32(colour) + (_texture(rng, xy, extent) - np.float32(0.5))[..., None] * other


def _place(contours: list[np.ndarray], rng, spec: ToySpec, extent: float) -> list[np.ndarray]:
    """Wobble, stretch, turn, scale to ``extent`` pixels and move a unit outline to a place."""
    ratio = np.exp(rng.uniform(-0.5, 0.5) * np.log(spec.stretch))
    turn, tilt = _turn(rng.uniform(0, 2 * np.pi)), _turn(rng.uniform(0, 2 * np.pi))
    linear = turn @ tilt.T @ np.diag([ratio, 1 / ratio]) @ tilt * (extent / 2)
    margin = min(0.35 * extent, spec.image_size / 2)  # part of an object may lie outside
    centre = rng.uniform(margin, spec.image_size - margin, 2)
    few = len(contours[0]) <= 12  # a round outline stays smooth: only its axes change
    shake = spec.wobble if few else 0.0
    return [(c + rng.normal(0, 1, c.shape) * shake) @ linear + centre for c in contours]


def _clutter(rng, spec: ToySpec) -> list[np.ndarray]:
    """A line segment or an irregular blob, in pixels: something that is no object."""
    size = spec.image_size
    if rng.random() < 0.55:
        length, width = rng.uniform(0.1, 0.6) * size, rng.uniform(0.8, 2.8)
        box = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * [length / 2, width / 2]
        return [box @ _turn(rng.uniform(0, np.pi)) + rng.uniform(0, size, 2)]
    angle = np.arange(40) * (2 * np.pi / 40)
    radius = 1.0 + sum(
        rng.uniform(0.12, 0.35) * np.sin(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5)
    )
    return [_regular(40, radius) * rng.uniform(4, 0.14 * size) + rng.uniform(0, size, 2)]


def _light(image: np.ndarray, rng, spec: ToySpec, xy: np.ndarray) -> np.ndarray:
    """Light gradient, soft shadow, contrast, colour cast, blur and noise; returns uint8."""
    size = spec.image_size
    axis = _turn(rng.uniform(0, 2 * np.pi)).astype(np.float32)
    xy = xy - size / 2
    gain = 1 + (xy[0] * axis[0, 0] + xy[1] * axis[0, 1]) / size * rng.uniform(0, 2 * spec.lighting)
    if rng.random() < 0.5:  # the edge of a shadow runs through the image
        axis = _turn(rng.uniform(0, 2 * np.pi)).astype(np.float32)
        side = xy[0] * axis[0, 0] + xy[1] * axis[0, 1] - rng.uniform(-0.3, 0.3) * size
        edge = np.clip(side / rng.uniform(2, 12) + 0.5, 0, 1)
        gain *= 1 - edge * (rng.uniform(0.3, 1.3) * spec.lighting)
    contrast = 1 + rng.uniform(-0.5, 0.3) * spec.lighting
    cast = np.float32(contrast * (1 + rng.uniform(-1, 1, 3) * spec.colour_cast))
    lift = np.float32(128 * (1 - contrast) + rng.uniform(-40, 40) * spec.lighting)
    image = (image * cast + lift) * gain[..., None]
    sigma = rng.uniform(0, 1) * spec.blur
    if sigma > 0.3:  # less is no change
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    image += rng.standard_normal(image.shape, np.float32) * (rng.uniform(0, 1) * spec.noise)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def render(spec: ToySpec, split: str, index: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Draw one image; the result depends on the three arguments alone.

    Returns the RGB image (uint8, (H, W, 3)), the index of the object that is visible at each
    pixel or -1 (int16, (H, W)), and the objects: each a dict of ``category`` (index into
    CLASSES), ``bbox`` ([x, y, w, h], pixels) and ``area`` (visible pixels).
    """
    rng = np.random.default_rng([spec.seed, SPLITS[split], index])
    size = spec.image_size
    xy = np.mgrid[0:size, 0:size][::-1].astype(np.float32)
    image = _paint(rng, spec, xy, size * rng.uniform(0.2, 1.2), None)
    tint = np.float32(rng.uniform(-1, 1, 3) * spec.texture)
    image += (_smooth(rng, (size, size), size / 4)[..., None] - np.float32(0.5)) * tint
    owner = np.full((size, size), -1, np.int16)
    objects, full = [], []  # full: each object's area before occlusion
    wanted = 0 if rng.random() < spec.empty_fraction else rng.integers(1, spec.max_objects + 1)
    layers = np.exp(rng.uniform(np.log(spec.min_size), np.log(spec.max_size), wanted)).tolist()
    if rng.random() < 0.8:  # mostly large to small, else the large ones hide the small ones
        layers.sort(reverse=True)
    for _ in range(rng.integers(spec.distractors + 1)):
        layers.insert(rng.integers(len(layers) + 1), None)
    for extent in layers:  # an object's extent in pixels, or None for clutter
        name = CLASSES[rng.integers(len(CLASSES))]
        for _ in range(8):
            if extent is None:
                contours, claim, areas = _clutter(rng, spec), -1, full
            else:
                contours = _place(_outline(name, rng), rng, spec, extent)
                disc, *hole = (cv2.contourArea(np.float32(c)) for c in contours)
                claim, areas = len(objects), [*full, disc - sum(hole)]
            window, cover = _cover(contours, size)
            after = owner.copy()
            after[window][cover > 0.5] = claim
            found = [_measure(after == i, spec, area) for i, area in enumerate(areas)]
            if all(found):  # no object, old or new, would be hidden too far
                break
        else:
            continue
        owner, full = after, areas
        if extent is not None:
            objects.append({"category": CLASSES.index(name)})
        for known, new in zip(objects, found, strict=True):
            known.update(new)
        patch, inside = image[window], cover > 0.5
        under = patch[inside].mean(0) if inside.any() else None
        if rng.random() < 0.4:  # a cast shadow, on what lies below
            move = np.float32([[1, 0, rng.uniform(-5, 5)], [0, 1, rng.uniform(-5, 5)]])
            dark = cv2.warpAffine(cover, move, cover.shape[::-1])
            patch *= 1 - cv2.GaussianBlur(dark, (0, 0), 2.0)[..., None] * spec.lighting
        paint = _paint(rng, spec, xy[(slice(None), *window)], max(extent or 0.0, 12.0), under)
        patch += (paint - patch) * cover[..., None]
    return _light(image, rng, spec, xy), owner, objects


def _measure(mask: np.ndarray, spec: ToySpec, full_area: float) -> dict | None:
    """Tight box [x, y, w, h] and area of a mask, pixels; None when too little of it is left."""
    area = int(np.count_nonzero(mask))
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if area < spec.min_visible * full_area or not area:
        return None
    x, y = int(columns[0]), int(rows[0])
    w, h = int(columns[-1]) - x + 1, int(rows[-1]) - y + 1
    return None if min(w, h) < spec.min_side else {"bbox": [x, y, w, h], "area": area}
