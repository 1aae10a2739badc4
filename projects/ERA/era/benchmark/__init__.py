"""What a distillation step costs: ``tools/benchmark.py``."""
