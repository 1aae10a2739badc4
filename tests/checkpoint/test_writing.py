"""A folder appears whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from era.checkpoint.writing import check_new_folder, folder_whole
from era.errors import UserError


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_appears_when_all_of_it_is_written(tmp_path, is_there):
    final = tmp_path / "above" / "out"
    if is_there:
        final.mkdir(parents=True)
    with folder_whole(final) as folder:
        (folder / "a").write_text("1")
        assert not (final / "a").exists() and folder.parent == final.parent
    assert [path.name for path in final.iterdir()] == ["a"]
    assert os.listdir(final.parent) == ["out"]
    assert final.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), UserError("one sentence")])
def test_an_error_leaves_nothing_and_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error)), folder_whole(tmp_path / "a" / "b" / "out") as folder:
        (folder / "half").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    (tmp_path / "other").write_text("mine")
    with (
        pytest.raises(UserError, match=r"^--publish .*out cannot be written \(No space left"),
        folder_whole(tmp_path / "out", "--publish") as folder,
    ):
        (folder / "half").write_text("1")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == ["other"]


def test_a_path_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"), folder_whole(tmp_path / "file/out"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_new_folder_is_absent_or_empty(tmp_path):
    check_new_folder(tmp_path)
    check_new_folder(tmp_path / "absent")
    (tmp_path / "mine").write_text("")
    for path in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match=r"--output .* exists and is not an empty folder"):
            check_new_folder(path)
