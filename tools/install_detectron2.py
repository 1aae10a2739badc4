#!/usr/bin/env python3
"""Install Detectron2 where it is missing, from a wheel of PyPI that pip would not choose by itself.

Detectron2 has no release of its own on PyPI. The wheel ``sal-detectron2==0.7.2`` holds it: its
Python files are those of upstream's commit a59f0563 (2024-04-17), apart from the version string,
from ``random.sample(list(...))`` in ``data/common.py``, which Python 3.11 needs, and from a test
helper. As it stands that wheel does not serve:

* its metadata asks for ``numpy<2`` and ``black``, which Detectron2 does not need;
* its compiled ``_C`` fits CPython 3.10 alone (Detectron2 runs without it: rotated boxes and
  deformable convolutions are what is missing, and COCO evaluation falls back to pycocotools);
* it also installs a stray top-level package named ``tools``.

So this script fetches it, checks its SHA-256, repacks only the Python package into a wheel named
``detectron2`` for any CPython, and lets pip install that: ``pip list`` shows it, ``pip uninstall
detectron2`` removes it. A Detectron2 that is already there is left alone.

It needs the standard library and pip, so that it can run before anything else is installed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE_NAME = "sal-detectron2"
SOURCE_VERSION = "0.7.2"
SOURCE_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
# The wheel is tagged for CPython 3.10; only its Python part is kept, which runs on later versions.
SOURCE_PYTHON = "3.10"

# Upstream calls itself 0.6 at the packaged commit, years after the release of that name; PEP 440's
# local part says which commit it really is. `detectron2>=0.6` is met by it, as it should be.
UPSTREAM_VERSION = "0.6"
UPSTREAM_COMMIT = "a59f0563"
VERSION = f"{UPSTREAM_VERSION}+{UPSTREAM_COMMIT}"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
DIST_INFO = f"detectron2-{VERSION}.dist-info"

# The ranges of upstream's setup.py, without black (only a pretty-printer asks for it, and does
# without). torch and torchvision are left out as upstream leaves them out: which build of them is
# right depends on the machine. setuptools is added because model_zoo imports pkg_resources.
REQUIREMENTS = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7,<0.1.10",
    "matplotlib",
    "numpy",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "pycocotools>=2.0.2",
    "setuptools<81",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

DESCRIPTION = f"""\
Detectron2 is Meta AI Research's library for object detection and segmentation, under the Apache
License 2.0: https://github.com/facebookresearch/detectron2

This wheel was repacked by tools/install_detectron2.py of era-detectron2 from
{SOURCE_NAME}=={SOURCE_VERSION} (sha256 {SOURCE_SHA256}),
which is upstream's commit {UPSTREAM_COMMIT} of 2024-04-17. Changed against that package: the compiled
extension detectron2._C and the top-level package `tools` are left out, `detectron2.__version__`
is upstream's again, and the requirements are upstream's without black.
"""

# Zip files store a time; a fixed one makes the wheel the same bytes whenever it is built.
ZIP_TIME = (2024, 4, 17, 0, 0, 0)

_COMPILED = re.compile(r"detectron2/_C\.[^/]*\Z")
_VERSION_LINE = re.compile(rb"^__version__ = .*$", re.MULTILINE)

# Run in a process of its own, because importing Detectron2 here would change this one, and in an
# empty folder, because `python -c` looks for modules in its current folder first and a source
# checkout lying there would pass for an installed Detectron2. A folder without __init__.py has a
# spec without an origin: it is a namespace package by accident, not a Detectron2.
_PROBE = """
import importlib.util, json
spec = importlib.util.find_spec("detectron2")
found = {"path": spec.origin if spec else None, "version": None, "error": None}
if found["path"]:
    try:
        import detectron2
        found["version"] = str(getattr(detectron2, "__version__", "unknown"))
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print("\\n" + json.dumps(found))
"""


class InstallError(Exception):
    """What went wrong and what to do about it, in one sentence that a user can act upon."""


@dataclass(frozen=True)
class Found:
    """A ``detectron2`` package that the interpreter finds; ``error`` is None if it imports."""

    path: str
    version: str | None
    error: str | None


def find_detectron2(python: str = sys.executable) -> Found | None:
    """Return the Detectron2 that ``python`` would import, or None if it has none."""
    with tempfile.TemporaryDirectory() as empty:
        result = subprocess.run(
            [python, "-W", "ignore", "-c", _PROBE], cwd=empty, capture_output=True, text=True
        )
    try:
        found = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise InstallError(
            f"cannot tell whether {python} has Detectron2, because it failed with {reason!r}; "
            "mend that interpreter or use another one."
        ) from None
    return Found(**found) if found["path"] else None


def installed_version() -> str | None:
    """Return the version of the distribution ``detectron2`` that pip knows here, or None."""
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_sha256(path: Path, expected: str = SOURCE_SHA256) -> None:
    """Raise unless the file at ``path`` has the SHA-256 ``expected`` (hexadecimal)."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(
            f"cannot read the wheel {path} ({error.strerror}); "
            "give --wheel an existing file, or leave it out to download it."
        ) from None
    if found != expected:
        raise InstallError(
            f"nothing was installed, because {path} has the SHA-256 {found} where {expected} is "
            f"expected; download {SOURCE_NAME}=={SOURCE_VERSION} again from a source you trust."
        )


