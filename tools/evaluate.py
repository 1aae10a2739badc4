#!/usr/bin/env python3
"""COCO AP and latency of deployment folders, beside eager."""

from era.deploy.evaluate import evaluate_main
from era.engine.launch import run_main

if __name__ == "__main__":
    run_main(evaluate_main)
