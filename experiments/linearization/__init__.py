"""Runs linearizations: teachers, stages, their tasks, and comparisons of methods."""
