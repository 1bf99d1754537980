"""What `experiments.plan` compiles, reads in the compiled step, and makes of it."""
