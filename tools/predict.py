#!/usr/bin/env python3
"""Detect objects in pictures and videos with a deployment folder; needs only that folder's runtime."""

import sys

from era_runtime.predict import main

if __name__ == "__main__":
    sys.exit(main())
