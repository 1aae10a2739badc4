"""What a user names on a command line: pictures, folders, globs, videos."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from era_runtime.errors import DeploymentError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


def is_video(path: str) -> bool:
    """Whether a file's name says that it is a video."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def image_files(paths: Sequence[str]) -> list[str]:
    """Files that the paths name, each once, in order.

    A folder stands for the picture files in it and below it, by their names' endings; a glob for what it
    matches (``**`` goes into folders); any other file for itself, whatever its name.

    Raises:
        DeploymentError: a path that names nothing.
    """
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            found = sorted(
                os.path.join(folder, name)
                for folder, _, names in os.walk(path)
                for name in names
                if name.lower().endswith(IMAGE_SUFFIXES)
            )
        elif os.path.isfile(path):
            found = [path]
        else:
            found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not found:
            raise DeploymentError(
                f"{path} names no picture: expected a file, a folder with pictures or a glob."
            )
        files += found
    return list(dict.fromkeys(files))
