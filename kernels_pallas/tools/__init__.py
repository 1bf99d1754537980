"""Compiling and reading TPU and GPU programs without the hardware."""
