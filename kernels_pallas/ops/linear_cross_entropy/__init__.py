"""The `linear_cross_entropy` operators: api.py is public, reference.py defines them, chunked.py
never holds the logits."""
