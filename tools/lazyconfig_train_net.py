#!/usr/bin/env python3
"""Train or evaluate a student that a LazyConfig (.py) describes, distilled or plain."""

from era.engine.launch import run_main
from era.engine.lazy_train import lazy_train_net

if __name__ == "__main__":
    run_main(lazy_train_net)
