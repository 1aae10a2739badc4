"""Versions, and combinations of them that are known not to work."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib import metadata, util

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from era.doctor.case import OK, WARNING, WRONG, Case, Finding
from era.environment import versions

ROOTS = ("era-detectron2", "detectron2", "torch", "torchvision")  # whose requirements are followed
# Detectron2's private functions that are called here were checked against this commit, see era.compat.
DETECTRON2_COMMIT = "a59f0563"
# Four distributions of one module, cv2: the one that is installed last overwrites the files of the others.
OPENCV = (
    "opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless",
)  # fmt: skip


def check(case: Case) -> Finding:
    """The software of this environment, whatever the run."""
    installed = {canonicalize_name(d.name): d.version for d in metadata.distributions() if d.name}
    problems = known_bad(installed, has_pkg_resources=util.find_spec("pkg_resources") is not None)
    problems += unmet(installed, _requirements)
    found = versions()
    words = ", ".join(
        f"{name} {found[name]}" for name in ("python", "torch", "torchvision", "detectron2")
    )
    if not problems:
        return Finding(
            OK, f"{words}; no combination that is known not to work", {"versions": found}
        )
    status = WRONG if any(status == WRONG for status, _ in problems) else WARNING
    first = next(sentence for found_status, sentence in problems if found_status == status)
    return Finding(
        status,
        f"{words}; {first}",
        {"versions": found, "problems": [sentence for _, sentence in problems]},
        "\n".join(f"{kind}: {sentence}" for kind, sentence in problems if sentence != first),
    )


def known_bad(installed: Mapping[str, str], *, has_pkg_resources: bool) -> list[tuple[str, str]]:
    """What no requirement says, or what is worth a reason; status and sentence each.

    Args:
        installed: versions by canonical name of the distribution.
        has_pkg_resources: whether that module can be imported.
    """
    found = []
    python = Version(platform.python_version())
    if not Version("3.10") <= python < Version("3.14"):
        found.append(
            (WRONG, f"Python is {python}: expected 3.10 to 3.13; make an environment with one")
        )
    torch = _version(installed.get("torch"))
    if torch is not None and torch.release < (2, 6):
        found.append(
            (
                WRONG,
                f"torch is {torch}: before 2.6 torch.load(weights_only=True) can run code of a checkpoint "
                "(CVE-2025-32434); install 2.6 or newer",
            )
        )
    if not has_pkg_resources:
        found.append(
            (
                WRONG,
                f"setuptools {installed.get('setuptools', 'is absent')} has no pkg_resources (82 dropped it), which "
                "Detectron2's model_zoo imports; install setuptools below 81",
            )
        )
    detectron2 = installed.get("detectron2")
    if detectron2 is None or not detectron2.endswith(DETECTRON2_COMMIT):
        found.append(
            (
                WARNING,
                f"Detectron2 is {detectron2 or 'no installed distribution'}: its private functions were checked at "
                f"commit {DETECTRON2_COMMIT} (tools/install_detectron2.py)",
            )
        )
    twice = [name for name in OPENCV if name in installed]
    if len(twice) > 1:
        found.append(
            (
                WARNING,
                f"{' and '.join(twice)} are both installed and overwrite each other's cv2; keep one of them",
            )
        )
    return found


def unmet(
    installed: Mapping[str, str], requirements: Callable[[str], list[str]]
) -> list[tuple[str, str]]:
    """What the installed distributions that this package stands on ask of each other and do not find.

    Two of these are known to end a run, a torchvision beside another torch than it was compiled for and whatever is
    absent; of the rest nobody knows.

    Args:
        installed: versions by canonical name.
        requirements: of a distribution, as its metadata has them.
    """
    found, seen = [], set()
    waiting = [name for name in ROOTS if name in installed]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in requirements(name):
            needed = Requirement(text)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            other = canonicalize_name(needed.name)
            if other in OPENCV:
                other = next((variant for variant in OPENCV if variant in installed), other)
            if other not in installed:
                found.append(
                    (
                        WRONG,
                        f"{name} needs {needed.name}{needed.specifier}, which is absent; install it",
                    )
                )
                continue
            waiting.append(other)
            if not needed.specifier.contains(installed[other], prereleases=True):
                is_pair = (name, other) == ("torchvision", "torch")
                found.append(
                    (
                        WRONG if is_pair else WARNING,
                        f"{name} {installed[name]} needs {other}{needed.specifier} and finds {installed[other]}"
                        f"{': its compiled operators are of that torch alone' * is_pair}; install what fits",
                    )
                )
    return found


def _requirements(name: str) -> list[str]:
    return metadata.requires(name) or []


def _version(text: str | None) -> Version | None:
    try:
        return Version(text) if text else None
    except InvalidVersion:
        return None
