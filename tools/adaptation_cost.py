#!/usr/bin/env python3
"""MTPD's adaptation cost between detectors, and the order of teachers that follows; see --help."""

from era.engine.launch import run_main
from era.study.adaptation_cli import main

if __name__ == "__main__":
    run_main(main)
