"""The operators, a folder each: api.py is public, reference.py defines the operator, case.py says
how it is called and checked, shapes.py has published sizes; the rest are implementations."""
