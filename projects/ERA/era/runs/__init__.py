"""Runs: planned, executed, read back and compared; study, demo and report stand on this."""