def pip(*arguments: str, purpose: str) -> None:
    """Run pip of this interpreter; ``purpose`` completes "pip could not ..." if it fails."""
    if importlib.util.find_spec("pip") is None:
        raise InstallError(
            f"{sys.executable} has no pip; run '{sys.executable} -m ensurepip' first."
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode != 0:
        raise InstallError(f"pip could not {purpose}; its own messages above say why.")


def download(folder: Path) -> Path:
    """Download the source wheel into ``folder`` and return its path; the hash is not checked."""
    pip(
        *("download", "--quiet", "--no-deps", "--only-binary=:all:"),
        # The tags of another Python version are asked for, whichever version runs this script.
        *("--python-version", SOURCE_PYTHON, "--implementation", "cp"),
        *("--dest", str(folder), f"{SOURCE_NAME}=={SOURCE_VERSION}"),
        purpose=f"download {SOURCE_NAME}=={SOURCE_VERSION} (offline, use --wheel FILE)",
    )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InstallError(
            f"pip left {len(wheels)} wheels in {folder} where one is expected; "
            "download it by hand and pass it as --wheel FILE."
        )
    return wheels[0]


def is_kept(name: str) -> bool:
    """Tell whether the member ``name`` of the source wheel belongs into the repacked wheel."""
    return (
        name.startswith("detectron2/") and not name.endswith("/") and not _COMPILED.fullmatch(name)
    )


def metadata() -> str:
    """Return the text of METADATA: name, version, licence and requirements of the wheel."""
    lines = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        "Summary: Detectron2, repacked as a wheel without its compiled extension.",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "Author: FAIR",
        "License: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
        "Description-Content-Type: text/plain",
    ]
    return "\n".join(lines) + "\n\n" + DESCRIPTION


def wheel_file() -> str:
    """Return the text of WHEEL: pure Python, for any platform."""
    return (
        "Wheel-Version: 1.0\nGenerator: era-detectron2 install_detectron2\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n"
    )


def record(members: dict[str, bytes]) -> str:
    """Return the text of RECORD: each member's name, SHA-256 and size, and RECORD's own name."""
    lines = []
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    lines.append(f"{DIST_INFO}/RECORD,,")
    return "\n".join(lines) + "\n"


def read_source(source: Path) -> dict[str, bytes]:
    """Return the members of the repacked wheel, but for RECORD, from the source wheel's."""
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            members = {name: archive.read(name) for name in sorted(names) if is_kept(name)}
            licences = [name for name in names if name.endswith(".dist-info/LICENSE")]
            licence = archive.read(licences[0]) if licences else None
    except (OSError, zipfile.BadZipFile) as error:
        raise InstallError(
            f"cannot read {source} as a wheel ({error}); download it again."
        ) from None
    if "detectron2/__init__.py" not in members or licence is None:
        raise InstallError(
            f"{source} is not the wheel of {SOURCE_NAME}: it has no detectron2/__init__.py or no "
            "LICENSE; download it again."
        )
    # The source names itself 0.7.2, a version that upstream never had: code that asks for the
    # version of Detectron2 is to get upstream's answer.
    members["detectron2/__init__.py"] = _VERSION_LINE.sub(
        f'__version__ = "{UPSTREAM_VERSION}"  # as upstream; changed when repacked'.encode(),
        members["detectron2/__init__.py"],
    )
    members[f"{DIST_INFO}/LICENSE"] = licence
    return members


def repack(source: Path, folder: Path) -> Path:
    """Repack the wheel ``source`` into ``folder`` and return the path of the new wheel.

    The same source gives the same bytes everywhere: sorted names, a fixed time, fixed permissions,
    and no compression, whose result depends on the zlib at hand.
    """
    members = read_source(source)
    members[f"{DIST_INFO}/METADATA"] = metadata().encode()
    members[f"{DIST_INFO}/WHEEL"] = wheel_file().encode()
    members[f"{DIST_INFO}/top_level.txt"] = b"detectron2\n"
    members[f"{DIST_INFO}/RECORD"] = record(members).encode()
    target = folder / WHEEL_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for name, content in members.items():
                info = zipfile.ZipInfo(name, ZIP_TIME)
                info.create_system = 3  # Unix, also when this runs on Windows
                info.external_attr = 0o100644 << 16
                archive.writestr(info, content)
    except OSError as error:
        raise InstallError(
            f"cannot write {target} ({error.strerror}); name a folder that you may write to."
        ) from None
    return target


