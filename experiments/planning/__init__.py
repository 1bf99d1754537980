"""Compiles training steps for `experiments.plan`, reads the programs, and reports on them."""
