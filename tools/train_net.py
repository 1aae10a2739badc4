#!/usr/bin/env python3
"""Train or evaluate by config: distilled students, teachers and plain baselines."""

from era.engine.launch import run_main, train_net

if __name__ == "__main__":
    run_main(train_net)