def install(wheel: Path, constraint: Path | None, reinstall: bool) -> None:
    """Let pip install ``wheel`` and its requirements; ``reinstall`` replaces the same version."""
    if reinstall:
        pip(
            *("install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)),
            purpose=f"replace the incomplete Detectron2 {VERSION}",
        )
    constraints = ("--constraint", str(constraint)) if constraint else ()
    pip(
        *("install", "--quiet", *constraints, str(wheel)),
        purpose="install Detectron2 and its requirements",
    )


def checked_source(wheel: Path | None, folder: Path, say: Callable[[str], None]) -> Path:
    """Return ``wheel``, or the wheel downloaded into ``folder``, once its SHA-256 is checked."""
    if wheel is None:
        say(f"downloading {SOURCE_NAME}=={SOURCE_VERSION}")
        wheel = download(folder)
    check_sha256(wheel)
    return wheel


def needs_install(found: Found | None, say: Callable[[str], None]) -> bool:
    """Tell whether Detectron2 is to be installed; raise if one is there that does not import.

    The exception to the latter is this script's own wheel: a set-up that was interrupted, or that
    has not installed torch yet, is repaired by installing it again.
    """
    if found is None:
        return True
    if found.error is None:
        say(f"Detectron2 {found.version} is already at {Path(found.path).parent}; left alone")
        return False
    if installed_version() == VERSION:
        return True
    raise InstallError(
        f"the Detectron2 at {Path(found.path).parent} fails to import ({found.error}) and is left "
        "alone; mend it, or run 'pip uninstall detectron2' and then this script again."
    )


def report(say: Callable[[str], None]) -> None:
    """Say what the interpreter finds after the installation; raise if it finds nothing usable."""
    found = find_detectron2()
    if found is None:
        raise InstallError(
            f"pip installed Detectron2, but {sys.executable} does not find it; "
            "check PYTHONPATH and where pip installs to ('pip show detectron2')."
        )
    if found.error is None:
        say(f"Detectron2 {VERSION} is now at {Path(found.path).parent}")
    elif importlib.util.find_spec("torch") is None:
        say(f"Detectron2 {VERSION} is now at {Path(found.path).parent}; it needs torch to import")
    else:
        raise InstallError(
            f"Detectron2 was installed at {Path(found.path).parent} but fails to import "
            f"({found.error}); install what that error names."
        )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="install_detectron2.py",
        description="Install Detectron2 into the Python that runs this script, unless it is there "
        f"already. It is upstream's commit {UPSTREAM_COMMIT}, taken from the PyPI wheel {SOURCE_NAME}=="
        f"{SOURCE_VERSION}, whose SHA-256 is checked, and repacked without its compiled part.",
        epilog="examples: 'python tools/install_detectron2.py -c constraints.txt' installs with the "
        "pinned versions that the tests ran with; 'python tools/install_detectron2.py --output "
        "dist' only builds the wheel, for another machine. To remove it again: 'pip uninstall detectron2'. To use a "
        "Detectron2 of your own, install it first: this script then does nothing.",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help=f"use this {SOURCE_NAME}-{SOURCE_VERSION} wheel instead of downloading it; fetch it "
        f"with 'pip download --no-deps --only-binary=:all: --python-version {SOURCE_PYTHON} "
        f"{SOURCE_NAME}=={SOURCE_VERSION}'",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"only write {WHEEL_NAME} into this folder and install nothing",
    )
    parser.add_argument(
        "-c",
        "--constraint",
        type=Path,
        metavar="FILE",
        help="pip constraints file with the versions to choose for what Detectron2 requires",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Do what the command line asks for."""
    if options.constraint and not options.constraint.is_file():
        raise InstallError(
            f"there is no constraints file {options.constraint}; the project's is constraints.txt "
            "at the top of the repository."
        )
    found = None if options.output else find_detectron2()
    if not options.output and not needs_install(found, say):
        return
    with tempfile.TemporaryDirectory() as scratch:
        source = checked_source(options.wheel, Path(scratch), say)
        if options.output:
            say(f"wrote {repack(source, options.output)}")
            return
        wheel = repack(source, Path(scratch) / "repacked")
        install(wheel, options.constraint, reinstall=found is not None)
    report(say)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return 0 on success and 1 after a fault, which one sentence explains."""
    if sys.version_info < (3, 10):  # noqa: UP036 -- to say so is better than to fail on it
        print("install_detectron2: error: Python 3.10 or newer is needed.", file=sys.stderr)
        return 1
    options = parse_arguments(arguments)
    try:
        run(options, lambda text: print(f"install_detectron2: {text}", flush=True))
    except InstallError as error:
        print(f"install_detectron2: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install_detectron2: interrupted; run it again to finish.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
