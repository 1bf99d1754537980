"""The `diagonal_scan` operator: api.py is public, reference.py defines it, the rest are implementations."""
