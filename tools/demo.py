#!/usr/bin/env python3
"""See distillation at work on a small generated dataset: five trainings, a table, pictures."""

from pathlib import Path

from era.demo.cli import main
from era.launch import run_main

if __name__ == "__main__":
    run_main(lambda: main(root=Path(__file__).resolve().parent.parent))
