"""Absl binaries (`python -m experiments.train` and friends) over an importable training library."""
