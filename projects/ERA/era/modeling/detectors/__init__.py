"""Families of detectors, one file each."""
