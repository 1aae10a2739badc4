#!/usr/bin/env python3
"""Write one self-contained HTML file about one or several runs."""

import warnings

# Of Detectron2's model zoo; known, and no concern of who reads a report.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from era.engine.launch import run_main  # noqa: E402
from era.report.cli import report_main  # noqa: E402

if __name__ == "__main__":
    run_main(report_main)
