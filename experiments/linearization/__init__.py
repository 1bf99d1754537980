"""What `python -m experiments.linearize` runs: teachers, the stages' tasks, the table and the
picture."""
