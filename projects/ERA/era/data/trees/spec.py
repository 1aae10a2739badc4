"""What the tree data is made of: a file of PyPI, its photos, and which of them is for what."""

from __future__ import annotations

import dataclasses

CLASSES = ("tree",)
SPLITS = ("train", "tune", "test")


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo of the wheel, ``deepforest/data/<name>.png``, with its boxes in ``<name>.xml``."""

    name: str
    width: int  # pixels
    height: int


@dataclasses.dataclass(frozen=True)
class Region:
    """Rows of a photo, all its columns, that one split is cut from."""

    split: str  # one of SPLITS
    photo: str
    top: int  # first row, pixels
    bottom: int  # the row after the last


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreesSpec:
    """Where the photos come from and how they are cut; two specs that differ in ``url`` alone give the same pictures.

    Raises:
        ValueError: a region that its photo does not hold or that holds no tile; a split of photos that
            would let a model see in training what it is tested or tuned on.
    """

    url: str  # of the wheel; its last part is the file's name
    sha256: str  # of the wheel, hexadecimal
    size: int  # of the wheel, bytes; no byte more is read
    photos: tuple[Photo, ...]
    regions: tuple[Region, ...]
    tile: int = 210  # height and width, pixels; 6 by 5 cover the test photo with 2 to 4 shared between neighbours
    # Pixels that neighbouring tiles of training share at least: 19 of 20 sides of a crown there are no longer, so that
    # these are whole on some tile. Tiles to evaluate on share nothing but what fills their rows evenly.
    overlap: int = 70
    min_visible: float = 0.5  # a tree is on a tile if this share of its box is

    def __post_init__(self) -> None:
        photos = {photo.name: photo for photo in self.photos}
        for region in self.regions:
            photo = photos.get(region.photo, Photo("none", 0, 0))
            inside = region.top >= 0 and region.bottom <= photo.height
            small = min(region.bottom - region.top, photo.width) < self.tile
            if region.split not in SPLITS or not inside or small:
                raise ValueError(f"{region} is of no known photo or split, or too small for a tile")
        for one in self.regions:
            for other in self.regions:
                rows = max(one.top, other.top) < min(one.bottom, other.bottom)
                tested = "test" in (one.split, other.split)
                if one.photo == other.photo and one.split != other.split and (rows or tested):
                    raise ValueError(f"{one} and {other} share what only one of them may see")

    @property
    def filename(self) -> str:
        """Name of the wheel."""
        return self.url.rsplit("/", 1)[-1]


# 230 x 247 m and 125 x 104 m of Yellowstone, 40 x 40 m each of a Florida pine stand and a Californian slope, at
# 0.1 m a pixel. Boxes: 574, 279, 61, 37.
YELLOWSTONE_528 = Photo("2019_YELL_2_528000_4978000_image_crop2", 2299, 2472)
YELLOWSTONE_541 = Photo("2019_YELL_2_541000_4977000_image_crop", 1249, 1035)
ORDWAY_SWISHER = Photo("OSBS_029", 400, 400)
SOAPROOT_SADDLE = Photo("SOAP_061", 400, 400)

DEFAULT = TreesSpec(
    url=(
        "https://files.pythonhosted.org/packages/b7/a8/"
        "67e66685c81ec070372db546f933312c6d7401f845e200e5d900107ff51e/"
        "deepforest-2.1.0-py3-none-any.whl"
    ),
    sha256="8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    size=20_639_595,
    photos=(YELLOWSTONE_528, YELLOWSTONE_541, ORDWAY_SWISHER, SOAPROOT_SADDLE),
    regions=(
        Region("train", YELLOWSTONE_528.name, 0, 1854),  # three quarters of the rows
        Region("train", ORDWAY_SWISHER.name, 0, 400),
        Region("train", SOAPROOT_SADDLE.name, 0, 400),
        Region("tune", YELLOWSTONE_528.name, 1854, 2472),
        Region("test", YELLOWSTONE_541.name, 0, 1035),
    ),
)
