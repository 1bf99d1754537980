"""The operators, a folder each: api.py is public, reference.py defines it, the rest are
implementations."""
