"""The losses `linear_cross_entropy` and `linear_kl_divergence`: api.py is public, reference.py
defines them, chunked.py computes them without ever holding all logits.
"""
