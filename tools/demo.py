#!/usr/bin/env python3
"""See distillation at work on a small generated dataset: a teacher and its students, a table, pictures."""

import warnings
from pathlib import Path

# Of Detectron2's model zoo; known, and no concern of who runs the demo.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from era.demo.cli import main  # noqa: E402
from era.engine.launch import run_main  # noqa: E402

if __name__ == "__main__":
    run_main(lambda: main(root=Path(__file__).resolve().parent.parent))
