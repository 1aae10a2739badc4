#!/usr/bin/env python3
"""Export a trained student into a deployment folder."""

from era.deploy.export import export_main
from era.engine.launch import run_main

if __name__ == "__main__":
    run_main(export_main)
