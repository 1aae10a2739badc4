"""ERA's losses made cheap: the same numbers as their definitions, to rounding.

What is here is paid for by a measurement (docs/performance.md) and tested against the definitions in
float64 (tests/methods/era/test_fast.py).
"""

from era.methods.era.fast.levers import ALL_ON, Levers
from era.methods.era.fast.terms import FastTerms

__all__ = ["ALL_ON", "FastTerms", "Levers"]
