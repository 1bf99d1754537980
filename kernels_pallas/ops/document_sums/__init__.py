"""Sums over whole documents: `kernels_pallas.document_sums` is public."""
