"""The image's recipe, as far as it can be judged where no Docker runs: by hadolint, and by the files that it names."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import REPO

DOCKERFILE = REPO / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@pytest.mark.parametrize("spoilt, found", [("", ""), ("RUN cd /tmp && sudo make\n", "DL3004")])
def test_hadolint_finds_nothing(spoilt, found, tmp_path):
    """Also that it would."""
    file = tmp_path / "Dockerfile"
    file.write_text(DOCKERFILE.read_text() + spoilt)
    done = subprocess.run([HADOLINT, str(file)], capture_output=True, text=True)
    assert (done.returncode == 0) == (not found) and found in done.stdout, done.stdout


def test_what_is_copied_before_the_set_up_is_all_that_it_reads():
    """A set-up out of these files alone: what the Makefile lists as its inputs, and the package."""
    text = DOCKERFILE.read_text().partition("RUN make setup")[0]
    copied = [
        name
        for line in re.findall(r"^COPY --chown=\S+ (.*) \S+$", text, re.M)
        for name in line.split()
    ]
    assert all((REPO / name).exists() for name in copied)
    inputs = re.search(r"^SETUP_INPUTS := (.*)$", (REPO / "Makefile").read_text(), re.M)[1].split()
    assert inputs and set(inputs) <= set(copied)
    named = re.search(r"^long_description = file: (\S+)$", (REPO / "setup.cfg").read_text(), re.M)[
        1
    ]
    assert {named, "LICENSE", "Makefile", "projects"} <= set(copied)


def test_runs_data_and_environments_stay_outside():
    ignored = (REPO / ".dockerignore").read_text().split()
    assert {".git", "**/.venv", "output", "datasets/*", "**/*.pth"} <= set(ignored)
