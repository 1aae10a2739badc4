#!/usr/bin/env python3
"""MTPD's adaptation cost between detectors, and the order of teachers that follows; see --help."""

import warnings

# Of Detectron2's model zoo; known, and no concern of who measures.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from era.engine.launch import run_main  # noqa: E402
from era.study.adaptation_cli import main  # noqa: E402

if __name__ == "__main__":
    run_main(main)
