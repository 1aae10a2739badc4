#!/usr/bin/env python3
"""Turn a checkpoint of torchvision, timm or mmdetection into one of a Detectron2 model."""

import warnings

# Of Detectron2's model zoo; known, and no concern of who converts.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from era.convert.cli import main  # noqa: E402
from era.engine.launch import run_main  # noqa: E402

if __name__ == "__main__":
    run_main(main)
