#!/usr/bin/env python3
"""Examine a run before it is started: software, devices, disk, data, models, and training steps really taken."""

import sys
import warnings

# Of Detectron2's model zoo; known, and looked at by the doctor itself.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

try:
    from era.doctor.cli import main
    from era.engine.launch import run_main
except ImportError as error:  # then nothing of the package can be asked what is missing
    hint = " (setuptools 82 dropped it: install setuptools below 81)" * (
        "pkg_resources" in str(error)
    )
    print(
        f"wrong  software: {error}{hint}; install what is missing, such as with make setup.",
        file=sys.stderr,
    )
    sys.exit(1)

if __name__ == "__main__":
    run_main(main)
