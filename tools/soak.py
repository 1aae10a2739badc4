#!/usr/bin/env python3
"""A long training run, watched: whether memory, file descriptors, threads and processes stay flat."""

import warnings

# Of Detectron2's model zoo; known, and no concern of who measures.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from era.benchmark.soak import main  # noqa: E402
from era.engine.launch import run_main  # noqa: E402

if __name__ == "__main__":
    run_main(main)
