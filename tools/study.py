#!/usr/bin/env python3
"""Compare variants from several seeds, as a plan of studies/ says; see --help."""

from pathlib import Path

from era.engine.launch import run_main
from era.study.cli import main

if __name__ == "__main__":
    run_main(lambda: main(root=Path(__file__).resolve().parent.parent))
