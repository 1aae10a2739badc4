"""The wheel that carries the trees: fetched once, refused when it is another, read and never unpacked."""

import dataclasses
import functools
import http.client
import os
import urllib.request

import pytest
import trees_case
from builders import digest
from detectron2.data import DatasetCatalog
from trees_case import PHOTOS, members, nothing_at, png, xml

from era.data import trees
from era.data.trees import Photo
from era.data.trees import wheel as trees_wheel
from era.errors import UserError


@pytest.fixture
def serve(tmp_path):
    """Puts a wheel of some members at an address, and gives the spec that names it."""
    (tmp_path / "served").mkdir()
    return functools.partial(trees_case.serve, tmp_path / "served")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _registered():
    yield
    trees.register()


class _Answer:
    """What a server sends, by a function of the number of bytes."""

    def __init__(self, read):
        self.read = read

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_second_use_does_not_download(serve, root, monkeypatch):
    spec = serve()
    folder = trees.ensure(root, spec)
    before = digest(folder)
    monkeypatch.setattr(urllib.request, "urlopen", None)
    trees.register(root, spec)
    assert len(DatasetCatalog.get("era_trees_tune")) == 3
    assert trees.ensure(root, dataclasses.replace(spec, url="file:///gone/photos.whl")) == folder
    assert digest(folder) == before
    assert {path.name for path in root.iterdir()} == {"era_trees", ".era_trees.lock"}  # no wheel


def test_a_file_put_there_by_hand_is_read(serve, root, monkeypatch):
    spec = serve()
    before = digest(trees.ensure(root / "downloaded", spec))
    monkeypatch.setattr(urllib.request, "urlopen", None)
    root.joinpath(spec.filename).write_bytes((root.parent / "served" / spec.filename).read_bytes())
    assert digest(trees.ensure(root, spec)) == before
    assert (root / spec.filename).exists()  # it is the user's
    (root / spec.filename).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"photos-1.0.*is not the file.*remove it") as caught:
        trees.ensure(root, dataclasses.replace(spec, tile=16))
    assert spec.sha256 in str(caught.value)
    assert digest(root / "era_trees") == before  # what was there stays


def test_a_file_that_cannot_be_read_is_told(serve, root, monkeypatch):
    spec = serve()
    root.mkdir()
    (root / spec.filename).touch()

    def refused(*_):
        raise PermissionError(13, "Permission denied")  # by hand, for root may read every file

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(UserError, match=r"whl cannot be read .*Permission denied.*remove it"):
        trees_wheel.fetch(spec, root)


@pytest.mark.parametrize("change", ["another", "short", "long", "endless"])
def test_another_file_is_refused_and_nothing_is_left(serve, root, monkeypatch, change):
    spec = serve()
    path = root.parent / "served" / spec.filename
    data = path.read_bytes()
    path.write_bytes(
        {"another": data[:-1] + b"?", "short": data[:-9], "long": data + b"?"}.get(change, data)
    )
    given = []
    if change == "endless":  # a server that never stops sending
        answer = _Answer(lambda count: given.append(count) or b"\0" * count)
        monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: answer)
    with pytest.raises(
        UserError, match=r"not the file that was expected.*nothing was kept"
    ) as caught:
        trees.ensure(root, spec)
    text = str(caught.value)
    assert spec.sha256 in text and spec.url in text and str(root / spec.filename) in text
    assert "\n" not in text and nothing_at(root)
    assert sum(given) in (0, spec.size + 1)


def _broken(_count):
    raise http.client.IncompleteRead(b"12", 34)


def _timed_out(_count):
    raise TimeoutError("timed out")


@pytest.mark.parametrize(
    ("opens", "words"),
    [
        (lambda *_, **__: _Answer(_broken), r"IncompleteRead\(2 bytes read, 34 more expected\)"),
        (lambda *_, **__: _Answer(_timed_out), "timed out"),
        (None, "urlopen error.*No such file"),
    ],
)
def test_no_network_is_told_in_one_sentence(serve, root, monkeypatch, opens, words):
    spec = serve()
    if opens:
        monkeypatch.setattr(urllib.request, "urlopen", opens)
    else:
        (root.parent / "served" / spec.filename).unlink()
    with pytest.raises(UserError, match=rf"cannot be downloaded from .*{words}") as caught:
        trees.ensure(root, spec)
    text = str(caught.value)
    assert spec.url in text and spec.sha256 in text and str(root / spec.filename) in text
    assert "\n" not in text and nothing_at(root)


def without(name):
    return {key: value for key, value in members().items() if not key.endswith(name)}


def with_boxes(*boxes):
    return members() | {"deepforest/data/hill.xml": xml(boxes)}


BAD_WHEELS = [
    (lambda: without("hill.png"), "has no deepforest/data/hill.png"),
    (lambda: without("hill.xml"), "has no deepforest/data/hill.xml"),
    # The photo lies at another place that leads to the same one.
    (
        lambda: without("hill.png") | {"x/../deepforest/data/hill.png": png(PHOTOS[2])},
        "has no deep",
    ),
    (
        lambda: members() | {"deepforest/data/hill.png": png(Photo("hill", 42, 20))},
        "hill.png has 42 x 20 pixels, not 41 x 20",
    ),
    (lambda: members() | {"deepforest/data/hill.png": b"GIF89a"}, "cannot identify image"),
    (lambda: members() | {"deepforest/data/hill.png": png(PHOTOS[2])[:-60]}, "truncated|broken"),
    (lambda: members() | {"deepforest/data/hill.xml": "<annotation>"}, "no element found"),
    (lambda: with_boxes((1, 2, 3, "four")), "invalid literal"),
    (lambda: with_boxes((1, 2, 42, 4)), "hill.xml has a box"),
    (lambda: with_boxes((-1, 2, 4, 4)), "hill.xml has a box"),
    (lambda: with_boxes((1, 2, 1, 4)), "hill.xml has a box"),
]


@pytest.mark.parametrize(("content", "words"), BAD_WHEELS)
def test_a_wheel_without_what_the_spec_says(serve, root, content, words):
    with pytest.raises(UserError, match=rf"not the content \(.*({words}).*TreesSpec") as caught:
        trees.ensure(root, serve(content()))
    assert "\n" not in str(caught.value) and nothing_at(root)


def test_a_file_that_is_no_wheel(serve, root):
    with pytest.raises(UserError, match=r"not the content \(File is not a zip"):
        trees.ensure(root, serve(b"plain text"))
    assert nothing_at(root)


def test_a_member_that_swells_is_not_unpacked(serve, root, monkeypatch):
    monkeypatch.setattr("era.data.trees.wheel._LARGEST", 1 << 16)
    bomb = members() | {"deepforest/data/hill.xml": b" " * (1 << 20)}
    with pytest.raises(UserError, match=r"hill\.xml has more than 65536 bytes"):
        trees.ensure(root, serve(bomb))
    assert nothing_at(root)


def test_other_members_go_nowhere(serve, root):
    before = digest(trees.ensure(root / "plain", serve()))
    evil = {"../evil.txt": "x", "/evil.txt": "x", "deepforest/data/../../../../evil.txt": "x"}
    other = root / "evil"
    folder = trees.ensure(other, serve(evil | members() | {"deepforest/main.py": "boom"}))
    changed = {name for name, value in digest(folder).items() if before[name] != value}
    assert changed == {"spec.json", *(f"annotations/{split}.json" for split in trees.SPLITS)}
    assert {path.name for path in other.iterdir()} == {"era_trees", ".era_trees.lock"}
    assert not list(root.parent.rglob("*evil.txt")) and not os.path.exists("/evil.txt")
