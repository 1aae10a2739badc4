#!/usr/bin/env python3
"""From a folder of annotated pictures to a deployed student, in one command; see --help."""

import warnings

# Of Detectron2's model zoo; known, and no concern of who has pictures.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from era.distil.cli import main  # noqa: E402
from era.engine.launch import run_main  # noqa: E402

if __name__ == "__main__":
    run_main(main)
