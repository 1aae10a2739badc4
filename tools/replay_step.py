#!/usr/bin/env python3
"""Take a step again that a run had to stop, and see where its numbers went wrong."""

import warnings

# Of Detectron2's model zoo; known, and no concern of who looks at a step.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from era.engine.launch import run_main  # noqa: E402
from era.engine.replay import main  # noqa: E402

if __name__ == "__main__":
    run_main(main)
